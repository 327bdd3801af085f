"""The least time in which this machine could answer a workload: what a figure is a fraction of.

Step for step: every running answer gets a token, prompts in the order of their arrival fill the step up to
`STEP_TOKENS`, and the step lasts the larger of what it must read over the read bandwidth and what it must
multiply over half of the peak. Half, because tiles that come from a cache reach no more. Nothing else counts:
no scheduling, no sampling, no HTTP. A prefix that an earlier prompt had is computed once.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from penstock.bench.machine_limits import MachineLimits
from penstock.bench.model_cost import ModelCost, read_model_cost
from penstock.bench.workload import LoadRequest, Workload
from penstock.core.errors import CheckpointError, PenstockError
from penstock.models.loader import read_shape

STEP_TOKENS: Final = 2048
SHARE_OF_PEAK: Final = 0.5
BLOCK_TOKENS: Final = 16
"""A prefix is found in whole blocks of so many tokens."""
BYTES_PER_WEIGHT: Final = {"bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 128}
"""int4 with a 16-bit scale for each group of 128; the scales of int8, one a row, are nothing."""
KV_BYTES: Final = 2
"""Of a number in the KV cache."""

FindBound = Callable[[Workload, str], float]
"""Seconds for a workload at a precision, by the limits of the machine as they are now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """What a step reads and multiplies, apart from the precision of the weights."""

    cost: ModelCost
    kv_numbers: int
    """Of one token in all layers, keys and values."""
    attention_flops: int
    """Of one token that looks at one other, in all layers."""


def read_model_size(folder: Path) -> ModelSize:
    """From a checkpoint of any family; every layer counts as full attention.

    Raises:
        CheckpointError: it is damaged, or of a family that is not built here.
    """
    try:
        shape = read_shape(folder)
    except PenstockError as error:
        raise CheckpointError(f"{folder.name} does not say its size: {error.message}") from error
    return ModelSize(
        cost=read_model_cost(folder),
        kv_numbers=2 * shape.num_layers * shape.kv_size,
        attention_flops=4 * shape.num_layers * shape.query_size,
    )


@dataclass(slots=True, kw_only=True)
class _Answer:
    prompt_left: int
    output_left: int
    context: int


def least_seconds(load: Workload, *, size: ModelSize, precision: str, limits: MachineLimits) -> float:
    """Sum over the steps of the larger of reading and multiplying.

    Args:
        load: a closed loop; at most `max_concurrency` answers run at once.
        size: of the model.
        precision: a key of `BYTES_PER_WEIGHT`; the quantized ones multiply in int8.
        limits: of the machine.
    """
    rates = _Rates(precision=precision, limits=limits)
    waiting = deque(_answers(load.requests))
    running: list[_Answer] = []
    total_s = 0.0
    while waiting or running:
        while waiting and len(running) < (load.max_concurrency or len(load.requests)):
            running.append(waiting.popleft())
        total_s += rates.seconds(_step(running, size=size))
        running = [answer for answer in running if answer.output_left]
    return total_s


def _answers(requests: Sequence[LoadRequest]) -> list[_Answer]:
    seen: set[tuple[int, ...]] = set()
    answers = []
    for request in requests:
        assert not isinstance(request.prompt, str), "scenarios are lists of ids"
        cached = _num_cached(request.prompt, seen)
        answers.append(
            _Answer(
                prompt_left=len(request.prompt) - cached,
                output_left=request.num_output_tokens,
                context=cached,
            )
        )
    return answers


def _num_cached(prompt: tuple[int, ...], seen: set[tuple[int, ...]]) -> int:
    """Tokens of whole blocks that an earlier prompt began with; notes the blocks of this one."""
    ends = range(BLOCK_TOKENS, len(prompt), BLOCK_TOKENS)
    cached = max((end for end in ends if prompt[:end] in seen), default=0)
    seen.update(prompt[:end] for end in ends)
    return cached


@dataclass(slots=True, kw_only=True)
class _Work:
    """Of one step."""

    flops: float
    head: bool = False
    """Somebody draws: the head is read."""
    kv_numbers: int = 0
    cost: ModelCost


def _step(running: Sequence[_Answer], *, size: ModelSize) -> _Work:
    """Decodes first, then prompts up to the budget; moves the answers on."""
    work = _Work(flops=0.0, cost=size.cost)
    decoding = [answer for answer in running if not answer.prompt_left]
    room = STEP_TOKENS - len(decoding)
    for answer in decoding:
        _compute(answer, 1, work=work, size=size)
        _draw(answer, work=work)
    for answer in running:
        num_tokens = min(answer.prompt_left, room)
        if not num_tokens:
            continue
        room -= num_tokens
        _compute(answer, num_tokens, work=work, size=size)
        answer.prompt_left -= num_tokens
        if not answer.prompt_left:
            _draw(answer, work=work)
    return work


def _compute(answer: _Answer, num_tokens: int, *, work: _Work, size: ModelSize) -> None:
    looked_at = num_tokens * answer.context + num_tokens * (num_tokens + 1) / 2
    work.flops += num_tokens * size.cost.body_flops + looked_at * size.attention_flops
    work.kv_numbers += answer.context * size.kv_numbers
    answer.context += num_tokens


def _draw(answer: _Answer, *, work: _Work) -> None:
    work.flops += work.cost.head_flops
    work.head = True
    answer.output_left -= 1


class _Rates:
    """Turns work into seconds."""

    def __init__(self, *, precision: str, limits: MachineLimits) -> None:
        peak = limits.bf16_tflops if precision == "bf16" else limits.int8_tops
        self._flops_per_s = peak * 1e12 * SHARE_OF_PEAK
        self._bytes_per_s = limits.read_gb_per_s * 1e9
        self._bytes_per_weight = BYTES_PER_WEIGHT[precision]

    def seconds(self, work: _Work) -> float:
        """The larger of reading and multiplying."""
        weights = (work.cost.body_flops + work.head * work.cost.head_flops) // 2
        num_bytes = weights * self._bytes_per_weight + work.kv_numbers * KV_BYTES
        return max(num_bytes / self._bytes_per_s, work.flops / self._flops_per_s)
