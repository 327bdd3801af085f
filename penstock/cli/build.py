"""Makes the objects of the serving process and joins them: the only place that knows all rooms.

The engine is a child process, so torch is never imported here.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from fastapi import FastAPI

from penstock.cli.model_source import ModelSource
from penstock.cli.settings import ServeSettings, engine_config
from penstock.core.ids import DEFAULT_TENANT, ModelName, TenantId
from penstock.core.ports import Clock, EngineAdmin, EngineClient, EngineEvents
from penstock.core.tokens import EngineInfo
from penstock.engine.supervisor import SubprocessEngine
from penstock.gateway.catalog import Catalog
from penstock.gateway.keys import KeyRing
from penstock.observe.clock import SystemClock
from penstock.observe.logs import Fanout, RequestLog
from penstock.observe.metrics import Metrics
from penstock.server.admin import make_admin_app
from penstock.server.app import make_app, make_services
from penstock.server.services import Services
from penstock.text.chat_template import ChatTemplate
from penstock.text.service import TextService
from penstock.text.tokenizer import Tokenizer

ADMIN_TENANT: Final = TenantId("admin")


def make_text_service(
    engine: EngineClient,
    source: ModelSource,
    *,
    events: EngineEvents,
    clock: Clock,
    chat_template: Path | None = None,
) -> TextService:
    """The text half of a model over its engine half.

    Raises:
        CheckpointError: tokenizer or chat template are missing or broken.
    """
    tokenizer = Tokenizer.from_folder(source.path)
    template = ChatTemplate.from_folder(
        source.path, special_tokens=tokenizer.special_tokens, override=chat_template
    )
    return TextService(
        engine, tokenizer, template, name=source.name, events=events, clock=clock, root=source.root
    )


class ServedModel:
    """One model behind the server: its engine process and its text service; a `lifecycle.Backend`.

    Args:
        engine: not started yet.
        source: the checkpoint.
        catalog: the service is added to it once the engine is ready.
        admins: the engine is added to it then.
        events: told of every request.
        clock: for times.
        chat_template: file in place of the model's own, or None.
    """

    def __init__(
        self,
        engine: SubprocessEngine,
        source: ModelSource,
        *,
        catalog: Catalog,
        admins: dict[ModelName, EngineAdmin],
        events: EngineEvents,
        clock: Clock,
        chat_template: Path | None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._catalog = catalog
        self._admins = admins
        self._events = events
        self._clock = clock
        self._chat_template = chat_template
        self._service: TextService | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine chose; valid after `start`."""
        return self._engine.info

    async def start(self) -> None:
        """Start the engine and, beside it, read tokenizer and template; then open the catalog.

        Raises:
            StartupError: checkpoint, config or machine does not allow it.
        """
        engine = asyncio.create_task(self._engine.start())
        try:
            self._service = await asyncio.to_thread(self._make_service)
            await self._service.start()
            await engine
        finally:
            engine.cancel()
            await asyncio.gather(engine, return_exceptions=True)
        self._admins[self._source.name] = self._engine
        self._catalog.add(self._service, name=self._source.name)

    async def drain(self, budget_s: float) -> None:
        """Let what is in the engine finish."""
        await self._engine.drain(budget_s)

    async def close(self) -> None:
        """End the engine and the template's processes."""
        await self._engine.close()
        if self._service is not None:
            await self._service.close()

    def _make_service(self) -> TextService:
        return make_text_service(
            self._engine,
            self._source,
            events=self._events,
            clock=self._clock,
            chat_template=self._chat_template,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class House:
    """Everything that `serve` runs."""

    app: FastAPI
    admin_app: FastAPI | None
    services: Services
    backend: ServedModel


def build_house(
    settings: ServeSettings, source: ModelSource, *, on_progress: Callable[[int, int], None]
) -> House:
    """Join the whole server for one model; nothing is started.

    Raises:
        StartupError: a setting or key is wrong.
    """
    clock = SystemClock()
    metrics = Metrics([source.name], clock=clock)
    events = Fanout(metrics, RequestLog())
    catalog = Catalog()
    admins: dict[ModelName, EngineAdmin] = {}
    config = engine_config(settings, model_path=source.path, model_revision=source.revision)
    engine = SubprocessEngine(config, name=source.name, events=events, clock=clock, on_progress=on_progress)
    services = make_services(
        catalog,
        clock=clock,
        events=metrics,
        user_keys=_ring(settings.api_key, tenant=DEFAULT_TENANT),
        admin_keys=_ring(settings.admin_key, tenant=ADMIN_TENANT),
        admins=admins,
    )
    backend = ServedModel(
        engine,
        source,
        catalog=catalog,
        admins=admins,
        events=events,
        clock=clock,
        chat_template=settings.chat_template,
    )
    admin_app = make_admin_app(services) if settings.admin_key is not None else None
    return House(app=make_app(services), admin_app=admin_app, services=services, backend=backend)


def _ring(key: str | None, *, tenant: TenantId) -> KeyRing:
    return KeyRing({} if key is None else {key: tenant})
