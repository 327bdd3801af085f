"""Joins what `penstock chat` and `penstock run` need; `main` calls these after it has parsed."""

import asyncio
from pathlib import Path

from rich.console import Console

from penstock.cli.batch import Batch, BatchCounts
from penstock.cli.chat import Chat, Conversation
from penstock.cli.feed import num_in_flight
from penstock.cli.local_options import LocalOptions
from penstock.cli.talk import ModelPartner, Partner, ServerPartner
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from penstock.observe.metrics import Metrics
from penstock.server.app import make_services


def talk(model: str | None, *, url: str | None, api_key: str | None, conversation: Conversation) -> int:
    """`penstock chat`; the return value is the exit code.

    Raises:
        StartupError: the model cannot be loaded, or `url` is none.
        TalkError: nobody answers at `url`.
    """
    console = Console()
    with asyncio.Runner() as runner:
        partner: Partner
        if url is not None:
            partner = runner.run(_connected(url, model=model, api_key=api_key))
        else:
            from penstock.cli.local_model import open_named  # brings torch, which --url does not need

            local = runner.run(open_named(model, console=console))
            partner = ModelPartner(local.service, close=local.close)
        try:
            Chat(partner, conversation=conversation, console=console).run(runner)
        finally:
            runner.run(partner.close())
    return 0


async def _connected(url: str, *, model: str | None, api_key: str | None) -> ServerPartner:
    partner = ServerPartner(url, model=model, api_key=api_key)
    try:
        await partner.connect()
    except BaseException:
        await partner.close()
        raise
    return partner


def run_batch(model: str | None, *, source: Path, target: Path, options: LocalOptions) -> int:
    """`penstock run`; the return value is the exit code: 1 if a row of this run failed.

    Raises:
        StartupError: a file or the model is wrong.
        EngineDeadError: the engine failed as a whole; run again to go on.
    """
    console = Console(stderr=True)
    counts = asyncio.run(_run_batch(model, console=console, source=source, target=target, options=options))
    console.print(
        f"{counts.num_answered} answered, {counts.num_failed} failed, "
        f"{counts.num_skipped} were there already: {target}",
        soft_wrap=True,
    )
    return 1 if counts.num_failed else 0


async def _run_batch(
    model: str | None,
    *,
    console: Console,
    source: Path,
    target: Path,
    options: LocalOptions,
) -> BatchCounts:
    from penstock.cli.local_model import open_named

    catalog = Catalog()
    clock = SystemClock()
    services = make_services(catalog, clock=clock, events=Metrics([], clock=clock))
    batch = Batch(services, source=source, target=target)  # looks at the files before the model is loaded
    local = await open_named(model, console=console, options=options)
    try:
        catalog.add(local.service, name=local.service.card.name)
        await batch.run(console, num_workers=num_in_flight(max_num_seqs=options.max_num_seqs))
    finally:
        await local.close()
    return batch.counts
