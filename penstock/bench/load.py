"""Sends a workload and collects what became of it: `run_load` for scripts, `drive` inside a running loop.

Two ways to load a server:

- *open loop*: each request is sent when it is due, whatever the server does, and its latency counts from the
  time when it was due. A client that falls behind makes the figures worse, not better (no coordinated
  omission); by how much it fell behind is in the result.
- *closed loop*: `max_concurrency` users, each sends its next request when its last one has ended. A user
  who is refused with a `Retry-After` waits so long first: a server that restarts is not asked thousands of
  times.

One asyncio loop in one thread. A failed request is recorded, never sent again. The run ends early when the
server is gone (`server_died`) or at Ctrl-C or SIGTERM (`interrupted`); what was measured until then is kept.
"""

import asyncio
import contextlib
import resource
import signal
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit

from penstock.bench.client import (
    TRANSPORT_KINDS,
    RequestRecord,
    RequestSender,
    open_session,
)
from penstock.bench.target import Target
from penstock.bench.workload import LoadRequest, Workload
from penstock.core.errors import InvalidParameterError

MAX_IN_FLIGHT: Final = 4096
"""Streams of one client at once; in an open loop a request beyond it waits, at its own cost."""
TICK_S: Final = 0.1
"""Period of the watcher, and of the probe for the loop's own delay."""
ALIVE_DELAYS_S: Final = (0.0, 0.2, 0.5)
"""Before each of the attempts to reach a server that broke a connection; after them it counts as gone."""
ALIVE_TIMEOUT_S: Final = 2.0
RESERVED_FILES: Final = 64
"""Open files beside the connections: the loop's own, libraries, the terminal."""

Status = Literal["complete", "interrupted", "server_died"]
Send = Callable[[LoadRequest, RequestRecord], Awaitable[None]]


@dataclass(slots=True, kw_only=True)
class Counters:
    """Where a run stands; mutated by `Load`, read by watchers."""

    num_requests: int
    elapsed_s: float = 0.0
    num_sent: int = 0
    num_done: int = 0
    """Ended, well or not."""
    num_failed: int = 0
    num_pieces: int = 0
    """Pieces of text, of all requests together; about as many as tokens."""
    last_ttft_s: float | None = None

    @property
    def num_in_flight(self) -> int:
        """Sent and not ended."""
        return self.num_sent - self.num_done


