"""uvicorn's HTTP protocol with the bounds that it lacks.

An absolute deadline for receiving a request, limits on the head and on the number of chunks, a limit on
connections, a bounded write buffer, OpenAI's shape for what is refused before any route is known. One object
per connection; called by the event loop.

A client that sends its next request before the answer to the last one has ended is answered once and then
disconnected: reading goes on meanwhile, so that its leaving is always noticed.

```
            first byte             last byte of the body
  idle ----------------> receiving ---------------------> answering --> idle (or closed)
  keep_alive_timeout_s   receive_timeout_s
```
"""

import asyncio
import logging
from typing import Any, Final

import httptools
import uvicorn
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from penstock.core.errors import InvalidParameterError, NotReadyError, PenstockError
from penstock.server.errors import HeadersTooLargeError, error_json, status_of
from penstock.server.limits import Limits
from penstock.server.services import HttpEvents
from penstock.server.sse import ABORT_EXTENSION

logger = logging.getLogger("penstock.server")

_OFFER: Final = frozenset({b"connection", b"upgrade", b"http2-settings"})
_LINE_BYTES: Final = 4
"""Colon, space and line end of a header line."""


class ReceiveTimeoutError(InvalidParameterError):
    """The request did not arrive in time; send it faster."""

    default_code = "receive_timeout"


class ListenerConfig(uvicorn.Config):
    """uvicorn's configuration, and what our protocol needs beside it."""

    def __init__(self, app: object, *, limits: Limits, events: HttpEvents) -> None:
        super().__init__(
            app,  # type: ignore[arg-type]  # an ASGI app; the library's alias is wider than ours
            http=BoundedProtocol,
            loop="none",
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=int(limits.keep_alive_timeout_s),
        )
        self.limits = limits
        self.events = events


