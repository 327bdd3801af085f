"""The server that is measured: its address, route, model, and what is asked of every request."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Final, Literal
from urllib.parse import urlsplit

from penstock.core.errors import InvalidParameterError, PenstockError

Route = Literal["completions", "chat"]
PATHS: Final[dict[Route, str]] = {"completions": "/completions", "chat": "/chat/completions"}


FIXED_FIELDS: Final = ("model", "prompt", "messages", "max_tokens", "stream", "n", "best_of", "echo")
"""Of a request's body: the load generator sets them or leaves them out, and counts by them."""


class TargetError(PenstockError):
    """The server cannot be measured: nobody answers, or it has no such model; the message says which."""

    default_code = "no_target"
    exit_code: ClassVar[int] = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where requests go and what they all ask.

    Raises:
        InvalidParameterError: the address is none, a field is not to be set, or a time is out of range.
    """

    base_url: str
    """Like `http://host:8000`; a path is kept, `/v1` is added unless it ends with a version."""
    model: str
    """Name that the server knows."""
    route: Route = "completions"
    api_key: str | None = field(default=None, repr=False)
    ignore_eos: bool = False
    """Ask that answers go on to their full length; the check then wants exactly that many tokens."""
    temperature: float | None = 0.0
    """None leaves the field out, for servers that refuse it."""
    body: dict[str, object] = field(default_factory=dict)
    """More fields of every request; none of `FIXED_FIELDS`."""
    timeout_s: float = 600.0
    """A request that takes longer has failed; above 0."""
    connect_timeout_s: float = 10.0

    def __post_init__(self) -> None:
        check_url(self.base_url)
        check_body(self.body)
        if not 0 < self.timeout_s <= 86_400:
            raise InvalidParameterError(
                f"timeout_s is {self.timeout_s}, it must be above 0 and at most 86400", param="timeout_s"
            )

    @property
    def api_url(self) -> str:
        """Address of the API with its version, without a slash at the end."""
        return api_url(self.base_url)

    @property
    def request_url(self) -> str:
        """Where the requests are posted."""
        return self.api_url + PATHS[self.route]

    @property
    def headers(self) -> dict[str, str]:
        """Sent with everything."""
        return headers(self.api_key)


def headers(api_key: str | None) -> dict[str, str]:
    """Sent with every request: the key, if there is one, and no compression (it would hide the chunks)."""
    key = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    return {"Accept-Encoding": "identity", **key}


def api_url(base_url: str) -> str:
    """`base_url` with a version at its end: `/v1` unless it has one (`/v3`, say)."""
    base = base_url.rstrip("/")
    last = base.rsplit("/", 1)[-1]
    is_versioned = last[:1] == "v" and last[1:].isdigit()
    return base if is_versioned else f"{base}/v1"


def check_body(body: Mapping[str, object]) -> None:
    """Refuse fields that would change what is counted.

    Raises:
        InvalidParameterError: names the first of them.
    """
    for name in FIXED_FIELDS:
        if name in body:
            raise InvalidParameterError(
                f"extra_body has {name}, it must have none of {', '.join(FIXED_FIELDS)}", param="extra_body"
            )


def check_url(url: str, *, param: str = "base_url") -> None:
    """Refuse what is no address of a server.

    Raises:
        InvalidParameterError: another scheme than http(s), no host, or a broken port.
    """
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:
        raise InvalidParameterError(f"{param} is {url!r:.200}, it must be like http://host:8000", param=param)
