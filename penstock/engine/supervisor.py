"""Starts the engine process, watches it, restarts it, and speaks for it to the API side.

```
        start()                Started
  NEW ----------> LOADING -----------------> READY <-----------+
                     |                        |  |             | Started
            StartupError                 died |  | hung        |
                     v                        v  v             |
                  CLOSED <----- close() ---- RESTARTING -------+
                                              (pause, spawn, repeat)
```

`sleep(2)` ends the process of a READY engine on purpose: it is SLEEPING until `wake_up` makes it RESTARTING.

When the process dies, requests that have produced a token end with `EngineDeadError` at once; the others
are queued again, once, at the next engine. An engine that keeps dying is started again for ever, at most
once in 30 s; what waits for it fails after five starts in vain.
"""

import asyncio
import contextlib
import enum
import logging
import shutil
import tempfile
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.error_info import info_to_error
from penstock.core.errors import (
    EngineDeadError,
    InvalidParameterError,
    NotReadyError,
    PenstockError,
    StartupError,
)
from penstock.core.ids import ModelName
from penstock.core.ports import Clock, EngineEvents
from penstock.core.tokens import (
    AdapterReport,
    EngineInfo,
    EngineRequest,
    MemoryReport,
    RequestReport,
    StepStats,
    TokenDelta,
)
from penstock.engine import liveness
from penstock.engine.child import EngineProcess
from penstock.engine.client import StreamTable
from penstock.engine.config import EngineConfig, LoraModule, validate_engine_config
from penstock.engine.liveness import Liveness
from penstock.engine.scheduler.admission import QueueLoad, check_admissible, check_queue, limits_from_info
from penstock.engine.wire import Fatal, FromEngine, Loading, Output, Ping, Shutdown, Started, ToEngine

RESTART_PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the k-th start in a row that follows a failure; the last one for all later."""
MAX_STARTS_TO_WAIT_FOR: Final = 5
"""Requests that wait for a restart fail after so many starts in vain."""
HEALTHY_S: Final = 60.0
"""An engine that served for this long has ended the row of failures."""
CLOSE_TIMEOUT_S: Final = 2.0
RETRY_AFTER_S: Final = 1.0
SLEEP_RETRY_S: Final = 10.0
"""For requests to a model that sleeps: an operator must wake it."""
WAKE_TIMEOUT_S: Final = 600.0
"""An engine is ready again within this time."""

log = logging.getLogger("penstock.supervisor")


class EngineState(enum.StrEnum):
    """See the module's drawing."""

    NEW = "new"
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    SLEEPING = "sleeping"
    CLOSED = "closed"


