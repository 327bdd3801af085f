"""What a route's function returns: a whole answer, or a stream of server-sent events."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from pydantic import BaseModel

JSON_TYPE: Final = b"application/json"
HTML_TYPE: Final = b"text/html; charset=utf-8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """A complete HTTP answer."""

    body: bytes
    status: int = 200
    content_type: bytes = JSON_TYPE
    headers: tuple[tuple[bytes, bytes], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamReply:
    """A stream of server-sent events; `frames` are complete SSE frames, made on demand.

    Whoever holds it must call `close` in the end: it cancels the work behind the frames, if any is left.
    """

    frames: AsyncGenerator[bytes]
    close: Callable[[], Awaitable[None]]


def json_reply(value: object, *, status: int = 200) -> Reply:
    """Answer with a pydantic model or plain data as JSON."""
    body = value.model_dump_json().encode() if isinstance(value, BaseModel) else msgspec.json.encode(value)
    return Reply(body=body, status=status)
