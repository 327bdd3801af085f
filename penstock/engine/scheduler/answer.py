"""What a step gives to an answer: its tokens, those that the grammar forces after them, and when it ends.

Functions over a sequence and the tokens drawn for it. Called by `scheduler.apply`.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from penstock.core.errors import GenerateError, InvalidParameterError
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, TokenLogprob, TokenLogprobs
from penstock.core.tokens import ErrorInfo, RequestStats, TokenDelta
from penstock.engine.scheduler.plan import SampledToken, SequenceFailure
from penstock.engine.scheduler.request import Sequence, SequenceGroup

NO_TOKEN_ALLOWED: Final = "no_token_allowed"  # noqa: S105  a code, not a password
"""`SequenceFailure.code` of a row in which masks and bans together left nothing."""
GRAMMAR_ERROR: Final = "grammar_error"
"""Of a matcher that cannot go on."""
FAULTS_OF_REQUESTS: Final = frozenset({NO_TOKEN_ALLOWED, GRAMMAR_ERROR})
"""What a request asked for cannot be: it gets 400, not 500, and sending it again is no use."""


class Ending(NamedTuple):
    """What a sampled token does to its answer."""

    keeps_token: bool
    """False for an end-of-sequence or stop token, which is not part of the answer."""
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None


GOES_ON = Ending(keeps_token=True)
COMPLETE: Final = Ending(keeps_token=True, finish_reason=FinishReason.STOP)
"""The grammar allows nothing after this token."""


@dataclass(slots=True, kw_only=True)
class Gain:
    """What an answer gained in a step; the tokens are appended to the sequence already."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    """As many as `token_ids`, or none if they were not asked for."""
    num_forced: int = 0
    """The last so many of `token_ids` were not drawn: the grammar allowed nothing else."""
    ending: Ending = GOES_ON
    failure: str | None = None
    """Why the grammar's matcher cannot go on; the request has failed then."""

    @property
    def is_over(self) -> bool:
        """True if the answer gets no further token."""
        return self.ending.finish_reason is not None or self.failure is not None


def take_tokens(
    seq: Sequence, drawn: Iterable[SampledToken], *, max_model_len: int, jumps_forward: bool
) -> Gain:
    """Append what was drawn for an answer, in order, up to the token that ends it.

    Args:
        seq: its tokens grow, and its constraint follows.
        drawn: one token, or confirmed drafts and one more.
        max_model_len: tokens of prompt and answer together.
        jumps_forward: append what the grammar forces next, too: it needs no step of its own.
    """
    gain = Gain()
    for sampled in drawn:
        # It was drawn after all that is known: what was a draft before it is confirmed, and computed.
        seq.num_computed_tokens = seq.num_tokens
        _take(seq, sampled, gain, max_model_len=max_model_len)
        if gain.is_over:
            return gain
    if seq.constraint is not None and jumps_forward and not _forbids_tokens(seq.group.request.params):
        for token_id in seq.constraint.forced():
            forced = SampledToken(seq.seq_id, token_id, _certain(seq, token_id))
            gain.num_forced += _take(seq, forced, gain, max_model_len=max_model_len)
            if gain.is_over:
                break
    return gain


def _forbids_tokens(params: SamplingParams) -> bool:
    """True if a token that the grammar forces may be one that the client forbids: then it must be drawn."""
    return bool(params.bad_words or params.allowed_token_ids)


def _take(seq: Sequence, sampled: SampledToken, gain: Gain, *, max_model_len: int) -> int:
    """One token; returns 1 if the answer keeps it, else 0."""
    gain.ending = judge_token(seq, sampled.token_id, max_model_len=max_model_len)
    if not gain.ending.keeps_token:
        return 0
    seq.token_ids.append(sampled.token_id)
    gain.token_ids.append(sampled.token_id)
    if sampled.logprobs is not None:
        gain.logprobs.append(sampled.logprobs)
    if seq.constraint is not None:
        seq.constraint.accept(sampled.token_id)
        gain.failure = seq.constraint.failure
        if seq.constraint.is_complete:
            gain.ending = COMPLETE
    return 1


def _certain(seq: Sequence, token_id: int) -> TokenLogprobs | None:
    """What is told of a token that nothing else could have been, if logprobs were asked for."""
    num_top = seq.group.request.params.logprobs
    if num_top is None:
        return None
    certain = TokenLogprob(token_id, 0.0, 1)
    return TokenLogprobs(certain, (certain,) if num_top else ())


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
    gain: Gain,
    *,
    stats: RequestStats | None,
    stats_so_far: RequestStats | None = None,
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
) -> TokenDelta:
    """The delta of one answer in one step."""
    return TokenDelta(
        seq.group.request.request_id,
        seq.index,
        tuple(gain.token_ids),
        tuple(gain.logprobs) or None,
        gain.ending.finish_reason,
        gain.ending.stop_token_id,
        seq.group.num_cached_tokens,
        stats,
        stats_so_far=stats_so_far,
        prompt_logprobs=prompt_logprobs,
    )


def beam_deltas(group: SequenceGroup, *, stats: RequestStats) -> list[TokenDelta]:
    """The answers of a search that is over, best first, each whole in one delta."""
    assert group.beams is not None
    best = group.beams.finished[: group.request.params.n]
    told = group.take_prompt_logprobs()
    return [
        TokenDelta(
            group.request.request_id,
            index,
            answer.token_ids,
            answer.logprobs or None,
            answer.finish_reason,
            answer.stop_token_id,
            group.num_cached_tokens,
            stats if index == len(best) - 1 else None,
            prompt_logprobs=told if index == 0 else None,
        )
        for index, answer in enumerate(best)
    ]


def closing_delta(
    group: SequenceGroup,
    reason: FinishReason,
    *,
    index: int,
    stats: RequestStats | None,
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
    pooled: tuple[float, ...] | None = None,
) -> TokenDelta:
    """The last delta of an answer that gains no token: cancelled, or asked for none."""
    return TokenDelta(
        group.request.request_id,
        index,
        finish_reason=reason,
        num_cached_tokens=group.num_cached_tokens,
        stats=stats,
        prompt_logprobs=prompt_logprobs,
        pooled=pooled,
    )


def failure_delta(group: SequenceGroup, failure: SequenceFailure, *, index: int) -> TokenDelta:
    """The single last delta of a request that failed as a whole."""
    kind = InvalidParameterError if failure.code in FAULTS_OF_REQUESTS else GenerateError
    error = ErrorInfo(kind=kind.__name__, message=failure.message, code=failure.code)
    return TokenDelta(
        group.request.request_id,
        index,
        finish_reason=FinishReason.ERROR,
        num_cached_tokens=group.num_cached_tokens,
        error=error,
    )
