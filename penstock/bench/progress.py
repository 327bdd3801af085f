"""Shows a run while it goes on: a bar in a terminal, else a line now and then. Implements `load.Watcher`."""

import contextlib
from collections.abc import Iterator
from typing import Final

from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from penstock.bench.load import Counters, Watcher

DRAW_PERIOD_S: Final = 0.5
"""Drawing costs the loop about 2 ms each time."""
LINE_PERIOD_S: Final = 10.0
BAR_WIDTH: Final = 24


class LiveBar:
    """A line that is drawn again in place; by the loop's own thread, so that nothing else takes its CPU."""

    def __init__(self, live: Live, *, title: str) -> None:
        self._live = live
        self._title = title
        self._next_s = 0.0

    def tick(self, counters: Counters) -> None:
        """See `Watcher`."""
        if counters.elapsed_s < self._next_s:
            return
        self._next_s = counters.elapsed_s + DRAW_PERIOD_S
        self._live.update(self._picture(counters), refresh=True)

    def _picture(self, counters: Counters) -> Table:
        line = Table.grid(padding=(0, 1))
        bar = ProgressBar(total=counters.num_requests, completed=counters.num_done, width=BAR_WIDTH)
        line.add_row(
            self._title, bar, f"[bold]{counters.num_done}/{counters.num_requests}[/]", words(counters)
        )
        return line


class Lines:
    """A line every ten seconds, for logs."""

    def __init__(self, console: Console, *, title: str) -> None:
        self._console = console
        self._title = title
        self._next_s = LINE_PERIOD_S

    def tick(self, counters: Counters) -> None:
        """See `Watcher`."""
        if counters.elapsed_s < self._next_s:
            return
        self._next_s = counters.elapsed_s + LINE_PERIOD_S
        done = f"{counters.num_done}/{counters.num_requests}"
        self._console.print(f"{self._title} {done} {words(counters)}", highlight=False, soft_wrap=True)


def words(counters: Counters) -> str:
    """Where a run stands, without the count of requests."""
    elapsed_s = max(counters.elapsed_s, 1e-9)
    found = [
        f"{counters.elapsed_s:.0f} s",
        f"{counters.num_in_flight} in flight",
        f"{counters.num_pieces / elapsed_s:.0f} tokens/s",
    ]
    if counters.last_ttft_s is not None:
        found.append(f"last TTFT {counters.last_ttft_s * 1e3:.0f} ms")
    if counters.num_failed:
        found.append(f"{counters.num_failed} failed")
    return ", ".join(found)


@contextlib.contextmanager
def live(console: Console, *, title: str, is_shown: bool = True) -> Iterator[Watcher | None]:
    """A watcher for one run, gone from the screen when it is over.

    Args:
        console: where to draw; standard error, so that a report can be piped.
        title: of the line.
        is_shown: False shows nothing.
    """
    if not is_shown:
        yield None
    elif not console.is_terminal:
        yield Lines(console, title=title)
    else:
        with Live(console=console, auto_refresh=False, transient=True) as screen:
            yield LiveBar(screen, title=title)
