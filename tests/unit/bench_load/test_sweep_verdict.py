"""A sweep: where it ends, what it calls saturated, and how each point is loaded."""

import io
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

from penstock.bench.arrivals import Arrivals
from penstock.bench.client import Failure
from penstock.bench.lengths import constant
from penstock.bench.measure import Summary, summarize
from penstock.bench.recipe import Recipe
from penstock.bench.serve import ServeOptions, prepare
from penstock.bench.slo import parse_slos
from penstock.bench.sweep import (
    Sweep,
    SweepPlan,
    SweepPoint,
    gain,
    point_recipe,
    print_sweep,
    reason_to_end,
    run_sweep,
    sweep_record,
    verdict,
    verdict_lines,
)
from penstock.core.errors import InvalidParameterError
from tests.unit.bench_load.scripted_server import ScriptedServer, broken_stream, good_answer, scripted, stream
from tests.unit.bench_load.test_figures import make_record, make_result

PLAN = SweepPlan(loads=(1, 2, 4, 8))
QUIET = Console(file=io.StringIO())


def _summary(speed: float, *, num_good: int = 10, slos: tuple[str, ...] = (), **changes: Any) -> Summary:
    records = [make_record(i, pieces_s=[0.1, 0.2]) for i in range(10)]
    made = summarize(make_result(*records), slos=parse_slos(slos))
    return replace(made, output_throughput=speed, num_good=num_good, **changes)


def _points(*speeds: float, **options: Any) -> list[SweepPoint]:
    return [
        SweepPoint(load=load, summary=_summary(speed, **options))
        for load, speed in zip(PLAN.loads, speeds, strict=False)
    ]


def test_gain_is_the_share_of_added_load_that_became_throughput() -> None:
    first, second, third = _points(100, 150, 150)
    assert gain(first, second) == pytest.approx(0.5)
    assert gain(second, third) == pytest.approx(0.0)
    assert gain(first, SweepPoint(load=1.5, summary=_summary(150))) == pytest.approx(1.0)


def test_saturation_is_the_last_load_that_gained() -> None:
    found = verdict(_points(100, 190, 195, 196), plan=PLAN)
    assert (found.saturation, found.reason) == (2, "saturated")
    assert "saturated at 2 users" in verdict_lines(found)[0]


def test_a_server_that_keeps_up_is_not_saturated() -> None:
    found = verdict(_points(100, 200, 390, 700), plan=PLAN)
    assert (found.saturation, found.reason) == (None, "last_load")
    assert verdict_lines(found) == ["not saturated by 8 users"]


def test_objectives_end_the_climb_and_saturation_is_still_found() -> None:
    points = _points(100, 190, 195, slos=("ttft:500",))
    points[2] = SweepPoint(load=4, summary=_summary(195, num_good=3, slos=("ttft:500",)))
    found = verdict(points, plan=PLAN)
    assert (found.reason, found.slo_limit, found.saturation) == ("slo_broken", 2, 2)


def test_the_limit_of_objectives_is_below_the_first_load_that_broke_them() -> None:
    points = _points(100, 190, 380, slos=("ttft:500",))
    points[1] = SweepPoint(load=2, summary=_summary(190, num_good=3, slos=("ttft:500",)))
    assert verdict(points, plan=PLAN).slo_limit == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"status": "server_died"}, "server_died"),
        ({"status": "interrupted"}, "interrupted"),
        ({"error_rate": 0.2}, "errors"),
        ({"error_rate": 0.05}, None),
    ],
)
def test_other_reasons_to_end(changes: dict[str, Any], reason: str | None) -> None:
    points = [SweepPoint(load=1, summary=_summary(100, **changes))]
    assert reason_to_end(points, plan=PLAN) == reason


def test_cancelled_requests_are_not_bad_ones() -> None:
    records = [make_record(0, pieces_s=[0.1]), make_record(1, pieces_s=[], failure=Failure(kind="cancelled", message=""))]  # fmt: skip
    summary = summarize(make_result(*records), slos=parse_slos(["ttft:500"]))
    assert SweepPoint(load=1, summary=summary).good_share == 1.0


