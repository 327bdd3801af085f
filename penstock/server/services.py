"""What the routes may use, joined once at start, and the one call object that each of them gets."""

import secrets
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Final, Protocol

from pydantic import BaseModel

from penstock.core.errors import NotReadyError
from penstock.core.ids import ModelName, RequestId, TenantId
from penstock.core.ports import AdapterAdmin, Clock, EngineAdmin
from penstock.gateway.catalog import Catalog
from penstock.gateway.keys import FailureLimit, KeyRing
from penstock.server.body import BodyBudget
from penstock.server.engine_reports import EngineReports
from penstock.server.exchange import InFlight
from penstock.server.limits import Limits

_PARSER_THREADS: Final = 2


class HttpEvents(Protocol):
    """Sink for what happens on the wire; must not block or raise. `observe.metrics.Metrics` fits."""

    def on_http(self, *, route: str, status: int) -> None:
        """After each answer; `route` is the table's path, or `unmatched`."""
        ...

    def on_error(self, code: str) -> None:
        """For each error told to a client; `code` as in `core.errors`."""
        ...

    def on_connection_closed(self, reason: str) -> None:
        """When a connection is cut: receive_timeout, headers_too_large, bad_request, slow_reader, ..."""
        ...

    def exposition(self) -> tuple[bytes, str]:
        """All metrics as text, and its content type."""
        ...


@dataclass(slots=True, kw_only=True)
class Gate:
    """Whether new requests are let in; turned by `lifecycle`, asked by every request and by `/health/ready`.

    Legal changes: loading -> open -> draining. A server without a lifecycle (tests) starts open.
    """

    closed_reason: str | None = None
    """None if open, else loading or draining."""
    retry_after_s: float = 1.0

    def check(self) -> None:
        """Let a new request pass.

        Raises:
            NotReadyError: the server is loading or draining.
        """
        if self.closed_reason is not None:
            raise NotReadyError(f"the server is {self.closed_reason}", retry_after_s=self.retry_after_s)


def _parsers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_PARSER_THREADS, thread_name_prefix="penstock-body")


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """Everything that outlives a request."""

    catalog: Catalog
    clock: Clock
    events: HttpEvents
    user_keys: KeyRing = field(default_factory=KeyRing)
    admin_keys: KeyRing = field(default_factory=KeyRing)
    """Empty means that nobody is an administrator."""
    failures: FailureLimit
    admins: Mapping[ModelName, EngineAdmin] = field(default_factory=dict)
    adapters: Mapping[ModelName, AdapterAdmin] = field(default_factory=dict)
    """Of the models that take adapters."""
    reports: EngineReports
    limits: Limits = field(default_factory=Limits)
    gate: Gate = field(default_factory=Gate)
    in_flight: InFlight = field(default_factory=InFlight)
    budget: BodyBudget
    parsers: ThreadPoolExecutor = field(default_factory=_parsers)
    """Reads long bodies; its own, so that they never keep tokenizing from its threads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One authorised request, its body validated."""

    services: Services
    request_id: RequestId
    """As the client sees it: in headers, logs and answers. Not unique."""
    tenant_id: TenantId
    arrival_s: float
    """Monotonic time at which the request's head had been received."""
    path_params: Mapping[str, str]
    body: BaseModel | None
    """An instance of the route's model; None where the route has none."""
    address: str = "localhost"
    """Host and port under which the client reached us: a plain name or address, fit for a command line."""

    def new_engine_id(self) -> RequestId:
        """A key for one engine request: never the client's word alone, which may come twice."""
        return RequestId(f"{self.request_id}-{secrets.token_hex(8)}")
