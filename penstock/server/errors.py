"""One table from errors to HTTP, and the one shape in which every error leaves the server.

The shape is OpenAI's, on every route: `{"error": {"message", "type", "param", "code"}}`. Faults of the
server get a fixed text and the request id; details go to the log only.
"""

import math
from typing import Final

import msgspec

from penstock.core.errors import (
    AuthenticationError,
    CapacityError,
    EngineDeadError,
    EngineError,
    NotFoundError,
    NotReadyError,
    PayloadTooLargeError,
    PenstockError,
    QueueFullError,
    RequestError,
)
from penstock.server.replies import JSON_TYPE, Reply

INVALID: Final = "invalid_request_error"
RATE: Final = "rate_limit_error"
UNAVAILABLE: Final = "service_unavailable_error"
SERVER: Final = "server_error"

STATUS: Final[dict[type[PenstockError], tuple[int, str]]] = {
    AuthenticationError: (401, INVALID),
    NotFoundError: (404, INVALID),
    PayloadTooLargeError: (413, INVALID),
    RequestError: (400, INVALID),
    QueueFullError: (429, RATE),
    NotReadyError: (503, UNAVAILABLE),
    CapacityError: (503, UNAVAILABLE),
    EngineDeadError: (503, UNAVAILABLE),
    EngineError: (500, SERVER),
    PenstockError: (500, SERVER),
}
"""Error class to HTTP status and OpenAI's `type`; subclasses inherit the nearest entry."""

_ENGINE_DEAD: Final = "the model's engine is being restarted; send the request again"
_ENGINE_FAILED: Final = "the engine failed on this request; other requests are unharmed"
_INTERNAL: Final = "the server failed on this request"
_RESTART_RETRY_S: Final = 2.0


class MethodNotAllowedError(RequestError):
    """The route exists with other methods; use one of those in the `Allow` header."""

    default_code = "method_not_allowed"


class HeadersTooLargeError(RequestError):
    """The header is larger than the limit; send less."""

    default_code = "headers_too_large"


class WrongHostError(RequestError):
    """The request is for a name that this listener does not answer to; use its address."""

    default_code = "wrong_host"


class ForeignPageError(RequestError):
    """A browser asks on behalf of another site's page; ask from a program or from the address bar."""

    default_code = "foreign_page"


STATUS[MethodNotAllowedError] = (405, INVALID)
STATUS[HeadersTooLargeError] = (431, INVALID)
STATUS[WrongHostError] = (421, INVALID)
STATUS[ForeignPageError] = (403, INVALID)


def status_of(error: PenstockError) -> tuple[int, str]:
    """HTTP status and OpenAI's error `type` of an error."""
    for cls in type(error).__mro__:
        if cls in STATUS:
            return STATUS[cls]
    raise AssertionError("PenstockError is in the table")


def _message(error: PenstockError, *, request_id: str) -> str:
    if isinstance(error, EngineDeadError):
        return f"{_ENGINE_DEAD} (request id {request_id})"
    if isinstance(error, EngineError):
        return f"{_ENGINE_FAILED} (request id {request_id})"
    if isinstance(error, (RequestError, CapacityError)):
        return error.message
    return f"{_INTERNAL} (request id {request_id})"


def error_json(error: PenstockError, *, request_id: str) -> bytes:
    """The error in OpenAI's shape, as JSON bytes."""
    return msgspec.json.encode(
        {
            "error": {
                "message": _message(error, request_id=request_id),
                "type": status_of(error)[1],
                "param": error.param,
                "code": error.code,
            }
        }
    )


def _retry_after(error: PenstockError) -> list[tuple[bytes, bytes]]:
    seconds = error.retry_after_s
    if seconds is None and isinstance(error, (CapacityError, EngineDeadError)):
        seconds = _RESTART_RETRY_S
    if seconds is None:
        return []
    return [(b"retry-after", str(max(1, math.ceil(seconds))).encode())]


def error_reply(error: PenstockError, *, request_id: str) -> Reply:
    """The whole HTTP answer for an error, with `Retry-After` where waiting helps."""
    headers = _retry_after(error)
    if isinstance(error, AuthenticationError):
        headers.append((b"www-authenticate", b"Bearer"))
    return Reply(
        status=status_of(error)[0],
        body=error_json(error, request_id=request_id),
        content_type=JSON_TYPE,
        headers=tuple(headers),
    )


def internal_error() -> PenstockError:
    """What a client sees of an exception that nobody expected."""
    return PenstockError(_INTERNAL)
