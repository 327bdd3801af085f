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
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Final

from penstock.core.error_info import info_to_error
from penstock.core.errors import (
    EngineDeadError,
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
    TokenDelta,
)
from penstock.engine.client import StreamTable
from penstock.engine.config import EngineConfig, LoraModule, validate_engine_config
from penstock.engine.engine_run import EngineRun
from penstock.engine.kept_adapters import KeptAdapters
from penstock.engine.owned_folder import OwnedFolder
from penstock.engine.restarts import Restarts
from penstock.engine.scheduler.admission import QueueLoad, check_admissible, check_queue, limits_from_info
from penstock.engine.sleep_orders import SLEEP_RETRY_S, SleepOrders
from penstock.engine.wire import Fatal, FromEngine, Loading, Shutdown, Started, ToEngine

CLOSE_TIMEOUT_S: Final = 2.0
RETRY_AFTER_S: Final = 1.0

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
        self._run: EngineRun | None = None
        self._generation = 0
        """Of the run: each has a number of its own."""
        self._restarts = Restarts()
        self._supervisor: asyncio.Task[None] | None = None
        self._folder: OwnedFolder | None = None
        self._orders = SleepOrders(
            self._table, check_alive=self._refuse_unless_alive, end_process=self._end_process
        )
        self._adapters = KeptAdapters()

    @property
    def info(self) -> EngineInfo:
        """Resolved facts; valid after `start`."""
        assert self._info is not None, "start() has returned"
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the running engine."""
        return self._current.pid

    @property
    def _current(self) -> EngineRun:
        assert self._run is not None, "start() has been called"
        return self._run

    @property
    def not_ready_reason(self) -> str | None:
        """None, a state of the drawing, or draining, stuck, queue_full."""
        if self._state is not EngineState.READY:
            return self._state.value
        if self._is_draining:
            return "draining"
        if self.is_sleeping:
            return "sleeping"
        if self._current.is_stuck:
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
            self._folder = OwnedFolder()
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
        if self.is_sleeping:  # what waits for the wake-up cannot end
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
        if self._run is not None and is_serving:
            await self._shut_down(self._run)
        if self._supervisor is not None:
            self._supervisor.cancel()
            await asyncio.gather(self._supervisor, return_exceptions=True)
        if self._run is not None:
            await self._run.close()
        if self._folder is not None:
            self._folder.close()

    async def _shut_down(self, run: EngineRun) -> None:
        """Let the engine end by itself, for a while."""
        run.send(Shutdown())
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(run.wait(), CLOSE_TIMEOUT_S)

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
        return self._orders.level > 0

    async def sleep(self, level: int) -> None:
        """See `EngineAdmin`."""
        await self._orders.sleep(level)

    async def wake_up(self) -> None:
        """See `EngineAdmin`."""
        await self._orders.wake_up()

    async def _end_process(self) -> None:
        self._state = EngineState.SLEEPING
        self._table.fail_started(
            NotReadyError("the model was put to sleep", code="sleeping", retry_after_s=SLEEP_RETRY_S)
        )
        await self._shut_down(self._current)
        await self._current.close()

    async def _start_again(self) -> None:
        """Wait for `wake_up`, then for a new process; requests that waited are sent to it."""
        await self._orders.wait_for_wake_up()
        self._state = EngineState.RESTARTING
        self._restarts.begin_anew()
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
        self._adapters.keep(report)
        return report

    async def unload_adapter(self, name: str) -> AdapterReport:
        """See `AdapterEngine`."""
        self._refuse_unless_alive()
        report = await self._table.unload_adapter(name)
        self._adapters.drop(name)
        return report

    def _refuse_unless_alive(self) -> None:
        if self._state is not EngineState.READY:
            raise NotReadyError(
                f"the model is {self._state.value}", code=self._state.value, retry_after_s=RETRY_AFTER_S
            )

    def _refuse_unless_serving(self) -> None:
        self._refuse_unless_alive()
        if self._is_draining:
            raise NotReadyError("the model is draining", code="draining", retry_after_s=RETRY_AFTER_S)
        if self.is_sleeping:
            raise NotReadyError("the model is sleeping", code="sleeping", retry_after_s=SLEEP_RETRY_S)

    def _queue_load(self) -> QueueLoad:
        """The queue as the engine last told it; a fast no, the engine has the last word.

        Requests on their way to it count once they are more than it could seat at once.
        """
        limits = self._config.scheduler
        stats = self._current.stats
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
        if self._run is not None:
            self._run.send(message)

    async def _spawn(self) -> "asyncio.Future[None]":
        """Start a process; the future is done when it is ready, or has said why it cannot be."""
        assert self._folder is not None
        self._generation += 1
        self._run = EngineRun(
            folder=self._folder.path,
            generation=self._generation,
            clock=self._clock,
            on_message=self._on_message,
        )
        is_first = self._info is None
        await self._run.spawn(self._config if is_first else self._adapters.in_config(self._config))
        return self._run.started

    def _on_message(self, message: FromEngine) -> None:
        match message:
            case Started(info=info):
                self._on_started(info)
            case Loading(done_bytes=done, total_bytes=total):
                if self._on_progress is not None:
                    self._on_progress(done, total)
            case Fatal(error=error):
                self._on_fatal(info_to_error(error))
            case _:
                self._table.on_message(message)

    def _on_started(self, info: EngineInfo) -> None:
        self._info = info
        for report in info.adapters:
            self._adapters.keep(report)
        self._current.note_ready(info)
        if self._state is not EngineState.CLOSED:
            # All that is in the table waited for this engine; from READY on new requests join it.
            self._table.resubmit()
            self._state = EngineState.READY
            self._orders.note_ready()
        self._current.end_start()

    def _on_fatal(self, error: PenstockError) -> None:
        if self._info is not None:  # at the first start, `start` raises it
            log.error("the engine reported: %s", error.message)
        self._current.end_start(error)

    async def _supervise(self) -> None:
        """Watch the process; when it ends, tell the clients and start another."""
        while True:
            watchdog = asyncio.create_task(self._watch(self._current), name="engine-watchdog")
            code = await self._current.wait()
            watchdog.cancel()
            if self._state is EngineState.SLEEPING:
                await self._start_again()
                continue
            if self._state is EngineState.CLOSED or not await self._replace(code):
                return

    async def _watch(self, run: EngineRun) -> None:
        await run.watch(
            may_be_silent=lambda: self._orders.is_moving_memory,
            is_serving=lambda: self._state is EngineState.READY,
        )

    async def _replace(self, code: int) -> bool:
        """The process has ended: tell whom it concerns and start the next; False if there is none."""
        run = self._current
        run.end_start(StartupError(f"the engine process ended with code {code} at start"))
        if self._info is None:
            return False  # the first start failed; `start` tells and closes
        run.started.exception()  # told in the log; only the first start has a caller
        self._restarts.note_death(served_s=run.served_s if self._state is EngineState.READY else 0.0)
        self._state = EngineState.RESTARTING
        self._table.fail_started(
            EngineDeadError(f"the engine process {run.death}, it is being restarted", retry_after_s=2)
        )
        if self._restarts.is_in_vain:
            self._table.fail_all(EngineDeadError("the engine does not start", retry_after_s=30))
        log.error("the engine process %s (code %d), restarting", run.death, code)
        self._events.on_engine_restart(self._name, run.death)
        await run.close()
        await self._spawn_after_pause()
        return True

    async def _spawn_after_pause(self) -> None:
        while True:
            await asyncio.sleep(self._restarts.pause_s)
            try:
                await self._spawn()
            except StartupError:  # the machine has no process or socket to give now
                log.exception("the engine process could not be made")
                self._restarts.note_failed_start()
            else:
                return

    def _on_supervisor_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor failed", exc_info=error)
            self._state = EngineState.RESTARTING
            self._table.fail_all(EngineDeadError("the engine's supervisor failed", code="engine_dead"))
