"""What happens in one simulation, all of it from a seed: the setting, the requests, the cancellations.

Sizes are tiny and the vocabulary has few tokens, so that prefixes are shared, pools run dry and windows
slide within a few steps. Called by `simulator`.
"""

import dataclasses
import random
from dataclasses import dataclass
from typing import Final, Literal

from msgspec.structs import replace

from penstock.core.ids import RequestId, TenantId
from penstock.core.params import SamplingParams
from penstock.core.text import Priority
from penstock.core.tokens import EngineRequest, Pooling
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.block_needs import num_blocks_needed
from penstock.engine.kv.cache_groups import CacheLayout, make_cache_layout
from penstock.sim.runner import FaultRates, StepTimes

EOS: Final = 0
LAYOUTS: Final[tuple[tuple[int | None, ...], ...]] = (
    (None,),
    (None,),
    (None, None, 6),
    (None, 3),
    (5,),
    (4, 9),
    (None, 4, 10),
)
SIZES: Final = ((12, 6), (24, 8), (40, 12), (8, 30))
"""Longest prompt and longest answer, in tokens."""
STORM_SIZES: Final = (4, 40)
"""Many short prompts start together and outgrow the pool together."""
STORM_RATE: Final = 0.3
SEARCH_RATE: Final = 0.2
NUM_HOST_SLOTS: Final = (0, 3, 12, 1000)
OUT_OF_MEMORY_RATE: Final = 0.1
POOLING_RATE: Final = 0.15
"""Requests that want a vector instead of tokens."""
CANDIDATES_PER_BEAM: Final = 3
"""With one end-of-sequence and one stop token."""
IMPOSSIBLE_RATE: Final = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """The engine under test."""

    config: SchedulerConfig
    layout: CacheLayout
    num_blocks: int
    block_size: int
    vocab_size: int
    times: StepTimes
    faults: FaultRates
    overlaps: bool
    """Plan step n + 1 before step n is applied, without tokens that are being drawn unless
    `config.async_scheduling`."""
    has_connector: bool
    num_host_slots: int
    """Of the offload tier, which is the connector then; 0 for a pretended one."""
    speculation: Literal["none", "ngram", "wild", "runner"]
    """Who guesses: nobody, the n-gram index, chance, or the runner."""
    num_drafts_max: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A request and what becomes of it from outside."""

    time_s: float
    request: EngineRequest
    abort_after_steps: int | None
    """Cancelled so many steps after it came; None for never."""
    aborts_in_flight: bool
    """Cancelled between `schedule` and `apply` rather than between steps."""
    is_impossible: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """A setting and its arrivals in order of time."""

    seed: int
    setting: Setting
    arrivals: list[Arrival]


def make_workload(seed: int) -> Workload:
    """The workload of a seed; equal seeds give equal workloads."""
    rng = random.Random(seed)  # noqa: S311 - a simulation, not a secret
    layout = make_cache_layout(rng.choice(LAYOUTS))
    block_size = rng.choice((1, 2, 4, 4, 8))
    is_storm = rng.random() < STORM_RATE
    max_prompt, max_outputs = STORM_SIZES if is_storm else rng.choice(SIZES)
    longest = num_blocks_needed(
        max_prompt + max_outputs - 1,
        num_shared_tokens=max_prompt,
        n=1 if is_storm else rng.choice((1, 2, 3)),
        windows=layout.windows,
        block_size=block_size,
    )
    setting = _make_setting(
        rng,
        layout=layout,
        block_size=block_size,
        num_blocks=max(2, int(longest * (1.3 if is_storm else rng.choice((1.0, 1.3, 2.0, 5.0))))),
        max_model_len=max_prompt + max_outputs,
        # By the seed itself: a draw would change all workloads.
        num_host_slots=NUM_HOST_SLOTS[seed % len(NUM_HOST_SLOTS)],
        out_of_memory=OUT_OF_MEMORY_RATE if seed % 5 == 0 else 0.0,
    )
    arrivals = _make_arrivals(rng, setting=setting, max_prompt=max_prompt, max_outputs=max_outputs)
    return Workload(seed=seed, setting=setting, arrivals=arrivals)


def with_asynchrony(workload: Workload) -> Workload:
    """The same with one step of asynchrony, and every second seed without speculation, which drains it."""
    setting = workload.setting
    setting = dataclasses.replace(
        setting,
        config=replace(setting.config, async_scheduling=True),
        overlaps=True,
        speculation="none" if workload.seed % 2 else setting.speculation,
    )
    return dataclasses.replace(workload, setting=setting)


def _make_setting(
    rng: random.Random,
    *,
    layout: CacheLayout,
    block_size: int,
    num_blocks: int,
    max_model_len: int,
    num_host_slots: int,
    out_of_memory: float,
) -> Setting:
    max_num_seqs = rng.choice((1, 2, 4, 8, 8))
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max(max_num_seqs, rng.choice((1, 7, 16, 64))),
        max_model_len=max_model_len,
        step_time_target_ms=rng.choice((1.0, 4.0, 1000.0)),
        decode_stretch=rng.choice((1.0, 2.0, 100.0)),
        max_num_queued_reqs=rng.choice((3, 100, 100, 100)),
        enable_prefix_caching=rng.random() < 0.8,
        max_preemptions=rng.choice((0, 1, 3, 3)),
        policy=rng.choice(("fcfs", "priority", "fair")),
    )
    has_faults = rng.random() < 0.3
    return Setting(
        config=config,
        layout=layout,
        num_blocks=num_blocks,
        block_size=block_size,
        vocab_size=rng.choice((2, 3, 8, 24)),
        times=StepTimes(draft_s=rng.choice((0.0, 0.0, 0.0002))),
        faults=FaultRates(
            numerical_error=0.01 if has_faults else 0.0,
            step_error=0.005 if has_faults else 0.0,
            out_of_memory=out_of_memory,
        ),
        overlaps=rng.random() < 0.3,
        num_host_slots=num_host_slots,
        has_connector=config.enable_prefix_caching and rng.random() < 0.3,
        speculation=rng.choice(("none", "ngram", "wild", "runner")),
        num_drafts_max=rng.choice((1, 3, 9)),
    )


def _make_arrivals(
    rng: random.Random, *, setting: Setting, max_prompt: int, max_outputs: int
) -> list[Arrival]:
    prefixes = [
        [rng.randrange(setting.vocab_size) for _ in range(rng.randint(0, max_prompt))] for _ in range(3)
    ]
    is_burst = rng.random() < 0.5
    time_s = 0.0
    arrivals = []
    for idx in range(rng.randint(4, 16)):
        if not is_burst:
            time_s += rng.expovariate(1 / 0.01)
        prompt = list(rng.choice(prefixes))
        prompt += [rng.randrange(setting.vocab_size) for _ in range(rng.randint(1, max_prompt))]
        is_impossible = rng.random() < IMPOSSIBLE_RATE
        request = _make_request(
            rng,
            idx=idx,
            prompt=prompt[:max_prompt],
            max_tokens=10 * setting.config.max_model_len if is_impossible else rng.randint(1, max_outputs),
            vocab_size=setting.vocab_size,
        )
        if not is_impossible and rng.random() < POOLING_RATE:
            request = _pooled(request, kind=rng.choice(("mean", "last")))
        arrivals.append(_make_arrival(rng, time_s=time_s, request=request, is_impossible=is_impossible))
    return arrivals


def _make_arrival(
    rng: random.Random, *, time_s: float, request: EngineRequest, is_impossible: bool
) -> Arrival:
    return Arrival(
        time_s=time_s,
        request=request,
        abort_after_steps=rng.randint(0, 12) if rng.random() < 0.2 else None,
        aborts_in_flight=rng.random() < 0.5,
        is_impossible=is_impossible,
    )


def _make_request(
    rng: random.Random, *, idx: int, prompt: list[int], max_tokens: int, vocab_size: int
) -> EngineRequest:
    n = rng.choice((1, 1, 1, 2, 3))
    width = n + rng.randrange(3)
    is_search = rng.random() < SEARCH_RATE and vocab_size >= CANDIDATES_PER_BEAM * width
    params = SamplingParams(
        n=n,
        use_beam_search=is_search,
        best_of=width if is_search else None,
        seed=rng.getrandbits(63) if rng.random() < 0.9 else None,
        max_tokens=max_tokens,
        min_tokens=0 if is_search else rng.choice((0, 0, min(2, max_tokens))),
        ignore_eos=rng.random() < 0.7,
        stop_token_ids=rng.choice(((), (), (), (1,))),
    )
    return EngineRequest(
        request_id=RequestId(f"r{idx}"),
        prompt_token_ids=prompt,
        params=params,
        eos_token_ids=(EOS,),
        priority=rng.choice(list(Priority)),
        tenant_id=TenantId(rng.choice(("a", "b"))),
        cache_salt=rng.choice(("", "", "s")),
    )


def _pooled(request: EngineRequest, *, kind: str) -> EngineRequest:
    return replace(request, params=SamplingParams(max_tokens=0), pooling=Pooling(kind))
