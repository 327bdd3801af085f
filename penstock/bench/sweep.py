"""`penstock bench sweep`: one server under more and more load, until it is saturated.

A point is a measured run at one load: a number of users (closed loop) or a rate (open loop). The sweep ends
when what is added to the load no longer becomes throughput, when the objectives are broken, or when requests
fail. Each point has its own prompts, so that no cache of the server knows them from the last one.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import Final, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from penstock.bench.arrivals import Arrivals
from penstock.bench.machine import environment
from penstock.bench.measure import Distribution, Metric, Summary
from penstock.bench.recipe import Recipe
from penstock.bench.report import SCHEMA, rounded, summary_fields, told_ms
from penstock.bench.serve import Prepared, ServeOptions, measure, workload_fields
from penstock.bench.workload import MAX_REQUESTS
from penstock.core.errors import InvalidParameterError

SweepOver = Literal["concurrency", "rate"]
MAX_POINTS: Final = 32
MIN_REQUESTS: Final = 16
"""Of a point: below it a percentile says nothing."""
ROUNDS_PER_USER: Final = 4
"""Requests of each user of a closed loop: the first and last are not under full load."""
SECONDS_PER_RATE: Final = 20.0
"""Of an open loop, so that queues have time to grow where they grow."""
MAX_ERROR_RATE: Final = 0.1
"""More failed requests than this and the figures are about errors."""

EndReason = Literal["saturated", "slo_broken", "errors", "last_load", "interrupted", "server_died"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPlan:
    """Which loads, and when it is enough.

    Raises:
        InvalidParameterError: a value is out of its range.
    """

    over: SweepOver = "concurrency"
    loads: tuple[float, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    """Rising: users, or requests per second."""
    num_requests: int | None = None
    """Of each point; None takes four rounds of every user, or 20 seconds of a rate, at least 16 requests."""
    min_gain: float = 0.1
    """Share of the added load that must become throughput, in (0, 1); below it the server is saturated."""
    min_good: float = 0.9
    """Share of requests that must keep the objectives, in (0, 1]."""
    num_beyond: int = 1
    """Points that are still measured after the first reason to end, so that the picture shows the bend."""

    def __post_init__(self) -> None:
        told = ",".join(f"{load:g}" for load in self.loads)
        rising = all(math.inf > late > early > 0 for early, late in pairwise((1e-300, *self.loads)))
        if not 1 <= len(self.loads) <= MAX_POINTS or not rising:
            raise InvalidParameterError(
                f"loads is {told}, it must be 1 to {MAX_POINTS} numbers above 0 and rising", param="loads"
            )
        if self.over == "concurrency" and any(load != int(load) or load > 4096 for load in self.loads):
            raise InvalidParameterError(
                f"loads is {told}, with over concurrency it must be whole numbers up to 4096", param="loads"
            )
        if not 0 < self.min_gain < 1 or not 0 < self.min_good <= 1 or self.num_beyond < 0:
            raise InvalidParameterError(
                f"min_gain is {self.min_gain}, min_good {self.min_good}: they must be in (0, 1) and (0, 1]"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepPoint:
    """One load and what it gave."""

    load: float
    summary: Summary

    @property
    def good_share(self) -> float | None:
        """Requests that kept the objectives over those that ended; None without objectives."""
        summary = self.summary
        ended = summary.num_sent - summary.failures.get("cancelled", 0)
        return None if not summary.slos or not ended else summary.num_good / ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """All points and the verdict."""

    plan: SweepPlan
    points: tuple[SweepPoint, ...]
    reason: EndReason
    saturation: float | None
    """The last load that gained: more only queues. None if it was not reached."""
    slo_limit: float | None
    """The highest load up to which all kept the objectives; None without objectives, or if none did."""


def gain(before: SweepPoint, after: SweepPoint) -> float:
    """Share of the added load that became throughput.

    From 4 users and 100 tokens/s to 8 users and 150 tokens/s: the load doubled, throughput rose by half, so
    the gain is 0.5 / 1 = 0.5.
    """
    if before.summary.output_throughput <= 0:
        return 1.0
    more_throughput = after.summary.output_throughput / before.summary.output_throughput - 1
    return more_throughput / (after.load / before.load - 1)


def reason_to_end(points: Sequence[SweepPoint], *, plan: SweepPlan) -> EndReason | None:
    """Why the last point ends the climb, or None."""
    last = points[-1]
    if last.summary.status != "complete":
        return "server_died" if last.summary.status == "server_died" else "interrupted"
    if last.summary.error_rate > MAX_ERROR_RATE:
        return "errors"
    if last.good_share is not None and last.good_share < plan.min_good:
        return "slo_broken"
    if len(points) > 1 and _is_flat(points[-2], last, plan=plan):
        return "saturated"
    return None


def _is_flat(before: SweepPoint, after: SweepPoint, *, plan: SweepPlan) -> bool:
    """More load, hardly more throughput; a point that did not complete says nothing."""
    return after.summary.status == "complete" and gain(before, after) < plan.min_gain


def verdict(points: Sequence[SweepPoint], *, plan: SweepPlan) -> Sweep:
    """The sweep of these points: its first reason to end, and the two limits."""
    reasons = [reason_to_end(points[: count + 1], plan=plan) for count in range(len(points))]
    stopped = next((reason for reason in reasons if reason in {"interrupted", "server_died"}), None)
    first = next((reason for reason in reasons if reason is not None), None)
    bend = next((i for i in range(1, len(points)) if _is_flat(points[i - 1], points[i], plan=plan)), None)
    kept = [p.load for p in takewhile(lambda p: _keeps_slos(p, plan=plan), points)]
    return Sweep(
        plan=plan,
        points=tuple(points),
        reason=stopped or first or "last_load",
        saturation=None if bend is None else points[bend - 1].load,
        slo_limit=max(kept, default=None),
    )


def _keeps_slos(point: SweepPoint, *, plan: SweepPlan) -> bool:
    return point.good_share is not None and point.good_share >= plan.min_good


def point_recipe(recipe: Recipe, *, plan: SweepPlan, index: int) -> Recipe:
    """The recipe of one point: its load, its number of requests, its own seed."""
    load = plan.loads[index]
    at_rest = ROUNDS_PER_USER * load if plan.over == "concurrency" else SECONDS_PER_RATE * load
    num_requests = plan.num_requests or min(max(MIN_REQUESTS, round(at_rest)), MAX_REQUESTS)
    seeded = replace(recipe, num_requests=num_requests, seed=recipe.seed + index)
    if plan.over == "concurrency":
        return replace(seeded, arrivals=Arrivals(), max_concurrency=int(load))
    return replace(seeded, arrivals=replace(recipe.arrivals, request_rate=load))


async def run_sweep(
    options: ServeOptions,
    *,
    plan: SweepPlan,
    prepared: Prepared,
    console: Console,
    is_shown: bool,
    on_point: Callable[[SweepPoint], None] = lambda _point: None,
) -> Sweep:
    """Measure point after point until there is a reason to end.

    Args:
        options: of each run; the recipe's pace is set by the plan.
        plan: the loads.
        prepared: of `serve.prepare`.
        console: for the progress.
        is_shown: False shows none.
        on_point: told after each point.
    """
    points: list[SweepPoint] = []
    num_beyond = 0
    for index, load in enumerate(plan.loads):
        recipe = point_recipe(options.recipe, plan=plan, index=index)
        measured = await measure(
            replace(options, recipe=recipe),
            prepared=replace(prepared, writer=prepared.writer.with_seed(recipe.seed)),
            console=console,
            is_shown=is_shown,
            title=f"{plan.over} {load:g}",
        )
        points.append(SweepPoint(load=load, summary=measured.summary))
        on_point(points[-1])
        reason = reason_to_end(points, plan=plan)
        num_beyond += reason is not None or num_beyond > 0
        if num_beyond > plan.num_beyond or reason in {"interrupted", "server_died", "errors"}:
            break
    return verdict(points, plan=plan)


def sweep_record(
    sweep: Sweep, *, options: ServeOptions, prepared: Prepared, metadata: dict[str, str]
) -> dict[str, object]:
    """The JSON record."""
    target = prepared.target
    workload = workload_fields(options, prepared=prepared)
    for name in ("loop", "num_prompts", "request_rate", "max_concurrency"):
        del workload[name]  # each point has its own
    return {
        "schema": SCHEMA,
        "benchmark": "sweep",
        "environment": environment(),
        "server": {
            "base_url": target.base_url,
            "endpoint": target.route,
            "model": target.model,
            **prepared.server,
        },
        "workload": workload,
        "sweep": {
            "over": sweep.plan.over,
            "loads": [rounded(load) for load in sweep.plan.loads],
            "min_gain": sweep.plan.min_gain,
            "min_good": sweep.plan.min_good,
            "ended": sweep.reason,
            "saturation": sweep.saturation,
            "slo_limit": sweep.slo_limit,
        },
        "points": [
            {"load": rounded(point.load), "results": summary_fields(point.summary)} for point in sweep.points
        ],
        "notes": list(prepared.notes),
        "metadata": metadata,
    }


def print_sweep(console: Console, *, sweep: Sweep, title: str, notes: Sequence[str] = ()) -> None:
    """The table and the verdict."""
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    console.print(sweep_table(sweep))
    console.print("TTFT, ITL, E2EL: middle/tail of the percentiles asked for, in ms", style="dim")
    for line in verdict_lines(sweep):
        console.print(line, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    for point in sweep.points:
        for warning in point.summary.warnings():
            told = f"warning at {point.load:g}: {warning}"
            console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)


def sweep_table(sweep: Sweep) -> Table:
    """A row per point; times are p50/p99 in milliseconds, CPU is the client's share of a core."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    unit = "users" if sweep.plan.over == "concurrency" else "offered/s"
    for name in (unit, "done/s", "tokens/s", "TTFT", "ITL", "E2EL", "good", "fail", "CPU"):
        table.add_column(name, justify="right", no_wrap=True)
    for point in sweep.points:
        summary = point.summary
        table.add_row(
            f"{point.load:g}" + (" *" if point.load == sweep.saturation else ""),
            f"{summary.request_throughput:.2f}",
            f"{summary.output_throughput:.1f}",
            *(_middle_and_tail(summary, metric=metric) for metric in ("ttft", "itl", "e2el")),
            "" if point.good_share is None else f"{point.good_share:.0%}",
            f"{summary.error_rate:.0%}",
            f"{summary.client.cpu_share:.0%}",
        )
    return table


