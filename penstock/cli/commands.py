"""Joins what `penstock chat` and `penstock run` need; `main` calls these after it has parsed."""

import asyncio
from pathlib import Path
from typing import Final

from rich.console import Console

from penstock.cli.batch import Batch, BatchCounts
from penstock.cli.chat import Chat, Conversation
from penstock.cli.local_model import LocalModel, StepTotals, open_local_model
from penstock.cli.model_source import find_model
from penstock.cli.start_table import LoadingBar
from penstock.cli.talk import ModelPartner, Partner, ServerPartner
from penstock.engine.config import EngineConfig, SchedulerConfig
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from penstock.observe.metrics import Metrics
from penstock.server.app import make_services

WORKERS_PER_SEQ: Final = 2
"""Batch rows under way for each of `max_num_seqs`, so that the engine's queue never runs dry."""


def talk(model: str | None, *, url: str | None, api_key: str | None, conversation: Conversation) -> int:
    """`penstock chat`; the return value is the exit code.

    Raises:
        StartupError: the model cannot be loaded.
    """
    console = Console()
    with asyncio.Runner() as runner:
        partner: Partner
        if url is not None:
            partner = ServerPartner(url, model=model, api_key=api_key)
        else:
            local = runner.run(_open(model, console=console))
            partner = ModelPartner(local.service, close=local.close)
        try:
            Chat(partner, conversation=conversation, console=console).run(runner)
        finally:
            runner.run(partner.close())
    return 0


def run_batch(
    model: str | None, *, source: Path, target: Path, dtype: str, kernels: str, max_num_seqs: int
) -> int:
    """`penstock run`; the return value is the exit code: 0 once every row has its line, failed ones too.

    Raises:
        StartupError: a file or the model is wrong.
        EngineDeadError: the engine failed as a whole; run again to go on.
    """
    console = Console(stderr=True)
    counts = asyncio.run(
        _run_batch(
            model,
            console=console,
            source=source,
            target=target,
            dtype=dtype,
            kernels=kernels,
            max_num_seqs=max_num_seqs,
        )
    )
    console.print(
        f"{counts.num_answered} answered, {counts.num_failed} failed, "
        f"{counts.num_skipped} were there already: {target}",
        soft_wrap=True,
    )
    return 0


async def _open(
    model: str | None,
    *,
    console: Console,
    dtype: str = "auto",
    kernels: str = "auto",
    max_num_seqs: int = 64,
) -> LocalModel:
    with LoadingBar(console, model=model or "the embedded model") as bar:
        source = find_model(model, on_progress=bar.update)
        config = EngineConfig(
            model_path=str(source.path),
            model_revision=source.revision,
            dtype=dtype,
            kernels=kernels,
            scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        )
        return await open_local_model(source, config, events=StepTotals(), on_progress=bar.update)


async def _run_batch(
    model: str | None,
    *,
    console: Console,
    source: Path,
    target: Path,
    dtype: str,
    kernels: str,
    max_num_seqs: int,
) -> BatchCounts:
    catalog = Catalog()
    clock = SystemClock()
    services = make_services(catalog, clock=clock, events=Metrics([], clock=clock))
    batch = Batch(services, source=source, target=target)  # looks at the files before the model is loaded
    local = await _open(model, console=console, dtype=dtype, kernels=kernels, max_num_seqs=max_num_seqs)
    try:
        catalog.add(local.service, name=local.service.card.name)
        await batch.run(console, num_workers=WORKERS_PER_SEQ * max_num_seqs)
    finally:
        await local.close()
    return batch.counts
