"""The outermost layer of an app: request id in and out, one count per answer, safe headers.

A plain ASGI wrapper: it adds no task and copies no body.
"""

from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from penstock.server.endpoint import request_id_of
from penstock.server.services import Services

_SAFE_HEADERS: Final = ((b"x-content-type-options", b"nosniff"),)


class Edge:
    """Wraps the whole app."""

    def __init__(self, app: ASGIApp, *, services: Services) -> None:
        self._app = app
        self._events = services.events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = request_id_of(scope)
        scope["penstock.request_id"] = request_id
        extra = ((b"x-request-id", request_id.encode()), *_SAFE_HEADERS)

        async def send_marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *extra]
                self._events.on_http(route=scope.get("penstock.route", "unmatched"), status=message["status"])
            await send(message)

        await self._app(scope, receive, send_marked)
