"""The record of a comparison as JSON, and its tables in a terminal."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from penstock.bench.compare.comparison import Course, Standing, ratios
from penstock.bench.compare.figures import spread
from penstock.bench.machine import environment
from penstock.core.errors import StartupError

PACKAGES: Final = ("penstock", "torch", "aiohttp", "numpy")
SHOWN: Final[dict[str, tuple[str, ...]]] = {
    "single": ("ttft_p50_ms", "prefill_tokens_per_s", "decode_tokens_per_s", "of_bound"),
    "prefill": ("ttft_p50_ms", "prefill_tokens_per_s", "of_bound"),
    "mixed": ("output_tokens_per_s", "of_bound", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms"),
    "shared": ("output_tokens_per_s", "of_bound", "ttft_p50_ms", "itl_p99_ms"),
    "long": ("gap_max_ms", "gap_p50_ms", "usual_itl_p50_ms", "late_ttft_ms"),
}
SHOWN_HTTP: Final = (
    "output_tokens_per_s",
    "of_bound",
    "ttft_p50_ms",
    "itl_p50_ms",
    "itl_p99_ms",
    "e2el_p50_ms",
)


def make_record(
    standings: Sequence[Standing], *, course: Course, model: str, command: str
) -> dict[str, object]:
    """Everything about the run so far."""
    return {
        "benchmark": "compare",
        "command": command,
        "environment": environment(packages=PACKAGES),
        "model": model,
        "seed": course.draw.seed,
        "scale": course.draw.scale,
        "scenarios": list(course.scenario_names),
        "rounds_asked": course.rounds,
        "contenders": [standing.record() for standing in standings],
        "ratios": ratios(standings),
    }


def write_record(record: dict[str, object], path: Path) -> None:
    """Write it whole or not at all.

    Raises:
        StartupError: the file cannot be written.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise StartupError(f"output {path} cannot be written: {error.strerror}", param="output") from error


def print_tables(console: Console, standings: Sequence[Standing], *, course: Course) -> None:
    """One table a scenario, one for the processes, one of ratios; then who is out, and why."""
    for name in course.scenario_names:
        console.print(_scenario_table(name, standings))
    console.print(_process_table(standings))
    rows = ratios(standings)
    if rows:
        console.print(_ratio_table(rows))
    for standing in standings:
        if standing.error is not None:
            console.print(f"{standing.title} is out: {standing.error}", highlight=False, soft_wrap=True)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    return table


def _scenario_table(name: str, standings: Sequence[Standing]) -> Table:
    shown = SHOWN.get(name, SHOWN_HTTP)
    table = _table(f"{name}: median (least to most)", "engine", *shown, "rounds")
    for standing in standings:
        rounds = standing.rounds.get(name, [])
        if not rounds:
            continue
        cells = [_cell([found[figure] for found in rounds if figure in found]) for figure in shown]
        table.add_row(standing.title, *cells, str(len(rounds)))
    return table


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    of = spread(values)
    if len(values) == 1:
        return _short(of["median"])
    return f"{_short(of['median'])} ({_short(of['min'])} to {_short(of['max'])})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _process_table(standings: Sequence[Standing]) -> Table:
    table = _table("processes", "engine", "ready after s", "memory (PSS) MiB")
    for standing in standings:
        if standing.start_s is None and standing.memory_mib is None:
            continue
        start = "-" if standing.start_s is None else _short(standing.start_s)
        memory = "-" if standing.memory_mib is None else _short(standing.memory_mib)
        table.add_row(standing.title, start, memory)
    return table


def _ratio_table(rows: Sequence[dict[str, object]]) -> Table:
    table = _table(
        "how many times better ours is (median of the rounds)", "peer", "scenario", "figure", "ratio"
    )
    for row in rows:
        median, least, most = (float(str(row[key])) for key in ("median", "min", "max"))
        ratio = f"{median:.2f} ({least:.2f} to {most:.2f})" if row["rounds"] != 1 else f"{median:.2f}"
        table.add_row(f"{row['peer']} {row['precision']}", str(row["scenario"]), str(row["figure"]), ratio)
    return table
