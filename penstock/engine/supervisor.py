"""Starts the engine process, watches it, restarts it, and speaks for it to the API side.

States of the engine, as `not_ready_reason` tells them:

```
            start()                Started
  new ---------------> loading ---------------> ready (None) <--------+
                          |                       |  |                | Started
                 StartupError                died |  | hung           |
                          v                       v  v                |
                        dead <---- 5 failures -- restarting ----------+
  drain(): ready -> draining -> close(): closed
```

When the process dies, requests that have produced a token end with `EngineDeadError` at once; the others
are queued again, once, at the next engine.
"""

import asyncio
import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from pathlib import Path
from typing import Final, cast

import zmq
import zmq.asyncio

from penstock.core.error_info import info_to_error
from penstock.core.errors import EngineDeadError, NotReadyError, PenstockError, QueueFullError, StartupError
from penstock.core.ids import ModelName
from penstock.core.ports import Clock, EngineEvents
from penstock.core.tokens import EngineInfo, EngineRequest, MemoryReport, RequestReport, TokenDelta
from penstock.engine.client import StreamTable
from penstock.engine.config import EngineConfig, validate_engine_config
from penstock.engine.wire import (
    Fatal,
    FromEngine,
    Loading,
    Output,
    Ping,
    Shutdown,
    Start,
    Started,
    ToEngine,
    decode_from_engine,
    encode,
)

PING_INTERVAL_S: Final = 1.0
WATCHDOG_MIN_S: Final = 5.0
WATCHDOG_STEPS: Final = 20
"""The engine is hung if it is silent for this many times its longest step so far (at least 5 s)."""
STUCK_S: Final = 3.0
"""Readiness turns off when the engine has been silent for this long."""
RESTART_BACKOFF_S: Final = (0.0, 0.5, 1.0, 2.0, 5.0)
CLOSE_TIMEOUT_S: Final = 2.0
CHILD_ENVIRONMENT: Final = {"THP_MEM_ALLOC_ENABLE": "1"}
"""torch takes huge pages for its tensors: fresh 4 KiB pages made a 39 MB logits tensor cost 20 ms, not 6."""
MAX_LAST_MESSAGES: Final = 1000
"""Messages read after a child's end before its socket is given up."""

log = logging.getLogger("penstock.supervisor")


