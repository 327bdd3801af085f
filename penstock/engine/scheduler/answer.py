"""When an answer ends, and the deltas that say so.

Pure functions over a sequence and the token it was given. Called by `scheduler.apply`.
"""

from typing import NamedTuple

from penstock.core.errors import GenerateError
from penstock.core.text import FinishReason, TokenLogprobs
from penstock.core.tokens import ErrorInfo, RequestStats, TokenDelta
from penstock.engine.scheduler.plan import SampledToken, SequenceFailure
from penstock.engine.scheduler.request import Sequence, SequenceGroup


class Ending(NamedTuple):
    """What a sampled token does to its answer."""

    keeps_token: bool
    """False for an end-of-sequence or stop token, which is not part of the answer."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


GOES_ON = Ending(keeps_token=True)


def judge_token(seq: Sequence, token_id: int, *, max_model_len: int) -> Ending:
    """Decide whether `token_id`, not yet appended, ends the answer."""
    request = seq.group.request
    num_outputs = seq.num_outputs
    if num_outputs >= request.params.min_tokens:
        if token_id in request.eos_token_ids and not request.params.ignore_eos:
            return Ending(keeps_token=False, finish_reason=FinishReason.STOP)
        if token_id in request.params.stop_token_ids:
            return Ending(keeps_token=False, finish_reason=FinishReason.STOP, stop_token_id=token_id)
    if num_outputs + 1 >= request.max_tokens or seq.num_tokens + 1 >= max_model_len:
        return Ending(keeps_token=True, finish_reason=FinishReason.LENGTH)
    return GOES_ON


def token_delta(
    seq: Sequence,
    sampled: SampledToken,
    ending: Ending,
    *,
    stats: RequestStats | None,
    stats_so_far: RequestStats | None = None,
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
) -> TokenDelta:
    """The delta for one sampled token."""
    has_logprobs = ending.keeps_token and sampled.logprobs is not None
    return TokenDelta(
        seq.group.request.request_id,
        seq.index,
        (sampled.token_id,) if ending.keeps_token else (),
        (sampled.logprobs,) if has_logprobs and sampled.logprobs is not None else None,
        ending.finish_reason,
        ending.stop_token_id,
        seq.group.num_cached_tokens,
        stats,
        stats_so_far=stats_so_far,
        prompt_logprobs=prompt_logprobs,
    )


def closing_delta(
    seq: Sequence,
    reason: FinishReason,
    *,
    stats: RequestStats | None,
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
    pooled: tuple[float, ...] | None = None,
) -> TokenDelta:
    """The last delta of an answer that gains no token: cancelled, or asked for none."""
    return TokenDelta(
        seq.group.request.request_id,
        seq.index,
        finish_reason=reason,
        num_cached_tokens=seq.group.num_cached_tokens,
        stats=stats,
        prompt_logprobs=prompt_logprobs,
        pooled=pooled,
    )


def failure_delta(group: SequenceGroup, failure: SequenceFailure, *, index: int) -> TokenDelta:
    """The single last delta of a request that failed as a whole."""
    error = ErrorInfo(kind=GenerateError.__name__, message=failure.message, code=failure.code)
    return TokenDelta(
        group.request.request_id,
        index,
        finish_reason=FinishReason.ERROR,
        num_cached_tokens=group.num_cached_tokens,
        error=error,
    )
