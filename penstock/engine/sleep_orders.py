"""Orders to sleep and to wake up, as the API side carries them out.

```
level 1   the process stays and gives memory back (`sleep`, in the engine)
level 2   the process ends, and all that it holds goes back at once, its context on a device too
```

Each order ends before the next begins. `supervisor` owns it, and the process.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Final

from penstock.core.errors import InvalidParameterError, NotReadyError, PenstockError
from penstock.engine.client import StreamTable

SLEEP_RETRY_S: Final = 10.0
"""For requests to a model that sleeps: an operator must wake it."""
WAKE_TIMEOUT_S: Final = 600.0
"""An engine is ready again within this time."""

log = logging.getLogger("penstock.supervisor")


class SleepOrders:
    """See the module."""

    def __init__(
        self,
        table: StreamTable,
        *,
        check_alive: Callable[[], None],
        end_process: Callable[[], Awaitable[None]],
    ) -> None:
        """Awake.

        Args:
            table: speaks to the engine.
            check_alive: raises unless there is a ready engine.
            end_process: ends it, until `wait_for_wake_up` returns to the supervisor.
        """
        self._table = table
        self._check_alive = check_alive
        self._end_process = end_process
        self._one_at_a_time = asyncio.Lock()
        self._woken = asyncio.Event()
        self._ready = asyncio.Event()
        self.level = 0
        """0 awake, or as `EngineAdmin.sleep`."""
        self.is_moving_memory = False
        """The engine is silent for as long as it takes."""

    async def sleep(self, level: int) -> None:
        """See `EngineAdmin`."""
        if level not in {1, 2}:
            raise InvalidParameterError(f"level is {level}, it must be 1 or 2", param="level")
        async with self._one_at_a_time:
            if self.level >= level:
                return
            self._check_alive()
            if level == 2:
                await self._give_up_process()
            else:
                await self._fall_asleep()
            log.info("the model is asleep, level %d", level)

    async def wake_up(self) -> None:
        """See `EngineAdmin`."""
        async with self._one_at_a_time:
            if self.level == 2:
                await self._wait_for_next()
            elif self.level == 1:
                await self._while_memory_moves(self._table.wake_up())
                self.level = 0
            else:
                return
            log.info("the model is awake")

    async def wait_for_wake_up(self) -> None:
        """Return when a new process is wanted."""
        await self._woken.wait()

    def note_ready(self) -> None:
        """A process serves: nobody sleeps."""
        self.level = 0
        self._ready.set()

    async def _give_up_process(self) -> None:
        self.level = 2
        self._woken.clear()
        self._ready.clear()
        await self._end_process()

    async def _fall_asleep(self) -> None:
        self.level = 1
        try:
            await self._while_memory_moves(self._table.sleep())
        except PenstockError:
            self.level = 0
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
        self.is_moving_memory = True
        try:
            await order
        finally:
            self.is_moving_memory = False
