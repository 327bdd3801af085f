"""What a row of the route table is. The tables themselves are in `app` (public) and `admin`.

What no table lists does not exist (404), and a row that forgets its access cannot be made: there is no
default.
"""

import enum
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Literal

from pydantic import BaseModel

from penstock.server.replies import Reply, StreamReply
from penstock.server.services import Call


class Access(enum.Enum):
    """Who may ask."""

    PUBLIC = "public"
    """Everybody."""
    USER = "user"
    """Holders of an API key, or everybody where no API key is configured."""
    ADMIN = "admin"
    """Holders of the admin key."""


def unchanged(data: object) -> object:
    """Take plain data as it came."""
    return data


def from_query_unchanged(data: dict[str, object]) -> object:
    """Take a query as it came."""
    return data


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What the API document says about a route."""

    summary: str
    answer: type[BaseModel] | None = None
    """JSON schema of the 200 answer; None for other media types."""
    media_type: str = "application/json"
    streams: bool = False
    """The answer may be server-sent events instead."""
    tag: str = "operations"
    also: tuple[int, ...] = ()
    """More status codes than those that every such route has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row: where, how, who, what."""

    path: str
    methods: tuple[Literal["GET", "POST"], ...]
    access: Access
    serve: Callable[[Call], Coroutine[None, None, Reply | StreamReply]]
    document: Document
    body: type[BaseModel] | None = None
    """Model of the POST body, or of the query for GET."""
    from_json: Callable[[object], object] = field(default=unchanged)
    """Turns parsed JSON into what `body` validates; refuses fields by name."""
    from_query: Callable[[dict[str, object]], object] = field(default=from_query_unchanged)
    takes_query: bool = False
    """A POST may bring its fields in the query in place of a body, or none at all."""
    counts_as_work: bool = False
    """Asks a model: refused while loading or draining, waited for at shutdown."""
