"""What a person sees at start: a bar while the weights load, one table, the address and a curl line.

The bar and the table are for a terminal on stderr; where that is a file, the log there says the same as JSON.
The address and the curl line are plain lines on stdout, for people and scripts.
"""

from types import TracebackType
from typing import Final, Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from penstock.cli.resolved import Choice

QUESTION: Final = "What is the capital of France?"


class LoadingBar:
    """Progress of the weights; silent where there is no terminal."""

    def __init__(self, console: Console, *, model: str) -> None:
        self._progress = Progress(
            TextColumn(f"loading {model}"),
            BarColumn(),
            DownloadColumn(binary_units=True),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Remove the bar; safe to call twice."""
        self._progress.stop()

    def update(self, done_bytes: int, total_bytes: int) -> None:
        """Show that `done_bytes` of `total_bytes` are there."""
        if self._task is None:
            self._task = self._progress.add_task("weights", total=total_bytes)
        self._progress.update(self._task, completed=done_bytes)


def print_choices(console: Console, *, model: str, choices: tuple[Choice, ...]) -> None:
    """The one table; nothing where there is no terminal."""
    if not console.is_terminal:
        return
    table = Table(title=f"Penstock serves {model}", title_justify="left", show_header=False, box=None)
    for style in ("bold", "", "dim"):
        table.add_column(style=style)
    for choice in choices:
        table.add_row(choice.name, choice.value, choice.reason)
    console.print(table)


def curl_line(address: str, *, model: str, has_key: bool) -> str:
    """A command that asks the server a question."""
    key = '-H "Authorization: Bearer $PENSTOCK_API_KEY" ' if has_key else ""
    body = f'{{"model": "{model}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}'
    return f"curl {address}/v1/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'"


def print_address(address: str, *, model: str, has_key: bool, admin: str | None = None) -> None:
    """Where the server is and how to ask it: whole lines on stdout, the last before requests are served."""
    if admin is not None:
        print(f"admin at {admin}")
    print(f"ready at {address}, documentation at {address}/docs")
    print(curl_line(address, model=model, has_key=has_key), flush=True)
