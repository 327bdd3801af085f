"""May this request enter at all? One pure function, the same on both sides of the process boundary.

It refuses what can never fit, with the numbers; whether there is room now is the scheduler's affair. Called
by `scheduler` in the engine process and by `engine/supervisor` in the API process, which has only
`EngineInfo`.
"""

from collections.abc import Sequence
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError, QueueFullError
from penstock.core.params import SamplingParams, validate_sampling
from penstock.core.tokens import EngineInfo, EngineRequest
from penstock.engine.kv.block_needs import num_blocks_needed
from penstock.engine.scheduler.beams import BeamSearch

MAX_CANDIDATES: Final = 256
"""Continuations of a beam that a search may look at."""
POOLING_KINDS: Final = ("mean", "last", "classify", "logits")
MAX_TOKEN_IDS: Final = 1 << 32
"""Keys of the prefix tree take 4 bytes for a token."""


class AdmissionLimits(msgspec.Struct, frozen=True, kw_only=True):
    """What bounds one request."""

    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    windows: tuple[int | None, ...]
    """Window of each cache group, None for full attention."""
    vocab_size: int | None = None
    """When known, prompt token ids are checked against it."""
    num_labels: int = 0
    """Classes of a model that classifies; 0 for one that generates."""


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """The queue at this moment, and its limits."""

    num_requests: int
    num_tokens: int
    max_num_requests: int
    max_num_tokens: int


def limits_from_info(info: EngineInfo) -> AdmissionLimits:
    """The limits as the API side knows them."""
    return AdmissionLimits(
        max_model_len=info.max_model_len,
        max_num_seqs=info.max_num_seqs,
        num_blocks=info.num_blocks,
        block_size=info.block_size,
        windows=info.cache_group_windows or (None,) * info.num_cache_groups,
        vocab_size=info.vocab_size,
        num_labels=len(info.labels),
    )


def num_blocks_max(request: EngineRequest, *, limits: AdmissionLimits) -> int:
    """Most blocks that the request can hold at once; its last token is never computed."""
    num_prompt_tokens = len(request.prompt_token_ids)
    return num_blocks_needed(
        num_prompt_tokens + max(0, request.max_tokens - 1),
        num_shared_tokens=num_prompt_tokens,
        n=request.params.num_sequences,
        windows=limits.windows,
        block_size=limits.block_size,
    )


def check_admissible(request: EngineRequest, *, limits: AdmissionLimits) -> None:
    """Refuse a request that can never be served here.

    Raises:
        InvalidParameterError: names the field, its value and the limit.
    """
    validate_sampling(request.params, vocab_size=limits.vocab_size, allow_zero_max_tokens=True)
    _check_head(request, limits=limits)
    _check_prompt(request, limits=limits)
    _check_length(request, limits=limits)
    if request.params.num_sequences > limits.max_num_seqs:
        raise InvalidParameterError(
            f"{_word_for_n(request)} is {request.params.num_sequences}, it must be at most max_num_seqs, "
            f"which is {limits.max_num_seqs}",
            param="n",
        )
    _check_search(request, limits=limits)
    needed = num_blocks_max(request, limits=limits)
    if needed > limits.num_blocks:
        raise InvalidParameterError(
            f"the request may need {needed} KV blocks (prompt of {len(request.prompt_token_ids)} tokens, "
            f"max_tokens {request.max_tokens}, n {request.params.num_sequences}), the pool has "
            f"{limits.num_blocks}; ask for fewer tokens",
            code="context_length_exceeded",
            param="max_tokens",
        )


def _check_head(request: EngineRequest, *, limits: AdmissionLimits) -> None:
    """A head gives scores of tokens or of classes, never both."""
    pooling = request.pooling
    if pooling is None:
        if limits.num_labels:
            raise InvalidParameterError(
                f"this model has a head of {limits.num_labels} classes, it cannot generate", param="model"
            )
        return
    if (pooling.kind == "classify") is not bool(limits.num_labels) and pooling.kind in ("classify", "logits"):
        raise InvalidParameterError(
            f"pooling is {pooling.kind}, this model has {limits.num_labels or 'no'} classes", param="pooling"
        )
    if pooling.kind not in POOLING_KINDS or (pooling.kind == "logits") is not bool(pooling.token_ids):
        raise InvalidParameterError(
            f"pooling is {pooling.kind[:32]} with {len(pooling.token_ids)} token ids, it must be one of "
            f"{', '.join(POOLING_KINDS)}, and logits alone takes token ids",
            param="pooling",
        )
    _check_ids(pooling.token_ids, limits=limits, what="pooling")
    _check_pooled_params(request)


