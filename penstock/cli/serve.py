"""`penstock serve`: finds the model, builds the house, shows what was chosen, serves until a signal."""

import asyncio
import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Coroutine, Iterator
from typing import TYPE_CHECKING

from rich.console import Console

from penstock.cli.build import ModelSide, build_model_side
from penstock.cli.model_source import ModelSource, find_model
from penstock.cli.resolved import resolved_choices
from penstock.cli.settings import ServeSettings
from penstock.cli.start_table import LoadingBar, print_address, print_choices
from penstock.core.ids import ModelName
from penstock.gateway.catalog import check_model_name
from penstock.observe.logs import LogWriter
from penstock.observe.memory import settle

if TYPE_CHECKING:
    # Imported at run time only beside the start of the engine process.
    from penstock.cli.http_side import HttpSide
    from penstock.server.lifecycle import Addresses

log = logging.getLogger("penstock.cli")


def serve_forever(model: str | None, *, settings: ServeSettings) -> int:
    """Serve `model` until SIGTERM or Ctrl-C; the return value is the exit code.

    Raises:
        StartupError: the server cannot start like this.
    """
    writer = LogWriter(level=logging.getLevelNamesMapping()[settings.log_level.upper()])
    writer.start()
    try:
        with logged_warnings():
            _run(_serve(model, settings=settings, console=Console(stderr=True)))
    finally:
        writer.stop()
    return 0


@contextlib.contextmanager
def logged_warnings() -> Iterator[None]:
    """Python's warnings are lines of the log meanwhile, so that stderr holds one kind of line."""
    with warnings.catch_warnings():
        warnings.showwarning = _log_warning
        yield


def _log_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object, **__: object
) -> None:
    log.warning("%s: %s", category.__name__, message, extra={"place": f"{filename}:{lineno}"})


async def _serve(model: str | None, *, settings: ServeSettings, console: Console) -> None:
    with LoadingBar(console, model=model or "the embedded model") as bar:
        source = _named(find_model(model, revision=settings.revision, on_progress=bar.update), settings)
        side = build_model_side(settings, source, on_progress=bar.update)

        def on_ready(addresses: "Addresses") -> None:
            bar.stop()
            settle()
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
    asked = settings.served_model_name
    name = source.name if asked is None else ModelName(asked)
    check_model_name(name)
    return dataclasses.replace(source, name=name)


def _show(
    console: Console, side: ModelSide, *, settings: ServeSettings, source: ModelSource, addresses: "Addresses"
) -> None:
    """The log's line, then the table and the address for people: the `curl` to copy comes last."""
    choices = resolved_choices(settings, side.backend.info)
    told = {choice.name: f"{choice.value} ({choice.reason})" for choice in choices}
    log.info("ready", extra={"address": addresses.public, "admin": addresses.admin, "choices": told})
    print_choices(console, model=source.name, choices=choices)
    has_key = settings.api_key is not None
    print_address(addresses.public, model=source.name, has_key=has_key, admin=addresses.admin)
