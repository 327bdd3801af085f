"""What a workload is made of, and the making: lengths, shared prefixes, times, all from one seed.

The same recipe, writer and seed give the same workload, on every machine.
"""

from dataclasses import dataclass, field

import numpy as np

from penstock.bench.arrivals import Arrivals, arrival_times
from penstock.bench.lengths import Lengths, constant
from penstock.bench.prompts import BLOCK, OWN, PREFIX, WARMUP, PromptWriter, Segment
from penstock.bench.trace import HASH_BLOCK_TOKENS, TraceRequest
from penstock.bench.workload import MAX_REQUESTS, LoadRequest, Workload
from penstock.core.errors import InvalidParameterError


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What the requests are like.

    Raises:
        InvalidParameterError: a value is out of its range.
    """

    num_requests: int = 100
    input_lens: Lengths = field(default_factory=lambda: constant(128))
    """Prompt tokens of a request's own, behind the prefix."""
    output_lens: Lengths = field(default_factory=lambda: constant(128))
    prefix_len: int = 0
    """Tokens that requests share at their start."""
    num_prefixes: int = 1
    """Different prefixes; request i has number i modulo this."""
    arrivals: Arrivals = field(default_factory=Arrivals)
    max_concurrency: int | None = None
    seed: int = 0
    trace: tuple[TraceRequest, ...] = ()
    """If there is one, it gives lengths, prefixes and times."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_requests <= MAX_REQUESTS:
            raise InvalidParameterError(
                f"num_prompts is {self.num_requests}, it must be 1 to {MAX_REQUESTS}", param="num_prompts"
            )
        if self.prefix_len < 0 or self.num_prefixes < 1:
            raise InvalidParameterError(
                f"random_prefix_len is {self.prefix_len} and num_prefixes {self.num_prefixes}, "
                "they must be at least 0 and 1"
            )
        for param, lens, least in (
            ("random_input_len", self.input_lens, 1 - self.prefix_len),
            ("random_output_len", self.output_lens, 1),
        ):
            if lens.low < least:
                raise InvalidParameterError(f"{param} is {lens}, it must be at least 1 token", param=param)


def make_workload(recipe: Recipe, *, writer: PromptWriter) -> Workload:
    """The requests of a recipe, each with its prompt and time."""
    if recipe.trace:
        requests = tuple(
            _trace_request(request, index=index, writer=writer) for index, request in enumerate(recipe.trace)
        )
        return Workload(requests=requests, is_open_loop=True, max_concurrency=recipe.max_concurrency)
    rng = np.random.default_rng(recipe.seed)
    num_requests = recipe.num_requests
    input_lens = recipe.input_lens.draw(num_requests, rng=rng).tolist()
    output_lens = recipe.output_lens.draw(num_requests, rng=rng).tolist()
    times_s = arrival_times(recipe.arrivals, num_requests=num_requests, rng=rng).tolist()
    requests = tuple(
        LoadRequest(
            prompt=writer.write(_segments(recipe, index=index, input_len=input_len)),
            num_prompt_tokens=recipe.prefix_len + input_len,
            num_output_tokens=output_len,
            arrival_s=due_s,
        )
        for index, (input_len, output_len, due_s) in enumerate(
            zip(input_lens, output_lens, times_s, strict=True)
        )
    )
    return Workload(
        requests=requests,
        is_open_loop=not recipe.arrivals.is_all_at_once,
        max_concurrency=recipe.max_concurrency,
    )


def make_warmup(recipe: Recipe, *, writer: PromptWriter, num_requests: int) -> Workload:
    """Requests of the recipe's usual lengths that share nothing with its own: no cache is warmed for it.

    Args:
        recipe: gives lengths and concurrency.
        writer: of the prompts.
        num_requests: at least 1.
    """
    rng = np.random.default_rng([recipe.seed, WARMUP])
    if recipe.trace:
        picked = recipe.trace[:num_requests]
        lens = [(request.input_len, request.output_len) for request in picked]
    else:
        input_lens = recipe.input_lens.draw(num_requests, rng=rng) + recipe.prefix_len
        lens = list(
            zip(input_lens.tolist(), recipe.output_lens.draw(num_requests, rng=rng).tolist(), strict=True)
        )
    requests = tuple(
        LoadRequest(
            prompt=writer.write([Segment(key=(WARMUP, index), num_tokens=input_len)]),
            num_prompt_tokens=input_len,
            num_output_tokens=output_len,
        )
        for index, (input_len, output_len) in enumerate(lens)
    )
    return Workload(requests=requests, max_concurrency=recipe.max_concurrency)


def _segments(recipe: Recipe, *, index: int, input_len: int) -> list[Segment]:
    own = Segment(key=(OWN, index), num_tokens=input_len)
    if not recipe.prefix_len:
        return [own]
    prefix = Segment(key=(PREFIX, index % recipe.num_prefixes), num_tokens=recipe.prefix_len)
    return [prefix, own]


def _trace_request(request: TraceRequest, *, index: int, writer: PromptWriter) -> LoadRequest:
    """A trace's request; 1,100 tokens with blocks a, b, c are 512 of a, 512 of b and 76 of c."""
    if request.hash_ids:
        starts = range(0, request.input_len, HASH_BLOCK_TOKENS)
        segments = [
            Segment(key=(BLOCK, hash_id), num_tokens=min(HASH_BLOCK_TOKENS, request.input_len - start))
            for hash_id, start in zip(request.hash_ids, starts, strict=True)
        ]
    else:
        segments = [Segment(key=(OWN, index), num_tokens=request.input_len)]
    return LoadRequest(
        prompt=writer.write(segments),
        num_prompt_tokens=request.input_len,
        num_output_tokens=request.output_len,
        arrival_s=request.arrival_s,
    )
