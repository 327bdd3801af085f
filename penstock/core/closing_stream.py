"""An async generator that is a class: closing it before its first item runs its code, too.

Streams of tokens and of text are such, so that a client that leaves early cancels its request.
"""

from abc import abstractmethod
from collections.abc import AsyncGenerator
from types import TracebackType
from typing import TypeVar

Item = TypeVar("Item")


class ClosingStream(AsyncGenerator[Item, None]):
    """A subclass says what comes next and what closing means."""

    @abstractmethod
    async def __anext__(self) -> Item:
        """The next item; raises StopAsyncIteration after the last one, and after `aclose`."""

    @abstractmethod
    async def aclose(self) -> None:
        """End it; safe at any time, any number of times."""

    async def asend(self, value: None) -> Item:  # noqa: ARG002  # the protocol's parameter
        """Same as `__anext__`; nothing can be sent in."""
        return await self.__anext__()

    async def athrow(
        self,
        typ: type[BaseException] | BaseException,
        val: BaseException | object = None,
        tb: TracebackType | None = None,
        /,
    ) -> Item:
        """Close, then raise the given exception, as a generator would."""
        await self.aclose()
        if isinstance(typ, BaseException):
            error = typ
        else:
            error = val if isinstance(val, BaseException) else typ()
        raise error if tb is None else error.with_traceback(tb)
