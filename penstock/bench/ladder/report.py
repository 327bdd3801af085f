"""The ladder as record, table and picture."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from rich.table import Table

from penstock.bench.ladder.climb import Crowd, Row, Yardstick
from penstock.bench.machine import environment
from penstock.bench.plots import COLORS, INK, label, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS: Final[dict[str, str]] = {
    "users_held": "users at once",
    "requests_per_s": "requests/s",
    "output_tokens_per_s": "tokens/s",
    "speedup": "times",
    "compute_utilisation": "compute",
    "e2el_p50_ms": "E2EL p50 s",
    "e2el_p99_ms": "E2EL p99 s",
    "ttft_p50_ms": "TTFT p50 s",
    "ttft_p99_ms": "TTFT p99 s",
    "kv_efficiency": "KV used",
    "cost_per_million_tokens": "cost/M tokens",
}
SHARES: Final = frozenset({"compute_utilisation", "kv_efficiency"})


def make_record(
    rows: Sequence[Row], *, head: dict[str, object], crowd: Crowd, yardstick: Yardstick
) -> dict[str, object]:
    """Everything about the run so far; `head` says what was run."""
    return {
        "benchmark": "ladder",
        **head,
        "environment": environment(packages=("penstock", "torch", "transformers", "numpy")),
        "crowd": asdict(crowd),
        "limits": yardstick.limits.record(),
        "price_per_hour": yardstick.price_per_hour,
        "rungs": [row.record() for row in rows],
    }


def make_table(rows: Sequence[Row], *, num_users: int) -> Table:
    """One line a rung; what the literature claims is the last column."""
    table = Table(title=f"what each idea is worth, {num_users} users over HTTP", title_justify="left")
    table.add_column("rung")
    for column in (*COLUMNS.values(), "literature"):
        table.add_column(column, justify="right")
    for row in rows:
        if row.figures is not None:
            cells = [_cell(name, row.figures) for name in COLUMNS]
            table.add_row(row.rung.idea, *cells, row.rung.claim)
    return table


def _cell(name: str, found: dict[str, float]) -> str:
    value = found.get(name)
    if value is None:
        return "-"
    if name in SHARES:
        return f"{value:.0%}"
    if name.endswith("_ms"):
        return f"{value / 1e3:.3g}"
    return f"{value:.4g}"


def draw_picture(rows: Sequence[Row], path: Path, *, subtitle: str) -> None:
    """Four panels, a bar for each rung: throughput, latency, users at once, memory in use.

    Raises:
        StartupError: the picture cannot be written.
    """
    shown = [row for row in rows if row.figures is not None]
    picture = new_figure("What each idea is worth", subtitle=subtitle, rows=2, columns=2)
    for panel, bars in zip(picture.panels, PANELS, strict=True):
        _draw_bars(panel, shown, bars=bars)
    save_figure(picture, path=path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """What a panel shows."""

    name: str
    title: str
    unit: str
    factor: float = 1.0
    has_claims: bool = False
    """The speedup stands at the bar, with what the literature claims."""


PANELS: Final = (
    Bars(name="output_tokens_per_s", title="Throughput", unit="generated tokens per second", has_claims=True),
    Bars(name="e2el_p50_ms", title="Latency", unit="E2EL p50 (s)", factor=1e-3),
    Bars(name="users_held", title="Users served at once", unit="requests in the batch, at most"),
    Bars(name="kv_efficiency", title="KV memory in use", unit="used slots of owned slots (%)", factor=100),
)


def _draw_bars(panel: "Axes", rows: Sequence[Row], *, bars: Bars) -> None:
    label(panel, title=bars.title, x=bars.unit, y="")
    values = [(row.figures or {}).get(bars.name, 0.0) * bars.factor for row in rows]
    colors = [COLORS[1] if row.rung.kind == "transformers" else COLORS[0] for row in rows]
    panel.barh([row.rung.idea for row in rows], values, color=colors)
    panel.invert_yaxis()
    panel.grid(visible=False, axis="y")
    room = 1.8 if bars.has_claims else 1.2  # for the words beside the longest bar
    panel.set_xlim(0, max(values, default=0.0) * room or 1.0)
    for place, (row, value) in enumerate(zip(rows, values, strict=True)):
        text = f" {value:.3g}" + (_speedup(row) if bars.has_claims else "")
        panel.text(value, place, text, va="center", fontsize=8, color=INK)


def _speedup(row: Row) -> str:
    speedup = (row.figures or {}).get("speedup", 0.0)
    claim = f", claimed {row.rung.claim}" if row.rung.claim and row.rung.claim != "1x" else ""
    return f" ({speedup:.1f}x{claim})"
