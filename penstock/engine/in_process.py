"""The engine in a thread of the caller's process: `EngineClient` and `EngineAdmin` for tests and offline use.

No second process, no restart, no watchdog; it loads torch. The same `StreamTable` as across processes.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence

from penstock.core.error_info import error_to_info, info_to_error
from penstock.core.errors import EngineDeadError, InvalidParameterError, NotReadyError, PenstockError
from penstock.core.ids import ModelName
from penstock.core.ports import EngineEvents
from penstock.core.tokens import (
    AdapterReport,
    EngineInfo,
    EngineRequest,
    MemoryReport,
    RequestReport,
    TokenDelta,
)
from penstock.engine.client import StreamTable
from penstock.engine.config import LoraModule
from penstock.engine.core import EngineCore
from penstock.engine.loop import EngineLoop
from penstock.engine.wire import Fatal, FromEngine, Shutdown, ToEngine


class _QueueChannel:
    """Messages between the event loop's thread and the engine's thread."""

    def __init__(self, deliver: Callable[[FromEngine], None]) -> None:
        self.inbox: queue.SimpleQueue[ToEngine | None] = queue.SimpleQueue()
        self._deliver = deliver

    def receive(self, *, block: bool) -> Iterable[ToEngine]:
        message = self.inbox.get() if block else None
        while True:
            if message is not None:
                yield message
            try:
                message = self.inbox.get_nowait()
            except queue.Empty:
                return

    def wake(self) -> None:
        """See `loop.Channel`."""
        self.inbox.put(None)

    def send(self, message: FromEngine) -> None:
        self._deliver(message)


class InProcessEngine:
    """`EngineClient` and `EngineAdmin` over an engine in a thread of this process.

    For tests and the offline API: no second process, no restart. Must be used from one event loop.
    """

    def __init__(self, core: EngineCore, *, name: ModelName, events: EngineEvents) -> None:
        self._core = core
        self._event_loop = asyncio.get_running_loop()
        self._channel = _QueueChannel(self._deliver)
        self._table = StreamTable(name=name, events=events, send=self._channel.inbox.put)
        self._stop_reason: str | None = None
        self.is_sleeping = False
        """See `EngineAdmin`."""
        self._thread = threading.Thread(target=self._run, name="penstock-engine", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        """Resolved facts."""
        return self._core.info

    @property
    def not_ready_reason(self) -> str | None:
        """None, or `sleeping`, `closed` or `dead`."""
        return self._stop_reason or ("sleeping" if self.is_sleeping else None)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """See `EngineClient`."""
        if self._stop_reason is not None:
            raise NotReadyError(f"the engine is {self._stop_reason}")
        return await self._table.submit(request)

    async def sleep(self, level: int) -> None:
        """See `EngineAdmin`; level 2 would end a process, which this engine does not have."""
        if level != 1:
            raise InvalidParameterError(
                f"level is {level}, it must be 1 without an engine process", param="level"
            )
        if self.is_sleeping:
            return
        self.is_sleeping = True
        try:
            await self._table.sleep()
        except PenstockError:
            self.is_sleeping = False
            raise

    async def wake_up(self) -> None:
        """See `EngineAdmin`."""
        if self.is_sleeping:
            await self._table.wake_up()
            self.is_sleeping = False

    async def memory(self) -> MemoryReport:
        """See `EngineAdmin`."""
        return await self._table.memory()

    async def requests(self) -> Sequence[RequestReport]:
        """See `EngineAdmin`."""
        return await self._table.requests()

    async def adapters(self) -> Sequence[AdapterReport]:
        """See `AdapterEngine`."""
        return await self._table.adapters()

    async def load_adapter(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        """See `AdapterEngine`."""
        return await self._table.load_adapter(module, is_replacing=is_replacing)

    async def unload_adapter(self, name: str) -> AdapterReport:
        """See `AdapterEngine`."""
        return await self._table.unload_adapter(name)

    async def close(self) -> None:
        """Stop the thread; requests in flight end with `EngineDeadError`."""
        self._stop_reason = self._stop_reason or "closed"
        self._table.fail_all(EngineDeadError("the engine was closed"))
        self._channel.inbox.put(Shutdown())
        await asyncio.to_thread(self._thread.join)

    def end(self, *, timeout_s: float) -> None:
        """Stop the thread from any other; for when nobody waits for a stream, nor for the loop.

        Args:
            timeout_s: most that the step under way is waited for.
        """
        self._stop_reason = self._stop_reason or "closed"
        self._channel.inbox.put(Shutdown())
        self._thread.join(timeout_s)

    def _run(self) -> None:
        import torch  # whoever has an engine in this process has it already

        try:
            with torch.inference_mode():
                EngineLoop(self._core, self._channel).run()
        except Exception as error:  # noqa: BLE001 - the thread's edge: every request must hear of it
            self._deliver(Fatal(error_to_info(EngineDeadError(f"the engine failed: {error}"))))

    def _deliver(self, message: FromEngine) -> None:
        self._event_loop.call_soon_threadsafe(self._on_message, message)

    def _on_message(self, message: FromEngine) -> None:
        if isinstance(message, Fatal):
            self._stop_reason = "dead"
            self._table.fail_all(info_to_error(message.error))
        else:
            self._table.on_message(message)
