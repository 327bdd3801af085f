"""Server-sent events: frames, and the loop that writes them without ever holding more than one.

A frame is made by gluing bytes around the encoded delta; no model is built per token. The loop sends a
comment line when the stream is silent, waits when the reader is slow, and cuts the connection when it
stays so.
"""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Final

import msgspec
from starlette.types import Receive, Scope, Send

from penstock.core.errors import PenstockError
from penstock.server.errors import error_json, internal_error
from penstock.server.exchange import ClientGoneError, Exchange, SlowReaderError
from penstock.server.limits import Limits
from penstock.server.replies import StreamReply

DONE: Final = b"data: [DONE]\n\n"
KEEPALIVE: Final = b": keepalive\n\n"
HEADERS: Final = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)
ABORT_EXTENSION: Final = "penstock.abort"
"""ASGI extension of our own protocol: cut the connection without waiting for its buffer to empty."""

_LINE_ENDS: Final = (
    (b"\xc2\x85", b"\\u0085"),
    (b"\xe2\x80\xa8", b"\\u2028"),
    (b"\xe2\x80\xa9", b"\\u2029"),
)

encode: Final = msgspec.json.Encoder().encode


def encode_text(text: str) -> bytes:
    """A JSON string without the characters that some clients take for line ends."""
    data = encode(text)
    if data.isascii():
        return data
    for raw, escaped in _LINE_ENDS:
        data = data.replace(raw, escaped)
    return data


def frame(data: bytes, *, event: str | None = None) -> bytes:
    """One event; `data` is JSON and hence has no line breaks."""
    if event is None:
        return b"data: %b\n\n" % data
    return b"event: %b\ndata: %b\n\n" % (event.encode(), data)


def error_frame(error: PenstockError, *, request_id: str) -> bytes:
    """The last event of a stream that failed, in OpenAI's shape."""
    return frame(error_json(error, request_id=request_id), event="error")


class EventStream:
    """Writes the frames of one answer to one client; made per request, used once."""

    def __init__(self, reply: StreamReply, *, limits: Limits, request_id: str) -> None:
        self._frames = reply.frames
        self._close = reply.close
        self._limits = limits
        self._request_id = request_id
        self._loop = asyncio.get_running_loop()
        self._sent_at = self._loop.time()
        self._sending_since: float | None = None
        self._keepalive: asyncio.Task[None] | None = None

    async def run(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        exchange: Exchange,
        on_error: Callable[[Exception], None],
    ) -> None:
        """Send head, frames and end; on failure an error event, then the end.

        Args:
            scope: of the request, for the protocol's abort.
            receive: watched for the client's leaving.
            send: where the bytes go.
            exchange: ends the stream from outside.
            on_error: told why the stream did not end by itself.
        """
        await send({"type": "http.response.start", "status": 200, "headers": list(HEADERS)})
        disarm = self._arm(send, exchange)
        try:
            await exchange.run(self._pump(send), receive=receive)
        except (ClientGoneError, SlowReaderError) as error:
            await _cut(scope, error, on_error=on_error)
            return
        except Exception as error:  # noqa: BLE001  the edge of a request: counted, logged and told to the client
            on_error(error)
            await self._fail(send, error)
        finally:
            disarm()
            await self._frames.aclose()
            await self._close()
        try:
            async with asyncio.timeout(self._limits.slow_reader_timeout_s):
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except TimeoutError:
            await _cut(scope, SlowReaderError(), on_error=on_error)

    async def _fail(self, send: Send, error: Exception) -> None:
        """Tell the client, if it reads."""
        shown = error if isinstance(error, PenstockError) else internal_error()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._limits.close_timeout_s):
                await self._write(send, error_frame(shown, request_id=self._request_id))

    async def _pump(self, send: Send) -> None:
        async for data in self._frames:
            await self._write(send, data)

    async def _write(self, send: Send, data: bytes) -> None:
        self._sending_since = self._loop.time()
        await send({"type": "http.response.body", "body": data, "more_body": True})
        self._sending_since = None
        self._sent_at = self._loop.time()

    async def _keep_alive(self, send: Send, exchange: Exchange) -> None:
        try:
            await self._write(send, KEEPALIVE)
        except Exception as error:  # noqa: BLE001  the edge of a task: the stream ends with it
            exchange.stop(error)

    def _arm(self, send: Send, exchange: Exchange) -> Callable[[], None]:
        """Look at the stream now and then, by one timer that is re-armed; returns what ends it."""
        handle: asyncio.TimerHandle

        def look() -> None:
            nonlocal handle
            handle = self._loop.call_later(self._look(send, exchange), look)

        def disarm() -> None:
            handle.cancel()
            if self._keepalive is not None:
                self._keepalive.cancel()

        first_s = min(self._limits.keepalive_interval_s, self._limits.slow_reader_timeout_s)
        handle = self._loop.call_later(first_s, look)
        return disarm

    def _look(self, send: Send, exchange: Exchange) -> float:
        """Keep alive or cut if it is time; returns the seconds until the next look."""
        now = self._loop.time()
        if self._sending_since is not None:
            left = self._sending_since + self._limits.slow_reader_timeout_s - now
            if left <= 0:
                exchange.stop(SlowReaderError())
            return max(left, 0.01)
        left = self._sent_at + self._limits.keepalive_interval_s - now
        if left <= 0:
            self._sent_at = now
            self._keepalive = asyncio.create_task(self._keep_alive(send, exchange))
            return self._limits.keepalive_interval_s
        return left


async def _cut(scope: Scope, error: Exception, *, on_error: Callable[[Exception], None]) -> None:
    """Drop the connection; `on_error` is told why."""
    on_error(error)
    scope.get("extensions", {}).get(ABORT_EXTENSION, _nothing)()
    # Lets the transport tell the protocol, which else takes the end of the app for a fault.
    await asyncio.sleep(0)


def _nothing() -> None:
    """Other servers than ours have no abort; they close the connection themselves."""
