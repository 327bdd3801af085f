"""What the commands of `penstock bench` that drive engines share: option types, lists of words, output."""

import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Final, TypeVar

from cyclopts import Parameter
from rich.console import Console

from penstock.cli.setting import Range, setting
from penstock.core.errors import InvalidParameterError, StartupError
from penstock.engine.owned_folder import OwnedFolder

Row = TypeVar("Row")

MAX_BATCH: Final = 4096
EXIT_INTERRUPTED: Final = 130
FILE_WIDTH: Final = 160
"""Columns of tables where there is no terminal that has a width."""

Model = Annotated[str | None, Parameter(help="Folder or hub id; without one, the embedded model.")]
Rounds = Annotated[int, setting("How often everything is asked, in turns.", allowed=Range(low=1, high=1000))]
Seed = Annotated[int, setting("Of the token ids.", allowed=Range(low=0, high=1 << 32))]
Threads = Annotated[
    int | None,
    setting("Threads of every engine; otherwise the CPUs of this process.", allowed=Range(low=1, high=1024)),
]
Output = Annotated[Path | None, Parameter(help="JSON to write, also while the run goes on.")]
LogDir = Annotated[Path | None, Parameter(help="Keep the logs of the processes here.")]
PenstockFlags = Annotated[
    str, Parameter(help="Further flags of `penstock serve`: --penstock-flags='--kernels eager'.")
]


def tell(line: str) -> None:
    """A line for the person who waits, on stderr."""
    Console(stderr=True).print(line, highlight=False, soft_wrap=True)


def until_interrupted(rows: Iterable[Row], *, keep: Callable[[Sequence[Row]], None]) -> tuple[list[Row], int]:
    """The rows of a measurement and the exit code: after Ctrl-C those that were measured, and 130.

    Args:
        rows: measured while they are taken.
        keep: called with all of them after each.
    """
    kept: list[Row] = []
    try:
        for row in rows:
            kept.append(row)
            keep(kept)
    except KeyboardInterrupt:
        tell("stopped: what was measured until now is shown, and kept where --output says")
        return kept, EXIT_INTERRUPTED
    return kept, 0


def results() -> Console:
    """Where tables go."""
    console = Console()
    return console if console.is_terminal else Console(width=FILE_WIDTH)


def command_line() -> str:
    """This command, for the record; of absolute paths the last part, which means something elsewhere too."""
    return shlex.join(["penstock", *(Path(word).name if word[:1] == "/" else word for word in sys.argv[1:])])


def check_file(path: Path | None, *, param: str) -> None:
    """Refuse before the run what could not be written behind it; makes the folder that it lies in.

    Raises:
        StartupError: it is a folder, or its folder cannot be made or written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise StartupError(f"{param} is {str(path)!r}, which is a folder; name a file", param=param)
    make_folder(path.parent, param=param)


def make_folder(folder: Path, *, param: str) -> None:
    """Make a folder that files are to be written to.

    Raises:
        StartupError: it cannot be made, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StartupError(
            f"{param}: the folder {str(folder)!r} cannot be made: {error.strerror}", param=param
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StartupError(f"{param}: nothing can be written in {str(folder)!r}", param=param)


@contextlib.contextmanager
def work_folder(log_dir: Path | None, *, prefix: str) -> Iterator[Path]:
    """Where processes put their logs: `log_dir`, which is kept, or a new folder, which is not.

    Raises:
        StartupError: it cannot be made.
    """
    if log_dir is not None:
        make_folder(log_dir, param="log_dir")
        yield log_dir
        return
    with contextlib.closing(OwnedFolder(prefix=prefix)) as scratch:
        yield scratch.path


def threads_or_all(num_threads: int | None) -> int:
    """As given, or the CPUs of this process."""
    return num_threads or len(os.sched_getaffinity(0))


def words(text: str, *, param: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The comma-separated words of an option.

    Raises:
        InvalidParameterError: one is not known, or there is none; the message lists what is.
    """
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    wrong = next((word for word in found if word not in known), None)
    if not found or wrong is not None:
        raise InvalidParameterError(
            f"{param} has {wrong or text!r}, it must be of {', '.join(known)}, separated by commas",
            param=param,
        )
    return found


def numbers(text: str, *, param: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas.

    Raises:
        InvalidParameterError: names what is none.
    """
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_BATCH:
        raise InvalidParameterError(
            f"{param} is {text!r}, it must be whole numbers from 1 to {MAX_BATCH}, separated by commas",
            param=param,
        )
    return numbers


def flags(text: str, *, param: str) -> tuple[str, ...]:
    """The flags in one text, split as a shell does.

    Raises:
        InvalidParameterError: a quotation does not end.
    """
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise InvalidParameterError(
            f"{param} is {text!r:.80}, it must be flags as in a shell: {error}", param=param
        ) from error


def span(text: str, *, param: str) -> tuple[int, int]:
    """LOW:HIGH, or one number for both.

    Raises:
        InvalidParameterError: it has another form, or the numbers are out of order.
    """
    low, _, high = text.partition(":")
    try:
        span = (int(low), int(high or low))
    except ValueError:
        span = (0, 0)
    if not 1 <= span[0] <= span[1] <= 1 << 20:
        raise InvalidParameterError(
            f"{param} is {text!r}, it must be LOW:HIGH in whole numbers from 1 to {1 << 20}", param=param
        )
    return span
