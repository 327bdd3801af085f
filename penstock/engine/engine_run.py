"""One engine process from its start to its end, and what was heard of it meanwhile.

```
spawn > Loading ... > Started > Output ... > end
        started is pending    | done        died, or hung and killed
```

A restart makes a new one, so that nothing of the old is taken for the new. It decides nothing: that is for
`supervisor`.
"""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

from penstock.core.errors import PenstockError
from penstock.core.ports import Clock
from penstock.core.tokens import EngineInfo, StepStats
from penstock.engine import liveness
from penstock.engine.child import EngineProcess
from penstock.engine.config import EngineConfig
from penstock.engine.liveness import Liveness
from penstock.engine.wire import FromEngine, Output, Ping, ToEngine

log = logging.getLogger("penstock.supervisor")


class EngineRun:
    """See the module."""

    def __init__(
        self, *, folder: Path, generation: int, clock: Clock, on_message: Callable[[FromEngine], None]
    ) -> None:
        """Start nothing yet; to be made in the event loop.

        Args:
            folder: private (0700) folder for the socket.
            generation: number of this process.
            clock: for the watchdog.
            on_message: called with every message, in order.
        """
        self._clock = clock
        self._on_message = on_message
        self._process = EngineProcess(folder=folder, generation=generation, on_message=self._hear)
        self._liveness = Liveness(now_s=clock.monotonic())
        self._ready_s = 0.0
        self.started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when it is ready, or has said why it cannot be."""
        self.stats: StepStats | None = None
        """Of its latest step."""
        self.death = "died"
        """How it ended, or will if nothing else happens."""

    @property
    def pid(self) -> int:
        """Process id; valid once spawned."""
        return self._process.pid

    @property
    def is_stuck(self) -> bool:
        """True if it is too quiet, though not yet hung."""
        return self._liveness.is_stuck(now_s=self._clock.monotonic())

    @property
    def served_s(self) -> float:
        """Seconds since it was ready."""
        return self._clock.monotonic() - self._ready_s

    async def spawn(self, config: EngineConfig) -> None:
        """Start the process; returns before it has loaded.

        Raises:
            StartupError: no socket or no process could be made.
        """
        await self._process.spawn(config)

    def send(self, message: ToEngine) -> None:
        """Hand over a message; one to a process that has gone is lost with it."""
        self._process.send(message)

    def note_ready(self, info: EngineInfo) -> None:
        """It serves from here on, and is judged as a serving engine."""
        self._ready_s = self._clock.monotonic()
        self._liveness.on_started(warmup_s=info.warmup_time_s)

    def end_start(self, error: PenstockError | None = None) -> None:
        """Who waits for the start is told, once: it is ready, or why it cannot be."""
        if self.started.done():
            return
        if error is None:
            self.started.set_result(None)
        else:
            self.started.set_exception(error)

    async def watch(self, *, may_be_silent: Callable[[], bool], is_serving: Callable[[], bool]) -> None:
        """Ping once a second; kill it if it has been silent for too long.

        Args:
            may_be_silent: True while it moves memory, which takes as long as it takes.
            is_serving: True while it answers pings.
        """
        while True:
            await asyncio.sleep(liveness.PING_INTERVAL_S)
            if may_be_silent():
                continue
            if self._liveness.is_hung(now_s=self._clock.monotonic()):
                log.error("the engine was silent for %.0f s, it is killed", self._liveness.silence_max_s)
                self.death = "hung"
                await self._process.kill_hung()
                return
            if is_serving():
                self.send(Ping())

    async def wait(self) -> int:
        """Exit code, after its last message has been read."""
        return await self._process.wait()

    async def close(self) -> None:
        """Kill, reap and close the socket."""
        await self._process.close()

    def _hear(self, message: FromEngine) -> None:
        self._liveness.on_message(now_s=self._clock.monotonic())
        if isinstance(message, Output) and message.stats is not None:
            self.stats = message.stats
            self._liveness.on_step(message.stats.step_time_s)
        self._on_message(message)
