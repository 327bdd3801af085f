"""`penstock serve`: finds the model, builds the house, shows what was chosen, serves until a signal."""

import dataclasses
import logging
from typing import Final

from rich.console import Console

from penstock.cli.build import House, build_house
from penstock.cli.model_source import ModelSource, find_model
from penstock.cli.resolved import resolved_choices
from penstock.cli.settings import ServeSettings
from penstock.cli.start_table import LoadingBar, print_address, print_choices
from penstock.core.ids import ModelName
from penstock.observe.logs import LogWriter
from penstock.server import lifecycle
from penstock.server.lifecycle import Addresses, ServerConfig

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
        _serve(model, settings=settings, console=_console())
    finally:
        writer.stop()
    return 0


def _console() -> Console:
    """Standard error; wide enough for the table where no terminal says how wide it is."""
    console = Console(stderr=True)
    return console if console.is_terminal else Console(stderr=True, width=PLAIN_WIDTH)


def _serve(model: str | None, *, settings: ServeSettings, console: Console) -> None:
    with LoadingBar(console, model=model or "the embedded model") as bar:
        source = _named(find_model(model, revision=settings.revision, on_progress=bar.update), settings)
        house = build_house(settings, source, on_progress=bar.update)

        def on_ready(addresses: Addresses) -> None:
            bar.stop()
            _show(console, house, settings=settings, source=source, addresses=addresses)

        lifecycle.run(
            lifecycle.serve(
                house.app,
                services=house.services,
                backend=house.backend,
                config=_server_config(settings),
                admin_app=house.admin_app,
                on_ready=on_ready,
            )
        )


def _named(source: ModelSource, settings: ServeSettings) -> ModelSource:
    if settings.served_model_name is None:
        return source
    return dataclasses.replace(source, name=ModelName(settings.served_model_name))


def _server_config(settings: ServeSettings) -> ServerConfig:
    return ServerConfig(
        host=settings.host,
        port=settings.port,
        admin_port=settings.admin_port,
        shutdown_timeout_s=settings.shutdown_timeout,
    )


def _show(
    console: Console, house: House, *, settings: ServeSettings, source: ModelSource, addresses: Addresses
) -> None:
    """The table and the address, for people; the same choices once in the log."""
    choices = resolved_choices(settings, house.backend.info)
    print_choices(console, model=source.name, choices=choices)
    print_address(console, address=addresses.public, model=source.name, has_key=settings.api_key is not None)
    if addresses.admin is not None:
        console.print(f"admin at {addresses.admin}", highlight=False)
    log.info(
        "ready", extra={"choices": {choice.name: f"{choice.value} ({choice.reason})" for choice in choices}}
    )
