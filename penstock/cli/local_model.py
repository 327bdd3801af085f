"""A model in this process: engine thread, text service and the loop they live on; for offline use and chat.

No server, no second process, no restart. `build` joins the served kind.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from rich.console import Console

from penstock.cli.build import make_text_service
from penstock.cli.feed import with_room
from penstock.cli.local_options import DEFAULT_OPTIONS, LocalOptions
from penstock.cli.model_source import ModelSource, find_model
from penstock.cli.start_table import LoadingBar
from penstock.core.ids import ModelName
from penstock.core.ports import RequestRecord
from penstock.core.tokens import EngineInfo, StepStats
from penstock.engine.config import EngineConfig, SchedulerConfig, validate_engine_config
from penstock.engine.in_process import InProcessEngine
from penstock.observe.clock import SystemClock
from penstock.text.pooling_config import PoolingConfig
from penstock.text.reading import ReadingConfig
from penstock.text.service import TextService

Result = TypeVar("Result")
END_S: Final = 10.0
"""Most that a step under way is waited for where nobody asked for the end."""


class LoopThread:
    """An event loop in a thread of its own, so that callers may have one too (notebooks do)."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="penstock-loop", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:  # Any: a coroutine's unused types
        """Wait for `work`; a Ctrl-C here cancels it there."""
        future = asyncio.run_coroutine_threadsafe(work, self.loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        """End the thread; nothing may run on it any more. Safe to call twice."""
        if self.loop.is_closed():
            return
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@dataclass(slots=True, kw_only=True)
class StepTotals:
    """Sums over the engine's steps; an `EngineEvents`."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    """Prompt tokens that were computed; those found in the prefix tree are not among them."""
    num_generated_tokens: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_offload_hit_tokens: int = 0
    """Tokens whose KV came back from host memory."""
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    slots_owned_s: float = 0.0
    """Token slots in owned blocks, times seconds."""
    slots_used_s: float = 0.0
    last: StepStats | None = None
    records: list[RequestRecord] = field(default_factory=list)
    """The last `MAX_RECORDS` requests."""

    MAX_RECORDS = 4096

    def on_step(self, _model: ModelName, stats: StepStats) -> None:
        """Add a step."""
        self.num_steps += 1
        self.num_prompt_tokens += stats.num_prompt_tokens
        self.num_generated_tokens += stats.num_generated_tokens
        self.num_prefix_query_tokens += stats.num_prefix_query_tokens
        self.num_prefix_hit_tokens += stats.num_prefix_hit_tokens
        self.num_preemptions += stats.num_preemptions
        self.num_offload_hit_tokens += stats.num_offload_hit_tokens
        self.num_drafts += stats.num_drafts
        self.num_draft_tokens += stats.num_draft_tokens
        self.num_accepted_tokens += sum(stats.num_accepted_tokens)
        self.slots_owned_s += stats.num_slots_owned * stats.step_time_s
        self.slots_used_s += stats.num_slots_used * stats.step_time_s
        self.last = stats

    def on_token_gap(self, _model: ModelName, _gap_s: float) -> None:
        """Not summed."""

    def on_request(self, record: RequestRecord) -> None:
        """Keep a request's record."""
        self.records.append(record)
        del self.records[: -self.MAX_RECORDS]

    def on_engine_restart(self, _model: ModelName, _reason: str) -> None:
        """An engine in this process is never restarted."""

    def on_grammar(self, _model: ModelName, _outcome: str, _compile_s: float) -> None:
        """Not summed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """What is running: used on the loop that made it."""

    service: TextService
    engine: InProcessEngine

    @property
    def info(self) -> EngineInfo:
        """Resolved facts."""
        return self.engine.info

    async def close(self) -> None:
        """End the engine's thread and the template's processes."""
        await self.engine.close()
        await self.service.close()

    def end(self) -> None:
        """As `close`, for when its loop cannot be asked: at the interpreter's end it runs nothing new."""
        self.engine.end(timeout_s=END_S)
        self.service.end()


class HeldModel:
    """What an `LLM` runs on: a thread with a loop and, unless it sleeps deeply, the model on it.

    Apart from the `LLM`, so that one that is dropped without `close` can be told from what it leaves.
    """

    def __init__(self) -> None:
        self.thread = LoopThread()
        self.local: LocalModel | None = None

    def close(self) -> None:
        """End both; safe to call twice."""
        local, self.local = self.local, None
        if local is not None:
            self.thread.run(local.close())
        self.thread.close()

    def end(self) -> None:
        """End both for an `LLM` that nobody closed: the collector's part, or the interpreter's at its end.

        The collector may run in any thread, also in those that end here, which must not wait for themselves.
        """
        if threading.current_thread() is threading.main_thread():
            self._end()
        else:
            threading.Thread(target=self._end, name="penstock-end", daemon=True).start()

    def _end(self) -> None:
        local, self.local = self.local, None
        if local is not None:
            local.end()
        self.thread.close()


async def open_local_model(
    source: ModelSource,
    config: EngineConfig,
    *,
    events: StepTotals,
    chat_template: Path | None = None,
    reading: ReadingConfig | None = None,
    pooling: PoolingConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> LocalModel:
    """Load the model and start its engine.

    Raises:
        StartupError: config, checkpoint or machine does not allow it.
    """
    validate_engine_config(config)
    from penstock.engine.build import build_core

    core = await asyncio.to_thread(build_core, config, on_progress=on_progress)
    engine = InProcessEngine(core, name=source.name, events=events)
    service = make_text_service(
        engine,
        source,
        events=events,
        clock=SystemClock(),
        chat_template=chat_template,
        reading=reading,
        pooling=pooling,
    )
    return LocalModel(service=service, engine=engine)


async def open_named(
    model: str | None, *, console: Console, options: LocalOptions = DEFAULT_OPTIONS
) -> LocalModel:
    """Find a model by name and load it, with a bar on a terminal.

    Raises:
        StartupError: there is no such model, or it cannot be loaded.
    """
    with LoadingBar(console, model=model or "the embedded model") as bar:
        source = find_model(model, on_progress=bar.update)
        max_num_seqs = options.max_num_seqs
        budget = max(SchedulerConfig().max_num_batched_tokens, max_num_seqs)
        config = EngineConfig(
            model_path=str(source.path),
            model_revision=source.revision,
            dtype=options.dtype,
            kernels=options.kernels,
            device=options.device,
            quantization=options.quantization,
            scheduler=with_room(SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=budget)),
        )
        return await open_local_model(source, config, events=StepTotals(), on_progress=bar.update)
