"""Pictures of a run and of a sweep, by matplotlib, which is imported when one is drawn and only then.

`new_figure` and `save_figure` give every benchmark's picture the same look. Without the library
`require_matplotlib` says what to install; commands call it before they measure.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.bench.client import RequestRecord
from penstock.bench.load import LoadResult
from penstock.bench.measure import Metric, metric_values_s
from penstock.bench.sweep import Sweep, middle_and_tail, middle_and_tail_ms
from penstock.core.errors import StartupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
INK: Final = "#333333"
DPI: Final = 130
PANEL_INCHES: Final = (6.2, 3.6)
MAX_BINS: Final = 120
LOG_SPREAD: Final = 20.0
"""A p99 this many times the median is drawn on a logarithmic axis: else the middle is a line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure with its panels in reading order."""

    figure: "Figure"
    panels: "tuple[Axes, ...]"


def require_matplotlib() -> None:
    """Refuse before anything is measured if no picture could be drawn.

    Raises:
        StartupError: the library is not installed.
    """
    if find_spec("matplotlib") is None:
        raise StartupError(
            "plot needs matplotlib, install it with: pip install 'penstock[bench]'", param="plot"
        )


def new_figure(title: str, *, subtitle: str = "", rows: int = 1, columns: int = 1) -> Picture:
    """An empty picture.

    Args:
        title: in bold at the top.
        subtitle: below it: machine, model, load.
        rows: of panels, at least 1.
        columns: of panels, at least 1.
    """
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    head_inches = 0.9
    width, height = PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows + head_inches
    below_head = (0, 0, 1, 1 - head_inches / height)
    layout = ConstrainedLayoutEngine(rect=below_head, w_pad=0.12, h_pad=0.12)
    figure = Figure(figsize=(width, height), dpi=DPI, layout=layout)
    figure.text(0.012, 1 - 0.2 / height, title, fontsize=14, fontweight="bold", color=INK, va="top")
    figure.text(0.012, 1 - 0.52 / height, subtitle, fontsize=9, color="#666666", va="top")
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        _dress(panel)
    return Picture(figure=figure, panels=tuple(panels.flat))


def _dress(panel: "Axes") -> None:
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color("#999999")
    panel.tick_params(colors=INK, labelsize=9)
    panel.grid(visible=True, color="#e6e6e6", linewidth=0.8)
    panel.set_axisbelow(True)


def label(panel: "Axes", *, title: str, x: str, y: str) -> None:
    """Name a panel and its axes, units in parentheses."""
    panel.set_title(title, fontsize=11, loc="left", color=INK)
    panel.set_xlabel(x, fontsize=9, color=INK)
    panel.set_ylabel(y, fontsize=9, color=INK)


def save_figure(picture: Picture, *, path: Path) -> None:
    """Write a PNG.

    Raises:
        StartupError: it cannot be written.
    """
    try:
        picture.figure.savefig(path, facecolor="white")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}", param="result_dir") from None


def draw_run(result: LoadResult, *, title: str, subtitle: str) -> Picture:
    """Four panels of one run: latencies as shares of requests, gaps between texts, both over time."""
    picture = new_figure(title, subtitle=subtitle, rows=2, columns=2)
    latencies, gaps, throughput, first = picture.panels
    _draw_latencies(latencies, result=result)
    _draw_gaps(gaps, result=result)
    _draw_throughput(throughput, result=result)
    _draw_first_texts(first, result=result)
    return picture


def draw_sweep(sweep: Sweep, *, subtitle: str) -> Picture:
    """Four panels of a sweep: throughput, TTFT and ITL over the load, and what a token costs in time."""
    picture = new_figure("penstock bench sweep", subtitle=subtitle, rows=2, columns=2)
    throughput, first, gaps, trade = picture.panels
    unit = "users at a time" if sweep.plan.over == "concurrency" else "requests per second offered"
    loads = [point.load for point in sweep.points]
    speeds = [point.summary.output_throughput for point in sweep.points]
    label(throughput, title="Throughput", x=unit, y="generated tokens per second")
    throughput.plot(loads, speeds, marker="o", color=COLORS[0])
    throughput.set_ylim(bottom=0)
    label(first, title="TTFT", x=unit, y="milliseconds")
    _draw_metric(first, sweep=sweep, metric="ttft")
    label(gaps, title="ITL: gaps between texts", x=unit, y="milliseconds")
    _draw_metric(gaps, sweep=sweep, metric="itl")
    for panel in (throughput, first, gaps):
        _scale_loads(panel, sweep=sweep, loads=loads)
    _draw_trade(trade, sweep=sweep)
    return picture


def _draw_metric(panel: "Axes", *, sweep: Sweep, metric: Metric) -> None:
    found = [(point.load, point.summary.metrics.get(metric)) for point in sweep.points]
    drawn = [(load, *middle_and_tail_ms(figures)) for load, figures in found if figures is not None]
    if not drawn:
        _say_none(panel)
        return
    loads, middles, tails = zip(*drawn, strict=True)
    names = next(middle_and_tail(figures) for _, figures in found if figures is not None)
    for values, name, color in zip((middles, tails), names, (COLORS[0], COLORS[3]), strict=True):
        panel.plot(loads, values, marker="o", color=color, label=f"p{name:g}")
    limit = next((slo.limit_ms for slo in sweep.points[0].summary.slos if slo.metric == metric), None)
    if limit is not None:
        panel.axhline(limit, color=COLORS[4], linewidth=1.4, linestyle="--", label=f"objective {limit:g} ms")
    if max(tails) > LOG_SPREAD * min(middles) > 0:
        _log(panel, axis="y")
    else:
        panel.set_ylim(bottom=0)
    _legend(panel)


def _scale_loads(panel: "Axes", *, sweep: Sweep, loads: Sequence[float]) -> None:
    """Loads that grow by factors stand at equal distances; the saturation point is marked."""
    if loads[-1] > 4 * loads[0]:
        _log(panel, axis="x")
        panel.minorticks_off()
    panel.set_xticks(list(loads), [f"{load:g}" for load in loads])
    if sweep.saturation is not None:
        panel.axvline(sweep.saturation, color=COLORS[1], linewidth=1.4, linestyle=":", label="saturated")
        _legend(panel)


def _draw_trade(panel: "Axes", *, sweep: Sweep) -> None:
    x_name = "tokens per second of one answer (1 / TPOT)"
    label(panel, title="Speed of one against speed of all", x=x_name, y="generated tokens per second, all")
    found = [
        (1e3 / middle_and_tail_ms(figures)[0], point.summary.output_throughput, point.load)
        for point in sweep.points
        if (figures := point.summary.metrics.get("tpot")) is not None and middle_and_tail_ms(figures)[0] > 0
    ]
    if not found:
        _say_none(panel)
        return
    one, all_of_them, _ = zip(*found, strict=True)
    panel.plot(one, all_of_them, marker="o", color=COLORS[2])
    for x, y, load in found:
        panel.annotate(f"{load:g}", (x, y), textcoords="offset points", xytext=(6, 5), fontsize=8, color=INK)
    panel.set_xlim(0, max(one) * 1.1)  # room for the loads beside the points
    panel.set_ylim(0, max(all_of_them) * 1.1)


def _draw_latencies(panel: "Axes", *, result: LoadResult) -> None:
    label(panel, title="Latency", x="milliseconds", y="share of requests (%)")
    names: tuple[tuple[Metric, str], ...] = (("ttft", "TTFT"), ("e2el", "E2EL"))
    drawn = [_ms(metric_values_s(result.records, metric=metric)) for metric, _ in names]
    for values, (_, name), color in zip(drawn, names, COLORS, strict=False):
        if len(values):
            shares = np.arange(1, len(values) + 1) / len(values) * 100
            told = f"{name}  p50 {np.median(values):.0f}  p99 {np.percentile(values, 99):.0f} ms"
            panel.step(np.sort(values), shares, where="post", color=color, label=told, linewidth=1.8)
    panel.set_ylim(0, 101)
    _scale_x(panel, values=np.concatenate(drawn))
    _legend(panel)


def _draw_gaps(panel: "Axes", *, result: LoadResult) -> None:
    label(panel, title="ITL: gaps between texts", x="milliseconds", y="gaps")
    values = _ms(metric_values_s(result.records, metric="itl"))
    if not len(values):
        _say_none(panel)
        return
    is_log = _is_spread(values)
    if is_log:
        values = np.maximum(values, 0.01)  # texts in one chunk have no gap, a logarithm needs one
        _log(panel, axis="x")
        bins = np.geomspace(values.min(), max(values.max(), values.min() * 1.01), num=_num_bins(values))
    else:
        bins = np.linspace(0, values.max() or 1.0, num=_num_bins(values))
    panel.hist(values, bins=bins.tolist(), color=COLORS[0], alpha=0.85)
    _log(panel, axis="y")
    for percentile, color in ((50, COLORS[1]), (99, COLORS[3])):
        at_ms = float(np.percentile(values, percentile))
        panel.axvline(at_ms, color=color, linewidth=1.5, label=f"p{percentile} {at_ms:.1f} ms")
    _legend(panel)


def _draw_throughput(panel: "Axes", *, result: LoadResult) -> None:
    from matplotlib.ticker import MaxNLocator

    label(panel, title="Over time", x="seconds after the start", y="texts per second")
    arrivals = np.concatenate([np.zeros(0), *(np.asarray(r.pieces_s) for r in result.records)])
    edges = _time_edges(result)
    counts, _ = np.histogram(arrivals, bins=edges)
    panel.stairs(counts / np.diff(edges), edges, color=COLORS[0], fill=True, alpha=0.75)
    panel.set_ylim(bottom=0)
    beside = panel.twinx()
    beside.spines[:].set_visible(False)
    panel.spines[["top", "right"]].set_visible(False)
    times, running = _in_flight(result.records)
    beside.step(times, running, where="post", color=COLORS[1], linewidth=1.4)
    beside.set_ylabel("requests in flight", fontsize=9, color=COLORS[1])
    beside.yaxis.set_major_locator(MaxNLocator(integer=True))
    beside.tick_params(labelsize=9, colors=COLORS[1])
    beside.set_ylim(bottom=0)


def _draw_first_texts(panel: "Axes", *, result: LoadResult) -> None:
    label(panel, title="TTFT over time", x="seconds after the start", y="TTFT (ms)")
    answered = [(r.start_s, r.ttft_s * 1e3) for r in result.records if r.is_ok and r.ttft_s is not None]
    if answered:
        times, values = zip(*answered, strict=True)
        panel.scatter(times, values, s=14, color=COLORS[0], alpha=0.7, linewidths=0)
        if _is_spread(np.asarray(values)):
            _log(panel, axis="y")
        else:
            panel.set_ylim(bottom=0)
    failed = [r.start_s for r in result.records if not r.is_ok]
    if failed:
        bottom = panel.get_ylim()[0]
        panel.scatter(
            failed, [bottom] * len(failed), marker="x", s=28, color=COLORS[1], label="failed", clip_on=False
        )
        _legend(panel)
    if not answered and not failed:
        _say_none(panel)


def _ms(values_s: Sequence[float]) -> NDArray[np.float64]:
    return np.asarray(values_s, dtype=np.float64) * 1e3


def _is_spread(values: NDArray[np.float64]) -> bool:
    middle = float(np.median(values))
    return middle > 0 and float(np.percentile(values, 99)) > LOG_SPREAD * middle


def _scale_x(panel: "Axes", *, values: NDArray[np.float64]) -> None:
    if len(values) and values.min() > 0 and values.max() > LOG_SPREAD * values.min():
        _log(panel, axis="x")
    else:
        panel.set_xlim(left=0)


def _log(panel: "Axes", *, axis: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers."""
    from matplotlib.ticker import LogLocator, NullFormatter

    scaled = panel.xaxis if axis == "x" else panel.yaxis
    panel.set_xscale("log") if axis == "x" else panel.set_yscale("log")
    scaled.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    scaled.set_major_formatter("{x:g}")
    scaled.set_minor_formatter(NullFormatter())


def _num_bins(values: NDArray[np.float64]) -> int:
    return int(np.clip(np.sqrt(len(values)) * 2, 12, MAX_BINS))


def _time_edges(result: LoadResult) -> NDArray[np.float64]:
    """Bins of the timeline: a second wide, or as many as fit the picture."""
    duration_s = max(result.duration_s, 1e-3)
    num_bins = int(np.clip(duration_s, 20, MAX_BINS))
    return np.linspace(0, duration_s, num=num_bins + 1)


def _in_flight(records: Sequence[RequestRecord]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """When the number of requests in flight changed, and what it was from then on."""
    changes = sorted([(r.sent_s, 1) for r in records] + [(r.end_s, -1) for r in records])
    times = np.asarray([0.0, *(time_s for time_s, _ in changes)])
    running = np.cumsum([0, *(change for _, change in changes)])
    return times, running


def _legend(panel: "Axes") -> None:
    if panel.get_legend_handles_labels()[0]:
        panel.legend(fontsize=9, frameon=False, labelcolor=INK)


def _say_none(panel: "Axes") -> None:
    panel.text(0.5, 0.5, "no values", transform=panel.transAxes, ha="center", color="#999999")