class SubprocessEngine:
    """`EngineClient` and `EngineAdmin` over a supervised engine process.

    Args:
        config: checked at `start`.
        name: model name, for events.
        events: sink for step statistics and restarts.
        clock: for the watchdog.
        on_progress: called with (done_bytes, total_bytes) while weights load.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: ModelName,
        events: EngineEvents,
        clock: Clock,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._config = config
        self._name = name
        self._events = events
        self._clock = clock
        self._on_progress = on_progress
        self._table = StreamTable(name=name, events=events, send=self._send)
        self._state = EngineState.NEW
        self._is_draining = False
        self._info: EngineInfo | None = None
        self._stats: StepStats | None = None
        self._process: EngineProcess | None = None
        self._liveness = Liveness(now_s=clock.monotonic())
        self._started: asyncio.Future[None] | None = None
        self._ready_s = 0.0
        self._num_failures = 0
        self._generation = 0
        self._death = "died"
        self._supervisor: asyncio.Task[None] | None = None
        self._folder: Path | None = None
        self._sleep_level = 0
        """0 awake, or as `EngineAdmin.sleep`."""
        self._order = asyncio.Lock()
        """One order to sleep or to wake up at a time: each ends before the next begins."""
        self._is_moving_memory = False
        """The engine is silent for as long as it takes."""
        self._woken = asyncio.Event()
        self._ready = asyncio.Event()
        self._adapters: dict[str, LoraModule] = {}
        """What the engine has loaded, for the next one after a restart."""

    @property
    def info(self) -> EngineInfo:
        """Resolved facts; valid after `start`."""
        assert self._info is not None, "start() has returned"
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the running engine."""
        assert self._process is not None, "start() has been called"
        return self._process.pid

    @property
    def not_ready_reason(self) -> str | None:
        """None, a state of the drawing, or draining, stuck, queue_full."""
        if self._state is not EngineState.READY:
            return self._state.value
        if self._is_draining:
            return "draining"
        if self._sleep_level:
            return "sleeping"
        if self._liveness.is_stuck(now_s=self._clock.monotonic()):
            return "stuck"
        return "queue_full" if self._queue_is_full() else None

    # -- life ----------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Spawn the engine and wait until it is warm.

        Raises:
            StartupError: the config, the checkpoint or the machine does not allow it.
        """
        validate_engine_config(self._config)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))  # mode 0700
        except OSError as error:
            raise StartupError(f"no folder for the engine's socket: {error.strerror}") from error
        self._state = EngineState.LOADING
        try:
            started = await self._spawn()
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
            self._supervisor.add_done_callback(self._on_supervisor_end)
            await started
        except PenstockError:
            await self.close()
            raise

    async def drain(self, budget_s: float) -> bool:
        """Stop admitting, also after a restart, and wait for what is in flight.

        Returns:
            True if everything ended within the budget.
        """
        self._is_draining = True
        if self._sleep_level:  # what waits for the wake-up cannot end
            return not self._table
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._table.wait_empty(), budget_s)
        return not self._table

    async def close(self) -> None:
        """End the engine; requests in flight end with `EngineDeadError`. Closing twice does nothing more."""
        if self._state is EngineState.CLOSED:
            return
        is_serving = self._state is EngineState.READY
        self._state = EngineState.CLOSED
        self._table.fail_all(EngineDeadError("the server is shutting down", code="shutting_down"))
        if self._process is not None and is_serving:
            self._send(Shutdown())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._process.wait(), CLOSE_TIMEOUT_S)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._process is not None:
            await self._process.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    # -- requests ------------------------------------------------------------------------------------------

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """See `EngineClient`."""
        self._refuse_unless_serving()
        check_admissible(request, limits=limits_from_info(self.info))
        check_queue(
            self._queue_load(), num_prompt_tokens=len(request.prompt_token_ids), retry_after_s=RETRY_AFTER_S
        )
        return await self._table.submit(request)

    async def memory(self) -> MemoryReport:
        """See `EngineAdmin`."""
        self._refuse_unless_alive()
        return await self._table.memory()

    async def requests(self) -> Sequence[RequestReport]:
        """See `EngineAdmin`."""
        self._refuse_unless_alive()
        return await self._table.requests()

    # -- sleep ---------------------------------------------------------------------------------------------

    @property
    def is_sleeping(self) -> bool:
        """See `EngineAdmin`."""
        return self._sleep_level > 0

    async def sleep(self, level: int) -> None:
        """See `EngineAdmin`."""
        if level not in {1, 2}:
            raise InvalidParameterError(f"level is {level}, it must be 1 or 2", param="level")
        async with self._order:
            if self._sleep_level >= level:
                return
            self._refuse_unless_alive()
            if level == 2:
                await self._end_process()
            else:
                await self._fall_asleep()

    async def wake_up(self) -> None:
        """See `EngineAdmin`."""
        async with self._order:
            if self._sleep_level == 2:
                await self._wait_for_next()
            elif self._sleep_level == 1:
                await self._while_memory_moves(self._table.wake_up())
                self._sleep_level = 0

    async def _fall_asleep(self) -> None:
        self._sleep_level = 1
        try:
            await self._while_memory_moves(self._table.sleep())
        except PenstockError:
            self._sleep_level = 0
            raise

    async def _wait_for_next(self) -> None:
        self._woken.set()
        try:
            await asyncio.wait_for(self._ready.wait(), WAKE_TIMEOUT_S)
        except TimeoutError:
            raise NotReadyError(
                f"the engine was not ready within {WAKE_TIMEOUT_S:g} s", retry_after_s=SLEEP_RETRY_S
            ) from None

    async def _while_memory_moves(self, order: Coroutine[None, None, None]) -> None:
        self._is_moving_memory = True
        try:
            await order
        finally:
            self._is_moving_memory = False

    async def _end_process(self) -> None:
        """Level 2: all that the engine holds goes back at once, its context on a device too."""
        assert self._process is not None
        self._sleep_level = 2
        self._state = EngineState.SLEEPING
        self._woken.clear()
        self._ready.clear()
        self._table.fail_started(
            NotReadyError("the model was put to sleep", code="sleeping", retry_after_s=SLEEP_RETRY_S)
        )
        self._send(Shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), CLOSE_TIMEOUT_S)
        await self._process.close()

    async def _start_again(self) -> None:
        """Wait for `wake_up`, then for a new process; requests that waited are sent to it."""
        await self._woken.wait()
        self._state = EngineState.RESTARTING
        self._num_failures = 1
        await self._spawn_after_pause()

    # -- adapters ------------------------------------------------------------------------------------------

    async def adapters(self) -> Sequence[AdapterReport]:
        """See `AdapterEngine`."""
        self._refuse_unless_alive()
        return await self._table.adapters()

    async def load_adapter(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        """See `AdapterEngine`."""
        self._refuse_unless_alive()
        report = await self._table.load_adapter(module, is_replacing=is_replacing)
        self._remember(report)
        return report

    async def unload_adapter(self, name: str) -> AdapterReport:
        """See `AdapterEngine`."""
        self._refuse_unless_alive()
        report = await self._table.unload_adapter(name)
        self._adapters.pop(name, None)
        return report

    def _remember(self, report: AdapterReport) -> None:
        self._adapters[report.name] = LoraModule(
            name=report.name,
            path=report.path,
            allow_links=report.allow_links,
            revision=report.revision,
        )

    def _refuse_unless_alive(self) -> None:
        if self._state is not EngineState.READY:
            raise NotReadyError(
                f"the model is {self._state.value}", code=self._state.value, retry_after_s=RETRY_AFTER_S
            )

    def _refuse_unless_serving(self) -> None:
        self._refuse_unless_alive()
        if self._is_draining:
            raise NotReadyError("the model is draining", code="draining", retry_after_s=RETRY_AFTER_S)
        if self._sleep_level:
            raise NotReadyError("the model is sleeping", code="sleeping", retry_after_s=SLEEP_RETRY_S)

    def _queue_load(self) -> QueueLoad:
        """The queue as the engine last told it; a fast no, the engine has the last word.

        Requests on their way to it count once they are more than it could seat at once.
        """
        limits = self._config.scheduler
        stats = self._stats
        on_their_way = self._table.num_unaccepted - limits.max_num_seqs
        return QueueLoad(
            num_requests=max(stats.num_waiting if stats else 0, on_their_way),
            num_tokens=stats.num_waiting_tokens if stats else 0,
            max_num_requests=limits.max_num_queued_reqs,
            max_num_tokens=limits.max_num_queued_tokens,
        )

    def _queue_is_full(self) -> bool:
        load = self._queue_load()
        return load.num_requests >= load.max_num_requests or (
            load.num_requests > 0 and load.num_tokens >= load.max_num_tokens
        )

    # -- the process ---------------------------------------------------------------------------------------

    def _send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _spawn(self) -> "asyncio.Future[None]":
        """Start a process; the future is done when it is ready, or has said why it cannot be."""
        assert self._folder is not None
        self._generation += 1
        self._death = "died"
        self._stats = None
        self._liveness = Liveness(now_s=self._clock.monotonic())
        self._started = asyncio.get_running_loop().create_future()
        self._process = EngineProcess(
            folder=self._folder, generation=self._generation, on_message=self._on_message
        )
        await self._process.spawn(self._next_config())
        return self._started

    def _next_config(self) -> EngineConfig:
        """The next process's config: after a restart with the adapters of the one before, read on demand."""
        if self._info is None:
            return self._config
        lora = msgspec.structs.replace(self._config.lora, modules=tuple(self._adapters.values()))
        return msgspec.structs.replace(self._config, lora=lora)

    def _on_message(self, message: FromEngine) -> None:
        self._liveness.on_message(now_s=self._clock.monotonic())
        match message:
            case Started(info=info):
                self._on_started(info)
            case Loading(done_bytes=done, total_bytes=total):
                if self._on_progress is not None:
                    self._on_progress(done, total)
            case Fatal(error=error):
                self._on_fatal(info_to_error(error))
            case _:
                if isinstance(message, Output) and message.stats is not None:
                    self._stats = message.stats
                    self._liveness.on_step(message.stats.step_time_s)
                self._table.on_message(message)

    def _on_started(self, info: EngineInfo) -> None:
        self._info = info
        for report in info.adapters:
            self._remember(report)
        self._ready_s = self._clock.monotonic()
        self._liveness.on_started(warmup_s=info.warmup_time_s)
        if self._state is not EngineState.CLOSED:
            # All that is in the table waited for this engine; from READY on new requests join it.
            self._table.resubmit()
            self._state = EngineState.READY
            self._sleep_level = 0
            self._ready.set()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _on_fatal(self, error: PenstockError) -> None:
        if self._info is not None:  # at the first start, `start` raises it
            log.error("the engine reported: %s", error.message)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)

    async def _supervise(self) -> None:
        """Watch the process; when it ends, tell the clients and start another."""
        while True:
            assert self._process is not None
            watchdog = asyncio.create_task(self._watch(self._process), name="engine-watchdog")
            code = await self._process.wait()
            watchdog.cancel()
            if self._state is EngineState.SLEEPING:
                await self._start_again()
                continue
            if self._state is EngineState.CLOSED or not await self._replace(code):
                return

    async def _watch(self, process: EngineProcess) -> None:
        """Ping once a second; kill an engine that has been silent for too long."""
        while True:
            await asyncio.sleep(liveness.PING_INTERVAL_S)
            if self._is_moving_memory:
                continue
            if self._liveness.is_hung(now_s=self._clock.monotonic()):
                log.error("the engine was silent for %.0f s, it is killed", self._liveness.silence_max_s)
                self._death = "hung"
                await process.kill_hung()
                return
            if self._state is EngineState.READY:
                self._send(Ping())

    async def _replace(self, code: int) -> bool:
        """The process has ended: tell whom it concerns and start the next; False if there is none."""
        self._end_start(code)
        if self._info is None:
            return False  # the first start failed; `start` tells and closes
        self._count_failure()
        self._state = EngineState.RESTARTING
        self._table.fail_started(
            EngineDeadError(f"the engine process {self._death}, it is being restarted", retry_after_s=2)
        )
        if self._num_failures >= MAX_STARTS_TO_WAIT_FOR:
            self._table.fail_all(EngineDeadError("the engine does not start", retry_after_s=30))
        log.error("the engine process %s (code %d), restarting", self._death, code)
        self._events.on_engine_restart(self._name, self._death)
        assert self._process is not None
        await self._process.close()
        await self._spawn_after_pause()
        return True

    async def _spawn_after_pause(self) -> None:
        while True:
            await asyncio.sleep(RESTART_PAUSES_S[min(self._num_failures, len(RESTART_PAUSES_S)) - 1])
            try:
                await self._spawn()
            except StartupError:  # the machine has no process or socket to give now
                log.exception("the engine process could not be made")
                self._num_failures += 1
            else:
                return

    def _end_start(self, code: int) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(StartupError(f"the engine process ended with code {code} at start"))
        if self._started is not None and self._info is not None:
            self._started.exception()  # told in the log; only the first start has a caller

    def _count_failure(self) -> None:
        was_healthy = self._state is EngineState.READY and self._clock.monotonic() - self._ready_s > HEALTHY_S
        self._num_failures = 1 if was_healthy else self._num_failures + 1

    def _on_supervisor_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor failed", exc_info=error)
            self._state = EngineState.RESTARTING
            self._table.fail_all(EngineDeadError("the engine's supervisor failed", code="engine_dead"))
