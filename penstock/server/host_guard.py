"""Keeps web pages of other sites away from a server that listens on this machine only.

Such a page can rebind its own name to 127.0.0.1, and any page can make the browser ask for an address here.
The first is seen by the Host header, the second by what browsers say in `Sec-Fetch-Site`. Programs send
the address that they were given, and no such word. Built into an app by `app`.
"""

from typing import Final

from starlette.types import ASGIApp, Receive, Scope, Send

from penstock.core.errors import RequestError
from penstock.server.endpoint import send_reply
from penstock.server.errors import ForeignPageError, WrongHostError, error_reply

LOCAL_HOSTS: Final = ("127.0.0.1", "localhost", "[::1]")
_SHOWN_CHARS: Final = 80


class HostGuard:
    """Refuses requests that were not addressed to one of `hosts`, or that another site's page has made."""

    def __init__(self, app: ASGIApp, *, hosts: tuple[str, ...]) -> None:
        self._app = app
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, or refuse it."""
        error = self._refusal(scope) if scope["type"] == "http" else None
        if error is None:
            await self._app(scope, receive, send)
        else:
            await send_reply(error_reply(error, request_id=scope["penstock.request_id"]), send)

    def _refusal(self, scope: Scope) -> RequestError | None:
        hosts = _values(scope, b"host")
        if len(hosts) != 1 or _without_port(hosts[0]) not in self._hosts:
            return WrongHostError(
                f"the Host header is {', '.join(hosts)[:_SHOWN_CHARS]!r}, this listener answers to "
                f"{', '.join(sorted(self._hosts))}",
                param="host",
            )
        if "cross-site" in _values(scope, b"sec-fetch-site"):
            return ForeignPageError(
                "a web page of another site has asked, it may not", param="sec-fetch-site"
            )
        return None


def _values(scope: Scope, wanted: bytes) -> list[str]:
    return [value.decode("latin-1").lower() for name, value in scope["headers"] if name == wanted]


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host
