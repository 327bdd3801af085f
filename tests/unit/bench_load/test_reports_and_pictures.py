"""What is shown and kept: the table, the JSON, the progress, the pictures."""

import io
import json
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from penstock.bench import machine, plots
from penstock.bench.client import Failure
from penstock.bench.load import Counters, LoadResult
from penstock.bench.measure import summarize
from penstock.bench.progress import live, words
from penstock.bench.report import (
    print_summary,
    record_of,
    result_name,
    rounded,
    summary_fields,
    told_ms,
    write_json,
)
from penstock.bench.slo import parse_slos
from penstock.bench.sweep import SweepPlan, SweepPoint, verdict
from penstock.bench.target import Target
from penstock.core.errors import StartupError
from tests.unit.bench_load.test_figures import make_record, make_result

FAILED = Failure(kind="http_429", message="[bold]full[/] of \x1b tricks")


def _result(**options: Any) -> LoadResult:
    good = [
        make_record(i, start_s=i * 0.1, pieces_s=[i * 0.1 + 0.05 * k for k in range(1, 9)]) for i in range(20)
    ]
    return make_result(*good, make_record(20, pieces_s=[], failure=FAILED), **options)


def _shown(result: LoadResult, **options: Any) -> str:
    screen = io.StringIO()
    summary = summarize(result, slos=parse_slos(["ttft:100"]))
    print_summary(Console(file=screen, width=100), summary=summary, title="the title", **options)
    return screen.getvalue()


def test_the_report_has_every_figure_once() -> None:
    shown = _shown(_result(), notes=["something"])
    assert "20 of 21 answered well, error rate 4.8%" in shown
    assert "goodput" in shown
    for name in ("TTFT", "TPOT", "ITL", "E2EL", "p50", "p90", "p99", "0.40 s CPU, 10% of a core"):
        assert shown.count(name) >= 1, name
    assert "1 x http_429: [bold]full[/]" in shown, "a server's words are not markup"
    assert "note: something" in shown


def test_an_unfinished_run_says_so_first() -> None:
    shown = _shown(_result(status="server_died", detail="nobody listens"))
    assert shown.splitlines()[1].startswith("NOT COMPLETE (server_died: nobody listens): 21 of 21")


def test_the_record_is_plain_json_without_the_key(tmp_path: Path) -> None:
    result = _result()
    target = Target(base_url="http://h", model="m", api_key="very-secret")
    kept = record_of(
        "serve", target=target, workload={"a": 1}, summary=summarize(result), server={}, requests=result
    )
    path = tmp_path / "deep" / "r.json"
    write_json(kept, path=path)
    text = path.read_text()
    assert "very-secret" not in text
    read = json.loads(text)
    assert len(read["requests"]) == 21
    assert read["requests"][20]["failure"]["kind"] == "http_429"
    assert read["results"]["ttft_ms"]["p50"] == pytest.approx(50, abs=1)


def test_the_names_in_the_json_do_not_change() -> None:
    """People's scripts read them."""
    fields = summary_fields(summarize(_result()))
    assert set(fields) == {
        "status", "detail", "duration_s", "num_prompts", "num_sent", "completed", "failures", "first_failures",
        "error_rate", "total_input_tokens", "cached_input_tokens", "total_output_tokens", "tokens_per_piece",
        "answers_without_usage", "request_throughput", "output_throughput", "total_token_throughput",
        "request_goodput", "goodput_slos", "num_good", "max_concurrent_requests", "num_held", "ttft_ms", "tpot_ms",
        "itl_ms", "e2el_ms", "client",
    }  # fmt: skip
    assert set(fields["ttft_ms"]) == {"num", "mean", "std", "min", "p50", "p90", "p99", "max"}  # type: ignore[call-overload]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match="cannot be written"):
        write_json({}, path=tmp_path / "file" / "r.json")