class Watcher(Protocol):
    """Shows a run while it goes on."""

    def tick(self, counters: Counters) -> None:
        """Called about ten times a second in the loop's thread; must be quick."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCost:
    """What the load generator itself used, so that nobody blames the server for it."""

    cpu_s: float
    """CPU time of the loop's thread, in seconds."""
    cpu_share: float
    """`cpu_s` over the duration; 1 is a whole core, and then the client is the limit."""
    loop_delays_s: tuple[float, ...]
    """How late each of the probes (every `TICK_S`) ran."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """Everything that was seen. Records are in the order of the workload; those never sent are absent."""

    workload: Workload
    records: tuple[RequestRecord, ...]
    duration_s: float
    """From the start to the end of the last request."""
    status: Status
    detail: str = ""
    """Why it did not complete; empty if it did."""
    num_held: int = 0
    """Requests of an open loop that were due while `max_concurrency` were in flight, and waited."""
    max_in_flight: int = 0
    """Most requests in flight at one time."""
    cost: ClientCost

    @property
    def is_complete(self) -> bool:
        """Every request was sent and has ended."""
        return self.status == "complete"


@dataclass(slots=True)
class _Stop:
    """The first reason to end early; later ones are not heard."""

    event: asyncio.Event = field(default_factory=asyncio.Event)
    status: Status = "complete"
    detail: str = ""

    def set(self, status: Status, detail: str) -> None:
        """End the run."""
        if not self.event.is_set():
            self.status, self.detail = status, detail
            self.event.set()


class Load:
    """One run over a workload.

    Args:
        workload: what to send.
        is_alive: asked after a broken connection; False ends the run.
        clock: seconds, monotonic; the start of the run is subtracted in everything recorded.
        num_places: most requests in flight, whatever the workload says.
        watcher: told how it goes, or None.
    """

    def __init__(
        self,
        workload: Workload,
        *,
        is_alive: Callable[[], Awaitable[bool]],
        clock: Callable[[], float],
        num_places: int = MAX_IN_FLIGHT,
        watcher: Watcher | None = None,
    ) -> None:
        self._workload = workload
        self._is_alive = is_alive
        self._clock = clock
        self._watcher = watcher
        self._stop = _Stop()
        self._fault: BaseException | None = None
        self._records: dict[int, RequestRecord] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._places = asyncio.Semaphore(min(workload.max_concurrency or num_places, num_places))
        self._alive_check: asyncio.Task[bool] | None = None
        self._num_held = 0
        self._max_in_flight = 0
        self._loop_delays_s: list[float] = []
        self.counters = Counters(num_requests=len(workload.requests))
        self._start_s = clock()

    def now(self) -> float:
        """Seconds after the start."""
        return self._clock() - self._start_s

    def on_piece(self, record: RequestRecord) -> None:
        """A piece of text came."""
        self.counters.num_pieces += 1
        if len(record.pieces_s) == 1:
            self.counters.last_ttft_s = record.ttft_s

    def interrupt(self) -> None:
        """End early and keep what is there."""
        self._stop.set("interrupted", "stopped by the user")

    async def run(self, send: Send) -> LoadResult:
        """Send everything; the run starts now.

        Args:
            send: sends one request and fills its record; raises nothing but cancellation.
        """
        self._start_s = self._clock()
        cpu_start_s = time.thread_time()
        async with self._probed():
            await self._until_done_or_stopped(send)
        duration_s = max((record.end_s for record in self._records.values()), default=self.now())
        cpu_s = time.thread_time() - cpu_start_s
        return LoadResult(
            workload=self._workload,
            records=tuple(self._records[index] for index in sorted(self._records)),
            duration_s=duration_s,
            status=self._stop.status,
            detail=self._stop.detail,
            num_held=self._num_held,
            max_in_flight=self._max_in_flight,
            cost=ClientCost(
                cpu_s=cpu_s,
                cpu_share=cpu_s / duration_s if duration_s > 0 else 0.0,
                loop_delays_s=tuple(self._loop_delays_s),
            ),
        )

    async def _until_done_or_stopped(self, send: Send) -> None:
        sending = asyncio.create_task(self._send_all(send))
        stopping = asyncio.create_task(self._stop.event.wait())
        await asyncio.wait({sending, stopping}, return_when=asyncio.FIRST_COMPLETED)
        unfinished = {sending, stopping, *self._tasks}
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        if self._fault is not None:
            raise self._fault  # a fault of ours must not pass for the end of the run

    async def _send_all(self, send: Send) -> None:
        for index, request in enumerate(self._workload.requests):
            if self._workload.is_open_loop:
                await self._wait_until(request.arrival_s)
            await self._place()
            task = asyncio.create_task(self._one(index, request, send=send))
            self._tasks.add(task)
            task.add_done_callback(self._reap)
        while self._tasks:
            await asyncio.wait(self._tasks)

    def _reap(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self._fault = error
            self._stop.set("interrupted", repr(error))

    async def _wait_until(self, due_s: float) -> None:
        delay_s = due_s - self.now()
        if delay_s > 0:
            await asyncio.sleep(delay_s)

    async def _place(self) -> None:
        if self._places.locked() and self._workload.is_open_loop:
            self._num_held += 1
        await self._places.acquire()

    async def _one(self, index: int, request: LoadRequest, *, send: Send) -> None:
        start_s = request.arrival_s if self._workload.is_open_loop else self.now()
        record = RequestRecord(
            index=index, num_output_tokens_asked=request.num_output_tokens, start_s=start_s, sent_s=start_s
        )
        self._records[index] = record
        self.counters.num_sent += 1
        self._max_in_flight = max(self._max_in_flight, self.counters.num_in_flight)
        try:
            await send(request, record)
        finally:
            self.counters.num_done += 1
            self.counters.num_failed += not record.is_ok
        # A user whose connection broke does not send again before it is known why, nor if the server is gone.
        if record.failure is None or record.failure.kind not in TRANSPORT_KINDS or await self._lives():
            if not self._workload.is_open_loop and self.counters.num_sent < self.counters.num_requests:
                await asyncio.sleep(record.retry_after_s)
            self._places.release()
        else:
            self._stop.set("server_died", f"nobody listens there any more ({record.failure.message})")

    async def _lives(self) -> bool:
        """Whether the server is still there; asked once at a time, however many requests broke."""
        if self._alive_check is None or self._alive_check.done():
            self._alive_check = asyncio.ensure_future(self._is_alive())
        return await asyncio.shield(self._alive_check)

    @contextlib.asynccontextmanager
    async def _probed(self) -> AsyncIterator[None]:
        probe = asyncio.create_task(self._probe())
        try:
            yield
        finally:
            probe.cancel()
            await asyncio.gather(probe, return_exceptions=True)

    async def _probe(self) -> None:
        while True:
            due_s = self.now() + TICK_S
            await asyncio.sleep(TICK_S)
            self._loop_delays_s.append(max(0.0, self.now() - due_s))
            self.counters.elapsed_s = self.now()
            if self._watcher is not None:
                self._watcher.tick(self.counters)


async def drive(workload: Workload, target: Target, *, watcher: Watcher | None = None) -> LoadResult:
    """Run a workload against a server, in the running loop. See `run_load`."""
    num_connections = allow_connections(workload)
    async with open_session(target, num_connections=num_connections) as session:
        load = Load(
            workload,
            num_places=num_connections,
            is_alive=lambda: is_alive(target.base_url),
            clock=time.perf_counter,
            watcher=watcher,
        )
        sender = RequestSender(session, target=target, clock=load.now, on_piece=load.on_piece)
        with _interrupted_by_signals(load):
            return await load.run(sender.send)


def allow_connections(workload: Workload) -> int:
    """How many connections the workload may have at once; raises the limit of open files if it can.

    Raises:
        InvalidParameterError: the system allows fewer than `max_concurrency`.
    """
    wanted = min(workload.max_concurrency or len(workload.requests), MAX_IN_FLIGHT)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_FILES
    if hard != resource.RLIM_INFINITY:
        needed = min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    allowed = max(1, min(wanted, needed - RESERVED_FILES))
    if workload.max_concurrency is not None and allowed < wanted:
        limit = f"the system's limit of open files allows {allowed}"
        raise InvalidParameterError(
            f"max_concurrency is {workload.max_concurrency}, {limit}", param="max_concurrency"
        )
    return allowed


def run_load(workload: Workload, target: Target, *, watcher: Watcher | None = None) -> LoadResult:
    """Run a workload against a server and return what was seen; for scripts without a loop of their own.

    Args:
        workload: `workload.from_lists(prompts, output_lens=..., arrival_s=..., max_concurrency=...)`.
        target: the server; nothing is asked of it beforehand (`probe.connect` finds out its models).
        watcher: e.g. `progress.live(...)`.

    Returns:
        The result, also of a run that ended early: look at `status`. `measure.summarize` makes figures of it.
        In the main thread Ctrl-C and SIGTERM end the run and not the program.
    """
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(drive(workload, target, watcher=watcher))


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Uvloop where it is installed: it takes less of the CPU that a server beside it needs."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop


async def is_alive(base_url: str) -> bool:
    """True if somebody listens at the address: three attempts within a second, then no."""
    parts = urlsplit(base_url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    for delay_s in ALIVE_DELAYS_S:
        await asyncio.sleep(delay_s)
        try:
            async with asyncio.timeout(ALIVE_TIMEOUT_S):
                _, writer = await asyncio.open_connection(parts.hostname, port)
        except OSError:
            continue
        writer.close()
        return True
    return False


@contextlib.contextmanager
def _interrupted_by_signals(load: Load) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM ends the run; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def stop() -> None:
        for number in signals:
            loop.remove_signal_handler(number)
        load.interrupt()

    for number in signals:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in signals:
            loop.remove_signal_handler(number)