def test_points_of_users_are_closed_loops_of_some_rounds_with_their_own_seed() -> None:
    recipe = Recipe(seed=5, num_requests=3)
    made = [point_recipe(recipe, plan=PLAN, index=index) for index in range(4)]
    assert [r.max_concurrency for r in made] == [1, 2, 4, 8]
    assert [r.num_requests for r in made] == [16, 16, 16, 32]
    assert [r.seed for r in made] == [5, 6, 7, 8]
    assert all(r.arrivals.is_all_at_once for r in made)


def test_points_of_a_rate_are_open_loops_of_twenty_seconds() -> None:
    plan = SweepPlan(over="rate", loads=(0.5, 2.5))
    recipe = Recipe(arrivals=Arrivals(request_rate=1, kind="gamma", burstiness=0.5))
    made = [point_recipe(recipe, plan=plan, index=index) for index in range(2)]
    assert [r.arrivals.request_rate for r in made] == [0.5, 2.5]
    assert [r.num_requests for r in made] == [16, 50]
    assert all(r.arrivals.burstiness == 0.5 for r in made)
    assert point_recipe(recipe, plan=replace(plan, num_requests=7), index=1).num_requests == 7


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loads": ()}, "loads is"),
        ({"loads": (2, 1)}, "rising"),
        ({"loads": (0, 1)}, "above 0"),
        ({"loads": (1.5, 2)}, "whole numbers"),
        ({"loads": (1, 5000)}, "up to 4096"),
        ({"loads": tuple(range(1, 40))}, "1 to 32"),
        ({"min_gain": 0}, "min_gain is 0"),
        ({"min_good": 1.5}, "min_good 1.5"),
    ],
)
def test_a_wrong_plan_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        SweepPlan(**options)


async def _sweep(server: ScriptedServer, *, plan: SweepPlan) -> tuple[Sweep, dict[str, Any]]:
    recipe = Recipe(input_lens=constant(20), output_lens=constant(2))
    options = ServeOptions(target=server.target(), recipe=recipe)
    prepared = await prepare(options)
    server.bodies.clear()
    found = await run_sweep(options, plan=plan, prepared=prepared, console=QUIET, is_shown=False)
    return found, sweep_record(found, options=options, prepared=prepared, metadata={})


async def test_a_sweep_measures_each_load_with_prompts_of_its_own() -> None:
    plan = SweepPlan(loads=(1, 2), num_requests=5, num_beyond=5)
    async with scripted() as server:
        found, kept = await _sweep(server, plan=plan)
    assert [point.load for point in found.points] == [1, 2]
    assert len({tuple(body["prompt"]) for body in server.bodies}) == 10
    assert [point["load"] for point in kept["points"]] == [1, 2]
    assert kept["points"][0]["results"]["completed"] == 5
    assert kept["sweep"]["over"] == "concurrency"


async def test_a_sweep_ends_when_the_server_dies_and_keeps_its_points(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.bench.load.ALIVE_DELAYS_S", (0.0,))
    server = ScriptedServer()

    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) > 12:
            assert server.runner is not None
            for site in list(server.runner.sites):
                await site.stop()
            return await broken_stream(request, [])
        return await stream(request, good_answer(body["max_tokens"], num_prompt_tokens=20))

    async with scripted(server):
        server.handler = None
        recipe = Recipe(input_lens=constant(20), output_lens=constant(2))
        options = ServeOptions(target=server.target(), recipe=recipe)
        prepared = await prepare(options)
        server.handler = handler
        server.bodies.clear()
        plan = SweepPlan(loads=(1, 2, 4), num_requests=8, num_beyond=5)
        found = await run_sweep(options, plan=plan, prepared=prepared, console=QUIET, is_shown=False)
    assert found.reason == "server_died"
    assert [point.load for point in found.points] == [1, 2]
    assert found.points[0].summary.num_ok == 8
    assert "ended early (server_died)" in verdict_lines(found)[-1]


def test_the_table_fits_a_narrow_terminal_and_marks_saturation() -> None:
    screen = io.StringIO()
    found = verdict(_points(100, 190, 195, 196, slos=("ttft:500",)), plan=PLAN)
    print_sweep(Console(file=screen, width=80), sweep=found, title="t", notes=["a note"])
    shown = screen.getvalue()
    assert "2 *" in shown
    assert "…" not in shown
    assert "note: a note" in shown
    assert "ttft:500 kept by 90% of requests up to 8 users" in shown