class EngineProcess:
    """One engine process and its socket; a restart makes a new one, so that stale messages cannot arrive."""

    def __init__(self, *, folder: Path, generation: int, on_message: Callable[[FromEngine], None]) -> None:
        self._address = f"ipc://{folder}/engine-{generation}"
        self._on_message = on_message
        self._socket: zmq.asyncio.Socket = zmq.asyncio.Context.instance().socket(zmq.PAIR)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._address)
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self._unsent: set[asyncio.Future[object]] = set()

    @property
    def pid(self) -> int:
        """Process id of the running engine."""
        assert self._process is not None
        return self._process.pid

    async def spawn(self, config: EngineConfig) -> None:
        """Start the child and hand it its config; returns before it has loaded."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "penstock.engine.process",
            self._address,
            stdin=asyncio.subprocess.DEVNULL,
            env={**os.environ, **CHILD_ENVIRONMENT},
        )
        self._reader = asyncio.create_task(self._read(), name="engine-reader")
        self.send(Start(config))

    def send(self, message: ToEngine) -> None:
        """Hand a message to the socket; a message to a dead engine is lost with it."""
        if self._socket.closed:
            return
        # pyzmq's stub calls it Awaitable; the asyncio socket returns a Future.
        sent = cast("asyncio.Future[object]", self._socket.send(encode(message)))
        if not sent.done():
            self._unsent.add(sent)
            sent.add_done_callback(self._unsent.discard)

    async def wait(self) -> int:
        """Exit code of the child, after its last message has been read; 0 if it never came to be."""
        if self._process is None:
            return 0  # closed while it was being spawned
        code = await self._process.wait()
        await self._read_rest()
        return code

    def kill(self) -> None:
        """SIGKILL; does nothing if it has ended."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def close(self) -> None:
        """Kill, reap and close the socket."""
        self.kill()
        if self._process is not None:
            await self._process.wait()
        if self._reader is not None:
            self._reader.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._reader
        self._socket.close(linger=0)

    async def _read(self) -> None:
        while True:
            self._on_message(decode_from_engine(await self._socket.recv()))

    async def _read_rest(self) -> None:
        """Give the reader a moment for what the child sent before it ended."""
        for _ in range(MAX_LAST_MESSAGES):
            if not await self._socket.poll(timeout=20):
                return
            await asyncio.sleep(0)


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
        self._process: EngineProcess | None = None
        self._info: EngineInfo | None = None
        self._state: str | None = "new"
        self._started: asyncio.Future[None] | None = None
        self._last_heard_s = 0.0
        self._step_max_s = 0.0
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._kill_reason = "died"
        self._generation = 0
        self._supervisor: asyncio.Task[None] | None = None
        self._folder: Path | None = None

    @property
    def info(self) -> EngineInfo:
        """Resolved facts; valid after `start`."""
        assert self._info is not None, "start() has returned"
        return self._info

    @property
    def pid(self) -> int:
        """Process id of the running engine."""
        assert self._process is not None, "start() has returned"
        return self._process.pid

    @property
    def num_in_flight(self) -> int:
        """Requests submitted and not ended."""
        return len(self._table)

    @property
    def not_ready_reason(self) -> str | None:
        """See the module's drawing; also `stuck` and `queue_full`."""
        if self._state is not None:
            return self._state
        if self._clock.monotonic() - self._last_heard_s > max(STUCK_S, 2 * self._step_max_s):
            return "stuck"
        return "queue_full" if self._queue_is_full else None

    @property
    def _queue_is_full(self) -> bool:
        limits = self._config.scheduler
        return (
            self._num_waiting >= limits.max_num_queued_reqs
            or self._num_waiting_tokens >= limits.max_num_queued_tokens
        )

    async def start(self) -> None:
        """Spawn the engine and wait until it is warm.

        Raises:
            StartupError: the config, the checkpoint or the machine does not allow it.
        """
        validate_engine_config(self._config)
        self._folder = Path(tempfile.mkdtemp(prefix="penstock-"))  # mode 0700
        self._state = "loading"
        await self._spawn()
        assert self._started is not None
        try:
            await self._started
        except PenstockError:
            await self.close()
            raise

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """See `EngineClient`."""
        if self._state is not None:
            raise NotReadyError(f"the model is {self._state}", code=self._state, retry_after_s=1)
        if self._queue_is_full:
            raise QueueFullError(
                f"{self._num_waiting} requests with {self._num_waiting_tokens} tokens wait, "
                f"the limits are {self._config.scheduler.max_num_queued_reqs} and "
                f"{self._config.scheduler.max_num_queued_tokens}",
                retry_after_s=1,
            )
        self._num_waiting += 1
        self._num_waiting_tokens += len(request.prompt_token_ids)
        return await self._table.submit(request)

    async def memory(self) -> MemoryReport:
        """See `EngineAdmin`."""
        answer = await self._table.ask("memory")
        assert answer.memory is not None
        return answer.memory

    async def requests(self) -> Sequence[RequestReport]:
        """See `EngineAdmin`."""
        answer = await self._table.ask("requests")
        assert answer.requests is not None
        return answer.requests

    def stop_admitting(self) -> None:
        """From now on `generate` raises `NotReadyError`."""
        if self._state is None:
            self._state = "draining"

    async def drain(self, budget_s: float) -> bool:
        """Stop admitting and wait for what is in flight.

        Returns:
            True if everything ended within the budget.
        """
        self.stop_admitting()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._table.wait_empty(), budget_s)
        return not self._table

    def abort_all(self, error: PenstockError) -> None:
        """End every request in flight with `error`."""
        self._table.fail_all(error)

    async def close(self) -> None:
        """End the engine; requests in flight end with `EngineDeadError`. Closing twice does nothing more."""
        if self._state == "closed":
            return
        self._state = "closed"
        self._table.fail_all(EngineDeadError("the server is shutting down", code="shutting_down"))
        if self._process is not None:
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

    def _send(self, message: ToEngine) -> None:
        if self._process is not None:
            self._process.send(message)

    async def _spawn(self) -> None:
        assert self._folder is not None
        self._generation += 1
        self._kill_reason = "died"
        self._started = asyncio.get_running_loop().create_future()
        self._process = EngineProcess(
            folder=self._folder, generation=self._generation, on_message=self._on_message
        )
        await self._process.spawn(self._config)
        if self._supervisor is None:
            self._supervisor = asyncio.create_task(self._supervise(), name="engine-supervisor")
            self._supervisor.add_done_callback(self._on_supervisor_end)

    def _on_message(self, message: FromEngine) -> None:
        self._last_heard_s = self._clock.monotonic()
        match message:
            case Started(info=info):
                self._on_started(info)
            case Loading(done_bytes=done, total_bytes=total):
                if self._on_progress is not None:
                    self._on_progress(done, total)
            case Fatal(error=error):
                self._on_fatal(info_to_error(error))
            case Output(stats=stats) if stats is not None:
                self._step_max_s = max(self._step_max_s, stats.step_time_s)
                self._num_waiting = stats.num_waiting
                self._num_waiting_tokens = stats.num_waiting_tokens
                self._table.on_message(message)
            case _:
                self._table.on_message(message)

    def _on_started(self, info: EngineInfo) -> None:
        self._info = info
        self._step_max_s = max(self._step_max_s, info.warmup_time_s)
        self._num_waiting = self._num_waiting_tokens = 0
        if self._state != "closed":
            self._state = None
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _on_fatal(self, error: PenstockError) -> None:
        if self._info is not None:  # at the first start, `start` raises it
            log.error("the engine reported: %s", error.message)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)

    async def _supervise(self) -> None:
        """Watch the process; when it ends, tell the clients and start another."""
        while self._state != "closed":
            assert self._process is not None
            watchdog = asyncio.create_task(self._watch(), name="engine-watchdog")
            code = await self._process.wait()
            watchdog.cancel()
            if self._state == "closed":
                return
            await self._on_death(code)
            if self._state == "dead":
                return

    async def _watch(self) -> None:
        """Ping once a second; kill an engine that has been silent for too long."""
        while True:
            await asyncio.sleep(PING_INTERVAL_S)
            if self._state not in (None, "draining"):
                continue
            self._send(Ping())
            silent_s = self._clock.monotonic() - self._last_heard_s
            if silent_s > max(WATCHDOG_MIN_S, WATCHDOG_STEPS * self._step_max_s):
                log.error("the engine was silent for %.1f s, it is killed", silent_s)
                self._kill_reason = "hung"
                assert self._process is not None
                self._process.kill()

    async def _on_death(self, code: int) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(StartupError(f"the engine process ended with code {code} at start"))
        if self._info is None:
            self._state = "dead"
            return
        was_draining = self._state == "draining"
        self._state = "restarting"
        self._table.take_restartable(
            EngineDeadError(f"the engine process {self._kill_reason}, it is being restarted", retry_after_s=2)
        )
        log.error("the engine process %s (code %d), restarting", self._kill_reason, code)
        self._events.on_engine_restart(self._name, self._kill_reason)
        await self._restart()
        if was_draining and self._is_serving():
            self._state = "draining"

    def _is_serving(self) -> bool:
        return self._state is None

    async def _restart(self) -> None:
        for pause_s in RESTART_BACKOFF_S:
            assert self._process is not None
            await self._process.close()
            await asyncio.sleep(pause_s)
            await self._spawn()
            if await self._starts():
                self._table.resubmit()
                return
        self._state = "dead"
        self._table.fail_all(EngineDeadError("the engine could not be restarted", code="engine_dead"))
        log.error("the engine did not start %d times in a row, giving up", len(RESTART_BACKOFF_S))

    async def _starts(self) -> bool:
        """True once the fresh process is ready, False if it ended before."""
        assert self._started is not None
        assert self._process is not None
        exited = asyncio.create_task(self._process.wait())
        waited: set[asyncio.Future[None] | asyncio.Task[int]] = {self._started, exited}
        await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
        exited.cancel()
        return self._started.done() and self._started.exception() is None

    def _on_supervisor_end(self, task: "asyncio.Task[None]") -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("the supervisor failed", exc_info=error)
            self._state = "dead"
            self._table.fail_all(EngineDeadError("the engine's supervisor failed", code="engine_dead"))