def _middle_and_tail(summary: Summary, *, metric: Metric) -> str:
    found = summary.metrics.get(metric)
    if found is None:
        return "none"
    return "/".join(told_ms(value) for value in middle_and_tail_ms(found))


def middle_and_tail(found: Distribution) -> tuple[float, float]:
    """Of the percentiles that were asked for: the one nearest to the median, and the highest."""
    middle = min(found.percentiles_ms, key=lambda percentile: abs(percentile - 50))
    return middle, max(found.percentiles_ms)


def middle_and_tail_ms(found: Distribution) -> tuple[float, float]:
    """The values of `middle_and_tail`."""
    middle, tail = middle_and_tail(found)
    return found.percentiles_ms[middle], found.percentiles_ms[tail]


def verdict_lines(sweep: Sweep) -> list[str]:
    """What the sweep found, in words."""
    unit = "users" if sweep.plan.over == "concurrency" else "requests/s"
    lines: list[str] = []
    if sweep.saturation is not None:
        best = max(point.summary.output_throughput for point in sweep.points)
        told = f"saturated at {sweep.saturation:g} {unit}: beyond it little is gained"
        lines.append(f"{told} (at best {best:.1f} tokens/s)")
    else:
        lines.append(f"not saturated by {sweep.points[-1].load:g} {unit}")
    if sweep.points[0].summary.slos:
        slos = " ".join(str(slo) for slo in sweep.points[0].summary.slos)
        limit = "at no load" if sweep.slo_limit is None else f"up to {sweep.slo_limit:g} {unit}"
        lines.append(f"{slos} kept by {sweep.plan.min_good:.0%} of requests {limit}")
    if sweep.reason in {"interrupted", "server_died", "errors"}:
        last = sweep.points[-1].summary
        detail = last.detail or ", ".join(f"{count} x {kind}" for kind, count in last.failures.items())
        lines.append(f"ended early ({sweep.reason}): {detail}")
    return lines
