"""`penstock serve`: finds the model, builds the house, shows what was chosen, serves until a signal."""

import asyncio
import dataclasses
import logging
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Final

from rich.console import Console

from penstock.cli.build import ModelSide, build_model_side
from penstock.cli.model_source import ModelSource, find_model
from penstock.cli.resolved import resolved_choices
from penstock.cli.settings import ServeSettings
from penstock.cli.start_table import LoadingBar, print_address, print_choices
from penstock.core.ids import ModelName
from penstock.observe.logs import LogWriter

if TYPE_CHECKING:
    # Imported at run time only beside the start of the engine process.
    from penstock.cli.http_side import HttpSide
    from penstock.server.lifecycle import Addresses

PLAIN_WIDTH: Final = 120

log = logging.getLogger("penstock.cli")


def serve_forever(model: str | None, *, settings: ServeSettings) -> int:
    """Serve `model` until SIGTERM or Ctrl-C; the return value is the exit code.

    Raises:
        StartupError: the server cannot start like this.
    """
    writer = LogWriter(level=logging.getLevelNamesMapping()[settings.log_level.upper()])
    writer.start()
    try:
        _run(_serve(model, settings=settings, console=_console()))
    finally:
        writer.stop()
    return 0


def _console() -> Console:
    """Standard error; wide enough for the table where no terminal says how wide it is."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=PLAIN_WIDTH)


async def _serve(model: str | None, *, settings: ServeSettings, console: Console) -> None:
    with LoadingBar(console, model=model or "the embedded model") as bar:
        source = _named(find_model(model, revision=settings.revision, on_progress=bar.update), settings)
        side = build_model_side(settings, source, on_progress=bar.update)

        def on_ready(addresses: "Addresses") -> None:
            bar.stop()
            _show(console, side, settings=settings, source=source, addresses=addresses)

        side.backend.begin()
        try:
            http = await asyncio.to_thread(_http_side, settings, side)
            await http.serve(on_ready)
        finally:
            await side.backend.close()


def _http_side(settings: ServeSettings, side: ModelSide) -> "HttpSide":
    """Import the web framework while the engine process imports its own libraries, then build on it."""
    from penstock.cli.http_side import HttpSide

    return HttpSide(settings, side)


def _run(main: Coroutine[object, object, None]) -> None:
    try:
        from uvloop import new_event_loop
    except ImportError:
        new_event_loop = asyncio.new_event_loop  # type: ignore[assignment]  # a wider type than uvloop
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main)


def _named(source: ModelSource, settings: ServeSettings) -> ModelSource:
    if settings.served_model_name is None:
        return source
    return dataclasses.replace(source, name=ModelName(settings.served_model_name))


def _show(
    console: Console, side: ModelSide, *, settings: ServeSettings, source: ModelSource, addresses: "Addresses"
) -> None:
    """The table and the address, for people; the same choices once in the log."""
    choices = resolved_choices(settings, side.backend.info)
    print_choices(console, model=source.name, choices=choices)
    print_address(console, address=addresses.public, model=source.name, has_key=settings.api_key is not None)
    if addresses.admin is not None:
        console.print(f"admin at {addresses.admin}", highlight=False)
    log.info(
        "ready", extra={"choices": {choice.name: f"{choice.value} ({choice.reason})" for choice in choices}}
    )