def test_file_names_hold_no_path() -> None:
    name = result_name("serve", model="org/some model", label=None)
    assert name.startswith("serve-some-model-")
    assert "/" not in result_name("serve", model="m", label="../../etc")


@pytest.mark.parametrize(
    ("value", "text"), [(0.1234, "0.123"), (9.876, "9.88"), (12.34, "12.3"), (1234.5, "1234")]
)
def test_milliseconds_are_told_to_three_digits(value: float, text: str) -> None:
    assert told_ms(value) == text
    assert rounded(1 / 3) == 0.333333


def test_progress_tells_where_it_stands() -> None:
    counters = Counters(
        num_requests=9, elapsed_s=2.0, num_sent=5, num_done=3, num_failed=1, num_pieces=100, last_ttft_s=0.25
    )
    assert words(counters) == "2 s, 2 in flight, 50 tokens/s, last TTFT 250 ms, 1 failed"


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress_draws_in_a_terminal_and_writes_lines_elsewhere(is_terminal: bool) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=is_terminal, width=100)
    with live(console, title="load") as watcher:
        assert watcher is not None
        for second in range(25):
            watcher.tick(Counters(num_requests=100, elapsed_s=float(second), num_sent=4, num_done=second))
    shown = screen.getvalue()
    assert ("12/100" in shown) == is_terminal
    assert ("load 20/100" in shown) != is_terminal


def test_progress_can_be_off() -> None:
    with live(Console(), title="load", is_shown=False) as watcher:
        assert watcher is None


needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="the bench extra is not installed"
)


@needs_matplotlib
@pytest.mark.parametrize(
    "result",
    [
        _result(),
        make_result(make_record(0, pieces_s=[0.5])),
        make_result(make_record(0, pieces_s=[], failure=FAILED)),
        make_result(duration_s=0.0),
        make_result(
            *(make_record(i, pieces_s=[0.001 * (1 + i**4), 9.0 + i]) for i in range(9)), duration_s=20.0
        ),
    ],
    ids=["usual", "one text", "only failures", "nothing", "far apart"],
)
def test_every_run_can_be_drawn(tmp_path: Path, result: LoadResult) -> None:
    picture = plots.draw_run(result, title="t", subtitle="s")
    plots.save_figure(picture, path=tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert [panel.get_title(loc="left") for panel in picture.panels] == [
        "Latency",
        "ITL: gaps between texts",
        "Over time",
        "TTFT over time",
    ]


@needs_matplotlib
def test_the_drawn_curve_is_the_data() -> None:
    picture = plots.draw_run(_result(), title="t", subtitle="s")
    line = picture.panels[0].get_lines()[0]
    assert list(line.get_xdata()) == pytest.approx([50.0] * 20)
    assert list(line.get_ydata())[-1] == 100


@needs_matplotlib
@pytest.mark.parametrize("num_points", [1, 4])
def test_every_sweep_can_be_drawn(tmp_path: Path, num_points: int) -> None:
    summary = summarize(_result(), slos=parse_slos(["ttft:100"]))
    points = [SweepPoint(load=2**i, summary=summary) for i in range(num_points)]
    plan = SweepPlan(loads=(1, 2, 4, 8))
    plots.save_figure(plots.draw_sweep(verdict(points, plan=plan), subtitle="s"), path=tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000


def test_without_matplotlib_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "find_spec", lambda _name: None)
    with pytest.raises(StartupError, match=r"plot needs matplotlib.*pip install 'penstock\[bench\]'"):
        plots.require_matplotlib()


def test_facts_of_the_machine_are_there() -> None:
    facts = machine.environment()
    assert facts["cores"]
    assert facts["python"] == ".".join(map(str, sys.version_info[:3]))
    assert machine.package_version("no-such-package-here") is None


def test_a_tree_without_git_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() is None
    monkeypatch.setattr(machine, "Path", lambda _path: SimpleNamespace(read_text=_missing))
    assert isinstance(machine.cpu_name(), str)


def _missing(**_options: object) -> str:
    raise FileNotFoundError