def _check_pooled_params(request: EngineRequest) -> None:
    """Nothing is drawn, so nothing may be said about draws."""
    if request.params != SamplingParams(max_tokens=0) or request.grammar is not None:
        raise InvalidParameterError(
            "pooling cannot be used with sampling parameters or a grammar, and max_tokens must be 0",
            param="pooling",
        )


def _check_search(request: EngineRequest, *, limits: AdmissionLimits) -> None:
    if not request.params.use_beam_search:
        return
    if request.grammar is not None:
        raise InvalidParameterError(
            "use_beam_search cannot be used with guided decoding: a grammar follows one answer at a time",
            param="use_beam_search",
        )
    num_candidates = BeamSearch(request=request, max_tokens=request.max_tokens).num_candidates
    if limits.vocab_size is not None and num_candidates > min(limits.vocab_size, MAX_CANDIDATES):
        raise InvalidParameterError(
            f"a search with {request.params.num_sequences} beams and so many stop tokens looks at "
            f"{num_candidates} candidates a beam, the limit is {min(limits.vocab_size, MAX_CANDIDATES)}",
            param="stop_token_ids",
        )


def _word_for_n(request: EngineRequest) -> str:
    """The field that says how many sequences there are."""
    return "n" if request.params.num_sequences == request.params.n else "best_of"


def _check_prompt(request: EngineRequest, *, limits: AdmissionLimits) -> None:
    token_ids = request.prompt_token_ids
    if not token_ids:
        raise InvalidParameterError("the prompt has 0 tokens, it must have at least 1", param="prompt")
    _check_ids(token_ids, limits=limits, what="the prompt")


def _check_ids(token_ids: Sequence[int], *, limits: AdmissionLimits, what: str) -> None:
    num_ids = MAX_TOKEN_IDS if limits.vocab_size is None else limits.vocab_size
    least, most = min(token_ids, default=0), max(token_ids, default=0)
    if least < 0 or most >= num_ids:
        raise InvalidParameterError(
            f"{what} holds token id {least if least < 0 else most}, it must be from 0 to {num_ids - 1}",
            param="prompt",
        )


def _check_length(request: EngineRequest, *, limits: AdmissionLimits) -> None:
    num_prompt_tokens = len(request.prompt_token_ids)
    if request.params.max_tokens is None:
        raise InvalidParameterError("max_tokens is None, the engine needs a number", param="max_tokens")
    total = num_prompt_tokens + request.max_tokens
    if total <= limits.max_model_len:
        return
    raise InvalidParameterError(
        f"the prompt has {num_prompt_tokens} tokens and max_tokens is {request.max_tokens}, "
        f"together {total}; the limit is max_model_len, which is {limits.max_model_len}",
        code="context_length_exceeded",
        param="prompt" if num_prompt_tokens >= limits.max_model_len else "max_tokens",
    )


def check_queue(load: QueueLoad, *, num_prompt_tokens: int, retry_after_s: float) -> None:
    """Refuse a request for which the queue has no place; an empty queue takes any prompt.

    Raises:
        QueueFullError: with `retry_after_s`.
    """
    if load.num_requests >= load.max_num_requests:
        raise QueueFullError(
            f"{load.num_requests} requests wait, the limit max_num_queued_reqs is {load.max_num_requests}",
            retry_after_s=retry_after_s,
        )
    total = load.num_tokens + num_prompt_tokens
    if load.num_requests and total > load.max_num_tokens:
        raise QueueFullError(
            f"{load.num_tokens} prompt tokens wait and {num_prompt_tokens} came, the limit "
            f"max_num_queued_tokens is {load.max_num_tokens}",
            retry_after_s=retry_after_s,
        )
