"""The engine alone: no server, no text, no other process; prompts of random ids, every step timed.

`EngineCore.step` is called in a row by this thread. A step that computes prompt tokens is *prefill*, one that
only gives each running answer its next token is *decode*; each kind has its own figures. What a step takes
beside the model (schedule, apply) is the difference between its wall time and the time that the runner tells.
"""

import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Final

import msgspec
from rich.table import Table

from penstock.bench.compare.figures import quantile
from penstock.bench.machine import environment
from penstock.bench.machine_limits import MachineLimits
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineInfo, EngineRequest, StepStats
from penstock.engine.core import EngineCore

MAX_STEPS: Final = 1_000_000
SPECIAL_SHARE: Final = 10
"""The last tenth of the vocabulary, where special tokens are, is left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineSizes:
    """What is run."""

    prompt_tokens: int
    output_tokens: int
    batch_sizes: tuple[int, ...]
    rounds: int
    seed: int


@dataclass(slots=True)
class _Seen:
    """Seconds and tokens of one kind of step."""

    walls_s: list[float] = field(default_factory=list)
    hosts_s: list[float] = field(default_factory=list)
    num_tokens: int = 0

    def add(self, wall_s: float, stats: StepStats, *, num_tokens: int) -> None:
        self.walls_s.append(wall_s)
        self.hosts_s.append(stats.host_time_s)
        self.num_tokens += num_tokens


def run_offline(
    core: EngineCore, sizes: OfflineSizes, *, tell: Callable[[str], None]
) -> Iterator[dict[str, float]]:
    """One row for each batch size and round, each when it is measured, after a batch that is not counted.

    Args:
        core: a warm engine with nothing to do.
        sizes: what to run.
        tell: shows a line for each row.
    """
    rng = random.Random(sizes.seed)  # noqa: S311 - workload, no secret
    _run_batch(core, _requests(core.info, sizes, rng, batch_size=1, tag="warm"))
    for round_idx in range(sizes.rounds):
        for batch_size in sizes.batch_sizes:
            requests = _requests(
                core.info, sizes, rng, batch_size=batch_size, tag=f"{round_idx}-{batch_size}"
            )
            prefill, decode = _run_batch(core, requests)
            row = {"round": float(round_idx + 1), "batch_size": float(batch_size)}
            row |= _figures(prefill, decode, batch_size=batch_size, info=core.info)
            tell(
                f"round {round_idx + 1}, batch {batch_size}: prefill {row['prefill_tokens_per_s']:.0f}, "
                f"decode {row['decode_tokens_per_s']:.1f} tokens/s"
            )
            yield row


def _requests(
    info: EngineInfo, sizes: OfflineSizes, rng: random.Random, *, batch_size: int, tag: str
) -> list[EngineRequest]:
    high = info.vocab_size - info.vocab_size // SPECIAL_SHARE
    return [
        EngineRequest(
            request_id=RequestId(f"{tag}-{number}"),
            prompt_token_ids=[rng.randrange(high) for _ in range(sizes.prompt_tokens)],
            params=SamplingParams(temperature=0.0, max_tokens=sizes.output_tokens, ignore_eos=True),
        )
        for number in range(batch_size)
    ]


def _run_batch(core: EngineCore, requests: Sequence[EngineRequest]) -> tuple[_Seen, _Seen]:
    for request in requests:
        core.add(request)
    prefill, decode = _Seen(), _Seen()
    waited_s = 0.0
    for step_s, stats in _steps(core):
        wall_s, waited_s = waited_s + step_s, 0.0
        if not stats.num_seqs:  # with asynchrony: the first step has only been launched
            waited_s = wall_s
        elif stats.num_prompt_tokens:
            prefill.add(wall_s, stats, num_tokens=stats.num_prompt_tokens)
        else:
            decode.add(wall_s, stats, num_tokens=stats.num_generated_tokens)
    return prefill, decode


def _steps(core: EngineCore) -> Iterator[tuple[float, StepStats]]:
    for _ in range(MAX_STEPS):
        if not core.has_work:
            return
        began_s = time.perf_counter()
        output = core.step()
        yield time.perf_counter() - began_s, output.stats
    raise AssertionError(f"the engine had work after {MAX_STEPS} steps")


def _figures(prefill: _Seen, decode: _Seen, *, batch_size: int, info: EngineInfo) -> dict[str, float]:
    """Rates over all steps of a kind, and quantiles of the single ones."""
    prefill_s, decode_s = sum(prefill.walls_s), sum(decode.walls_s)
    found: dict[str, float | None] = {
        "prefill_s": prefill_s,
        "prefill_tokens_per_s": prefill.num_tokens / prefill_s if prefill_s else None,
        "decode_tokens_per_s": decode.num_tokens / decode_s if decode_s else None,
        "total_tokens_per_s": (decode.num_tokens + batch_size) / (prefill_s + decode_s),
        "decode_steps": float(len(decode.walls_s)),
        "step_p50_ms": _ms(decode.walls_s, 0.5),
        "step_p90_ms": _ms(decode.walls_s, 0.9),
        "step_p99_ms": _ms(decode.walls_s, 0.99),
        "step_outside_model_p50_ms": _ms(decode.hosts_s, 0.5),
        "weights_gb_per_s": info.weights_bytes * len(decode.walls_s) / decode_s / 1e9 if decode_s else None,
    }
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def _ms(values_s: Sequence[float], q: float) -> float | None:
    value = quantile(values_s, q)
    return None if value is None else value * 1e3


def medians(rows: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """The median of the rounds, one row for each batch size, in their order."""
    batch_sizes = dict.fromkeys(row["batch_size"] for row in rows)
    return [
        {
            name: statistics.median(row[name] for row in rows if row["batch_size"] == size and name in row)
            for name in next(row for row in rows if row["batch_size"] == size)
            if name != "round"
        }
        for size in batch_sizes
    ]


def offline_record(
    rows: Sequence[dict[str, float]],
    *,
    sizes: OfflineSizes,
    info: EngineInfo,
    limits: MachineLimits | None,
    model: str,
    command: str,
) -> dict[str, object]:
    """Everything about the run, for the JSON."""
    return {
        "benchmark": "offline",
        "command": command,
        "environment": environment(packages=("penstock", "torch", "numpy")),
        "model": model,
        "engine": msgspec.structs.asdict(info),
        "limits": None if limits is None else limits.record(),
        "sizes": asdict(sizes),
        "rounds": list(rows),
        "medians": medians(rows),
    }


COLUMNS: Final[dict[str, str]] = {
    "batch_size": "batch",
    "prefill_tokens_per_s": "prefill tokens/s",
    "decode_tokens_per_s": "decode tokens/s",
    "step_p50_ms": "step p50 ms",
    "step_p99_ms": "step p99 ms",
    "step_outside_model_p50_ms": "of it outside the model ms",
    "weights_gb_per_s": "weights GB/s",
}


def offline_table(
    rows: Sequence[dict[str, float]], *, info: EngineInfo, limits: MachineLimits | None
) -> Table:
    """The medians; with limits, also the share of the read bandwidth that reading the weights takes."""
    title = f"{info.architecture}, {info.dtype}, kernels {info.kernels}: medians of the rounds"
    table = Table(title=title, title_justify="left")
    for column in (*COLUMNS.values(), *([] if limits is None else ["of bandwidth"])):
        table.add_column(column, justify="right")
    for row in medians(rows):
        cells = [f"{row[name]:.4g}" if name in row else "-" for name in COLUMNS]
        if limits is not None:
            cells.append(f"{row.get('weights_gb_per_s', 0.0) / limits.read_gb_per_s:.0%}")
        table.add_row(*cells)
    return table
