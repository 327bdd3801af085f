"""Runs the rungs one after another, each with the same requests, and counts.

A rung that cannot start or dies leaves a line and an empty row; the rest goes on, and every row is given out
as soon as it is there.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from penstock.bench.compare.contender import ServedContender
from penstock.bench.compare.figures import Observation, figures
from penstock.bench.compare.scenarios import Draw, Scenario
from penstock.bench.compare.server_process import hear_sigterm
from penstock.bench.ladder.gauges import COMPUTED, Gauges, read_metrics
from penstock.bench.ladder.rungs import Rung
from penstock.bench.machine_limits import MachineLimits
from penstock.bench.model_cost import ModelCost
from penstock.bench.target import TargetError
from penstock.bench.workload import from_lists

SECONDS_PER_HOUR: Final = 3600
MILLION: Final = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Crowd:
    """Who asks what: users in a closed loop, with a common beginning of their prompts."""

    num_users: int
    requests_per_user: int
    shared_tokens: int
    """Common beginning: a system prompt."""
    prompt_low: int
    prompt_high: int
    """Each prompt's own part."""
    output_low: int
    output_high: int

    @property
    def longest(self) -> int:
        """Most tokens of a request."""
        return self.shared_tokens + self.prompt_high + self.output_high


def make_load(crowd: Crowd, *, draw: Draw) -> Scenario:
    """The requests: the same for every rung."""
    rng = random.Random(f"ladder-{draw.seed}")  # noqa: S311 - workload, no secret
    shared = draw.ids(rng, crowd.shared_tokens)
    count = crowd.num_users * crowd.requests_per_user
    prompts = [shared + draw.ids(rng, rng.randint(crowd.prompt_low, crowd.prompt_high)) for _ in range(count)]
    lengths = [rng.randint(crowd.output_low, crowd.output_high) for _ in range(count)]
    load = from_lists(prompts, output_lens=lengths, max_concurrency=crowd.num_users)
    return Scenario(name="ladder", load=load)


def make_warmup(*, draw: Draw) -> Scenario:
    """One short request of other ids."""
    rng = random.Random(f"ladder-warmup-{draw.seed}")  # noqa: S311 - workload, no secret
    return Scenario(name="warmup", load=from_lists([draw.ids(rng, 32)], output_lens=[4]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What a rung showed."""

    rung: Rung
    facts: dict[str, str]
    error: str | None = None
    figures: dict[str, float] | None = None

    def record(self) -> dict[str, object]:
        """For the JSON."""
        return {
            "name": self.rung.name,
            "idea": self.rung.idea,
            "claim": self.rung.claim,
            "facts": self.facts,
            "error": self.error,
            "figures": self.figures,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Yardstick:
    """What figures are made with."""

    cost: ModelCost
    limits: MachineLimits
    price_per_hour: float
    """Of the machine, in any currency."""


class Climb:
    """One run up the ladder.

    Args:
        rungs: from the lowest.
        make: makes a rung's server.
        load: the requests.
        warmup: asked first, not counted.
        yardstick: for utilisation and cost.
        tell: shows a line.
        keep: given all rows after each rung.
    """

    def __init__(
        self,
        rungs: Sequence[Rung],
        *,
        make: Callable[[Rung], ServedContender],
        load: Scenario,
        warmup: Scenario,
        yardstick: Yardstick,
        tell: Callable[[str], None],
        keep: Callable[[Sequence[Row]], None],
    ) -> None:
        self._rungs = rungs
        self._make = make
        self._load = load
        self._warmup = warmup
        self._yardstick = yardstick
        self._tell = tell
        self._keep = keep

    def run(self) -> list[Row]:
        """All rungs; a row for each, with an error where it failed."""
        hear_sigterm()
        rows: list[Row] = []
        for rung in self._rungs:
            rows.append(self._stand(rung))
            rows = with_speedups(rows)
            self._tell(headline(rows[-1]))
            self._keep(rows)
        return rows

    def _stand(self, rung: Rung) -> Row:
        contender = self._make(rung)
        try:
            start_s = contender.start()
            contender.ask(self._warmup)
            with Gauges(lambda: read_metrics(contender.url)) as gauges:
                seen = contender.ask(self._load)
        except TargetError as error:
            return Row(rung=rung, facts=contender.facts, error=error.message)
        finally:
            contender.stop()
        if seen.num_failed:
            told = f"{seen.num_failed} requests failed: {seen.first_failure}"
            return Row(rung=rung, facts=contender.facts, error=told)
        found = row_figures(rung, seen, scenario=self._load, gauges=gauges, yardstick=self._yardstick)
        return Row(rung=rung, facts=contender.facts, figures=found | {"start_s": round(start_s or 0.0, 3)})


def row_figures(
    rung: Rung, seen: Observation, *, scenario: Scenario, gauges: Gauges, yardstick: Yardstick
) -> dict[str, float]:
    """The columns of a row."""
    found = figures(scenario, seen)
    tokens_per_s = found["output_tokens_per_s"]
    limits = yardstick.limits
    peak_flops = (limits.bf16_tflops if rung.peak == "bf16" else limits.int8_tops) * 1e12
    flops = yardstick.cost.flops(num_computed=gauges.grown(COMPUTED), num_generated=found["output_tokens"])
    more: dict[str, float | None] = {
        "users_held": gauges.most_running,
        "requests_per_s": len(seen.records) / seen.duration_s,
        "compute_utilisation": flops / seen.duration_s / peak_flops,
        "kv_efficiency": gauges.kv_efficiency,
        "cost_per_million_tokens": yardstick.price_per_hour / SECONDS_PER_HOUR / tokens_per_s * MILLION,
    }
    return found | {name: round(value, 4) for name, value in more.items() if value is not None}


def with_speedups(rows: Sequence[Row]) -> list[Row]:
    """Each row's throughput over that of the lowest rung that ran."""
    first = next((row.figures["output_tokens_per_s"] for row in rows if row.figures), None)
    if first is None:
        return list(rows)
    return [
        row
        if row.figures is None
        else replace(
            row,
            figures=row.figures | {"speedup": round(row.figures["output_tokens_per_s"] / first, 3)},
        )
        for row in rows
    ]


def headline(row: Row) -> str:
    """A line for the person who waits."""
    if row.figures is None:
        return f"{row.rung.name} is out: {row.error}"
    found = row.figures
    return (
        f"{row.rung.name}: {found['output_tokens_per_s']:.1f} tokens/s ({found['speedup']:.1f}x), "
        f"{found['users_held']:.0f} users at once, E2EL p50 {found['e2el_p50_ms'] / 1e3:.1f} s"
    )
