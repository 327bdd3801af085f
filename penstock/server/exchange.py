"""One HTTP request in flight, and the three ways in which it is ended from outside.

The client may leave, the reader may be too slow, the server may be told to stop. Each cancels the task that
works on the request, with the reason kept here, so that the work behind it ends at once, streaming or not.
"""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

from starlette.types import Receive

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads the answer."""


class SlowReaderError(Exception):
    """The client has not taken a byte for too long; its connection is cut."""


class Exchange:
    """Runs the work of one request in the current task and lets others stop it, with a reason.

    States: idle, running (inside `run`), stopped (`reason` set). A stop before or after `run` is kept and
    raised by the next `run`.
    """

    def __init__(self) -> None:
        self._task: asyncio.Task[object] | None = None
        self._reason: Exception | None = None

    def stop(self, reason: Exception) -> None:
        """Cancel the work; `run` then raises `reason`. The first reason stays."""
        if self._reason is None:
            self._reason = reason
            if self._task is not None:
                self._task.cancel()

    async def run(self, work: Coroutine[None, None, T], *, receive: Receive) -> T:
        """Await `work`, watching the connection; the request's body must have been read.

        Raises:
            ClientGoneError: the client left; `work` has been cancelled and has ended.
            Exception: the reason given to `stop`, or what `work` raised.
        """
        task = asyncio.current_task()
        assert task is not None
        if self._reason is not None:
            work.close()
            raise self._reason
        self._task = task
        watcher = asyncio.create_task(self._watch(receive))
        try:
            result = await work
        except asyncio.CancelledError:
            reason = self._stopped()
            if reason is None or task.uncancel() > 0:
                raise
            raise reason from None
        else:
            if self._stopped() is not None:
                task.uncancel()
            return result
        finally:
            self._task = None
            watcher.cancel()

    def _stopped(self) -> Exception | None:
        return self._reason

    async def _watch(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self.stop(ClientGoneError())


class InFlight:
    """The requests that are being worked on; lets shutdown wait for them or stop them."""

    def __init__(self) -> None:
        self._exchanges: set[Exchange] = set()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._exchanges)

    def add(self, exchange: Exchange) -> None:
        """Take a request in."""
        self._exchanges.add(exchange)
        self._empty.clear()

    def remove(self, exchange: Exchange) -> None:
        """Let a request go, finished or not."""
        self._exchanges.discard(exchange)
        if not self._exchanges:
            self._empty.set()

    async def wait_empty(self) -> None:
        """Return when no request is left."""
        await self._empty.wait()

    def stop_all(self, reason: Exception) -> None:
        """Stop every request; each tells its client `reason`."""
        for exchange in list(self._exchanges):
            exchange.stop(reason)