class BoundedProtocol(HttpToolsProtocol):
    """One connection; see the module."""

    def __init__(
        self,
        config: ListenerConfig,
        server_state: ServerState,
        app_state: dict[str, Any],  # Any: the library's own type
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._limits = config.limits
        self._events = config.events
        self.timeout_keep_alive = config.limits.keep_alive_timeout_s  # type: ignore[assignment]  # any number of seconds will do
        self._deadline: asyncio.TimerHandle | None = None
        self._refusal: PenstockError | None = None
        self._in_head = False
        self._is_early = False
        """The request being parsed came before the last answer had ended; it is not looked at."""
        self._head_bytes = 0
        self._line_bytes = 0
        self._head_lines = 0
        self._num_chunks = 0
        self._body_bytes = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as the parent does
        """Take a connection, or refuse it if there are too many."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=self._limits.write_buffer_bytes_max)
        if len(self.connections) > self._limits.connections_max:
            full = NotReadyError(
                f"the server has {self._limits.connections_max} connections, its limit",
                code="too_many_connections",
            )
            self._refuse(full, reason="too_many_connections")
            return
        self.timeout_keep_alive_task = self.loop.call_later(
            self._limits.keep_alive_timeout_s, self.timeout_keep_alive_handler
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection; the request in it is told."""
        self._disarm()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what arrived; the deadline runs from a request's first byte to its last."""
        if self._deadline is None and self._awaits_request():
            self._begin_head()
        if self._in_head:
            self._head_bytes += len(data)
        self._unset_keepalive_if_required()
        self._parse(data)
        # httptools collects a header that has not ended without telling anybody; hence this count.
        if (
            self._in_head
            and self._head_bytes > self._limits.header_bytes_max
            and not self.transport.is_closing()
        ):
            self._refuse(self._head_too_large(), reason="headers_too_large")

    def _parse(self, data: bytes) -> None:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._parse_without_offer(data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("")

    def _parse_without_offer(self, rest: bytes) -> None:
        """Parse a request again without its offer to upgrade, which is not taken up here.

        The parser skips the body of a request with an offer; JDK clients send one with their first request.
        """
        method = self.parser.get_method()
        if self._is_early or method == b"CONNECT":
            self.send_400_response("")
            return
        kept = [pair for pair in self.headers if pair[0] not in _OFFER]
        version = self.parser.get_http_version().encode()
        lines = [
            b"%b %b HTTP/%b" % (method, self.url, version),
            *(b"%b: %b" % pair for pair in kept),
            b"",
            b"",
        ]
        self.parser = httptools.HttpRequestParser(self)
        self._parse(b"\r\n".join(lines) + rest)

    def _cycle(self) -> RequestResponseCycle | None:
        """The parent declares it never None, and sets it to None."""
        return self.cycle

    def _awaits_request(self) -> bool:
        cycle = self._cycle()
        return cycle is None or cycle.response_complete

    def _begin_head(self) -> None:
        self._in_head = True
        self._head_bytes = 0
        if self._deadline is None:
            self._deadline = self.loop.call_later(self._limits.receive_timeout_s, self._on_deadline)

    def on_message_begin(self) -> None:
        """Begin a request."""
        self._is_early = not self._awaits_request()
        if self._is_early:
            self.cycle.keep_alive = False
            return
        super().on_message_begin()
        extensions: dict[str, object] = {ABORT_EXTENSION: self.transport.abort}
        self.scope["extensions"] = extensions  # type: ignore[typeddict-item]  # our own extension
        if not self._in_head:
            self._begin_head()
        self._line_bytes = self._head_lines = self._num_chunks = self._body_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Collect the request's target."""
        if not self._is_early:
            self._line_bytes += len(url)
            super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Collect one header line, within the limits."""
        if self._is_early:
            return
        self._head_lines += 1
        self._line_bytes += len(name) + len(value) + _LINE_BYTES
        limits = self._limits
        if self._head_lines > limits.header_lines_max or self._line_bytes > limits.header_bytes_max:
            self._refusal = self._head_too_large()
            raise self._refusal
        super().on_header(name, value)

    def _head_too_large(self) -> HeadersTooLargeError:
        limits = self._limits
        return HeadersTooLargeError(
            f"the header is larger than the limit of {limits.header_bytes_max} bytes "
            f"or {limits.header_lines_max} lines"
        )

    def on_headers_complete(self) -> None:
        """Start the app."""
        if not self._is_early and not self.parser.should_upgrade():
            self._in_head = False
            super().on_headers_complete()
            if self.parser.get_http_version() == "1.0":
                _answer_without_chunks(self.cycle)
            if self.expect_100_continue:
                # If the request is refused unread, nobody can tell its body from the next request.
                self.cycle.keep_alive = False

    def on_chunk_header(self) -> None:
        """Count chunks: many tiny ones cost more than they carry."""
        self._num_chunks += 1
        limits = self._limits
        allowed = limits.chunks_free + self._body_bytes // limits.chunk_bytes_min
        if self._num_chunks > allowed and not self._is_early:
            self._refusal = InvalidParameterError(
                f"the body comes in {self._num_chunks} chunks for {self._body_bytes} bytes, "
                f"they must hold {limits.chunk_bytes_min} bytes on average",
                code="chunks_too_small",
            )
            raise self._refusal

    def on_body(self, body: bytes) -> None:
        """Hand a piece of the body to the app."""
        if not self._is_early:
            self._body_bytes += len(body)
            super().on_body(body)

    def on_message_complete(self) -> None:
        """End of the request: the deadline is over."""
        if not self._is_early and not self.parser.should_upgrade():
            self._disarm()
            super().on_message_complete()

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        late = ReceiveTimeoutError(
            f"the request did not arrive within {self._limits.receive_timeout_s} seconds"
        )
        self._refuse(late, reason="receive_timeout")

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  the parent's signature
        """Refuse what could not be parsed, in OpenAI's shape; the parent's text is not sent."""
        refusal = self._refusal or InvalidParameterError(
            "the request is not valid HTTP/1.1", code="invalid_http"
        )
        self._refuse(refusal, reason=refusal.code)

    def _refuse(self, error: PenstockError, *, reason: str) -> None:
        """Answer, unless an answer has begun, and close."""
        self._disarm()
        self._events.on_connection_closed(reason)
        cycle = self._cycle()
        if self._in_head or cycle is None or not cycle.response_started:
            self._events.on_error(error.code)
            self.transport.write(_raw(error))
        self.transport.close()


def _answer_without_chunks(cycle: RequestResponseCycle) -> None:
    """HTTP/1.0 knows no chunks: what has no length ends with the connection, which the parent closes."""
    send = cycle.send

    async def send_plain(message: ASGISendEvent) -> None:
        if message["type"] == "http.response.body":
            # The parent compares with what was announced; here every piece announces itself.
            cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.chunked_encoding = False
    cycle.send = send_plain  # type: ignore[method-assign]  # the one cycle of a connection that then ends


def _raw(error: PenstockError) -> bytes:
    status = 408 if isinstance(error, ReceiveTimeoutError) else status_of(error)[0]
    body = error_json(error, request_id="none")
    return b"".join(
        (
            STATUS_LINE[status],
            b"content-type: application/json\r\nconnection: close\r\ncontent-length: %d\r\n\r\n" % len(body),
            body,
        )
    )
