"""Makes the objects of the serving process below HTTP and joins them; `http_side` makes the rest.

The engine is a child process, so torch is never imported here.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from penstock.cli.adapters import ServedAdapters
from penstock.cli.model_source import ModelSource
from penstock.cli.settings import ServeSettings, engine_config, pooling_config, reading_config
from penstock.core.ids import ModelName
from penstock.core.ports import AdapterAdmin, Clock, EngineAdmin, EngineClient, EngineEvents
from penstock.core.tokens import EngineInfo
from penstock.engine.supervisor import SubprocessEngine
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from penstock.observe.logs import Fanout, RequestLog
from penstock.observe.metrics import Metrics
from penstock.text.chat_template import ChatTemplate
from penstock.text.generation_defaults import read_default_sampling
from penstock.text.pooling_config import PoolingConfig, read_pooling
from penstock.text.reading import ReadingConfig, make_reading
from penstock.text.service import TextService
from penstock.text.tokenizer import Tokenizer


def make_text_service(
    engine: EngineClient,
    source: ModelSource,
    *,
    events: EngineEvents,
    clock: Clock,
    chat_template: Path | None = None,
    reading: ReadingConfig | None = None,
    pooling: PoolingConfig | None = None,
) -> TextService:
    """The text half of a model over its engine half.

    Raises:
        CheckpointError: tokenizer or chat template are missing or broken.
        StartupError: an option of `reading` or `pooling` is wrong.
    """
    tokenizer = Tokenizer.from_folder(source.path)
    template = ChatTemplate.from_folder(
        source.path, special_tokens=tokenizer.special_tokens, override=chat_template
    )
    return TextService(
        engine,
        tokenizer,
        template,
        name=source.name,
        events=events,
        clock=clock,
        root=source.root,
        default_sampling=read_default_sampling(source.path),
        reading=make_reading(
            reading or ReadingConfig(),
            template="" if template is None else template.tools_source,
            tokenizer=tokenizer,
        ),
        pooling=replace(pooling or PoolingConfig(), pooling=read_pooling(source.path)),
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
        reading: how answers are read for tool calls and thoughts.
        pooling: how prompts become vectors and scores.
        adapters: where the model's adapters are put once they can be ordered.
        lora_dir: folders that operators may load as adapters.
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
        reading: ReadingConfig,
        pooling: PoolingConfig,
        adapters: dict[ModelName, AdapterAdmin],
        lora_dir: Path | None,
    ) -> None:
        self._engine = engine
        self._source = source
        self._catalog = catalog
        self._admins = admins
        self._events = events
        self._clock = clock
        self._chat_template = chat_template
        self._reading = reading
        self._pooling = pooling
        self._adapters = adapters
        self._lora_dir = lora_dir
        self._service: TextService | None = None
        self._starting: asyncio.Task[None] | None = None

    @property
    def info(self) -> EngineInfo:
        """What the engine chose; valid after `start`."""
        return self._engine.info

    def begin(self) -> None:
        """Start the engine process now, so that it loads while the rest is put together."""
        self._starting = asyncio.create_task(self._engine.start())

    async def start(self) -> None:
        """Wait for the engine and, meanwhile, read tokenizer and template; then open the catalog.

        Raises:
            StartupError: checkpoint, config or machine does not allow it.
        """
        assert self._starting is not None, "begin() has been called"
        self._service = await asyncio.to_thread(self._make_service)
        await self._service.start()
        await self._starting
        self._admins[self._source.name] = self._engine
        self._catalog.add(self._service, name=self._source.name)
        if self._engine.info.enable_lora:
            self._show_adapters(self._service)

    def _show_adapters(self, service: TextService) -> None:
        adapters = ServedAdapters(
            self._engine,
            service,
            catalog=self._catalog,
            clock=self._clock,
            folder=self._lora_dir,
        )
        adapters.show_at_start(self._engine.info.adapters)
        self._adapters[self._source.name] = adapters

    async def drain(self, budget_s: float) -> None:
        """Let what is in the engine finish."""
        await self._engine.drain(budget_s)

    async def close(self) -> None:
        """End the engine and the template's processes; safe to call twice."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
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
            reading=self._reading,
            pooling=self._pooling,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSide:
    """The half of the server below HTTP."""

    backend: ServedModel
    catalog: Catalog
    admins: dict[ModelName, EngineAdmin]
    adapters: dict[ModelName, AdapterAdmin]
    metrics: Metrics
    clock: Clock


def build_model_side(
    settings: ServeSettings, source: ModelSource, *, on_progress: Callable[[int, int], None]
) -> ModelSide:
    """Join engine, text service and catalog for one model; nothing is started."""
    clock = SystemClock()
    metrics = Metrics([source.name], clock=clock)
    events = Fanout(metrics, RequestLog())
    catalog = Catalog()
    admins: dict[ModelName, EngineAdmin] = {}
    adapters: dict[ModelName, AdapterAdmin] = {}
    config = engine_config(settings, model_path=source.path, model_revision=source.revision)
    backend = ServedModel(
        SubprocessEngine(config, name=source.name, events=events, clock=clock, on_progress=on_progress),
        source,
        catalog=catalog,
        admins=admins,
        events=events,
        clock=clock,
        chat_template=settings.chat_template,
        reading=reading_config(settings),
        pooling=pooling_config(settings),
        adapters=adapters,
        lora_dir=settings.lora_dir,
    )
    return ModelSide(
        backend=backend, catalog=catalog, admins=admins, adapters=adapters, metrics=metrics, clock=clock
    )
