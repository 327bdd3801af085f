"""The path of every request through the server: authorise, admit, read, validate, work, answer.

One `Endpoint` per row of the route table. It is the exception barrier: whatever goes wrong inside one
request ends that request, with one answer in OpenAI's shape, and nothing else.
"""

import asyncio
import logging
import re
import secrets
from collections.abc import Mapping
from typing import Final
from urllib.parse import parse_qsl

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from penstock.core.errors import AuthenticationError, EngineError, InvalidParameterError, PenstockError
from penstock.core.ids import DEFAULT_TENANT, RequestId, TenantId
from penstock.gateway.keys import KeyRing
from penstock.server.body import check_content_type, parse_json, read_body
from penstock.server.errors import error_reply, internal_error
from penstock.server.exchange import ClientGoneError, Exchange, SlowReaderError
from penstock.server.replies import Reply, StreamReply
from penstock.server.routes import Access, Route
from penstock.server.services import Call, Services
from penstock.server.sse import EventStream
from penstock.server.validation import validate

logger = logging.getLogger("penstock.server")

MAX_QUERY_BYTES: Final = 8192
MAX_QUERY_FIELDS: Final = 32
_CLIENT_GONE_STATUS: Final = 499
_HOST: Final = re.compile(r"(?:[A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::[0-9]{1,5})?")
_REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._-]{1,128}")


def request_id_of(scope: Scope) -> RequestId:
    """The client's `x-request-id` if it is well-formed, else a fresh one."""
    for name, value in scope["headers"]:
        if name == b"x-request-id" and _REQUEST_ID.fullmatch(value):
            return RequestId(value.decode())
    return RequestId(secrets.token_hex(16))


def _header(scope: Scope, wanted: bytes) -> str | None:
    for name, value in scope["headers"]:
        if name == wanted:
            text: str = value.decode("latin-1")
            return text
    return None


def address_of(scope: Scope) -> str:
    """The Host header if it looks like an address, else where this listener is bound."""
    host = _header(scope, b"host") or ""
    if _HOST.fullmatch(host):
        return host
    name, port = scope.get("server") or ("localhost", None)
    return name if port is None else f"{name}:{port}"


def read_query(scope: Scope) -> dict[str, object]:
    """Query string to plain data; numbers stay strings.

    Raises:
        InvalidParameterError: too long, not UTF-8, or a name twice.
    """
    raw: bytes = scope["query_string"]
    if len(raw) > MAX_QUERY_BYTES:
        raise InvalidParameterError(
            f"the query string has {len(raw)} bytes, the limit is {MAX_QUERY_BYTES}", code="query_too_long"
        )
    try:
        pairs = parse_qsl(
            raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS
        )
    except ValueError:
        raise InvalidParameterError(
            f"the query string must be UTF-8 in percent encoding, at most {MAX_QUERY_FIELDS} fields",
            code="invalid_query",
        ) from None
    result: dict[str, object] = dict(pairs)
    if len(result) != len(pairs):
        raise InvalidParameterError("the query string has a name twice", code="invalid_query")
    if any("\0" in key + value for key, value in pairs):
        raise InvalidParameterError("the query string has a NUL character", code="invalid_query")
    return result


def authorise(route: Route, scope: Scope, *, services: Services) -> TenantId:
    """Decide by the matched route who may pass; what no branch lets in is refused.

    Raises:
        AuthenticationError: no key or a wrong one.
        QueueFullError: too many wrong ones from this address.
    """
    if route.access is Access.PUBLIC:
        return DEFAULT_TENANT
    is_user = route.access is Access.USER
    try:
        return _tenant(
            services.user_keys if is_user else services.admin_keys,
            _header(scope, b"authorization"),
            may_be_empty=is_user,
        )
    except AuthenticationError:
        services.failures.record((scope.get("client") or ("unknown", 0))[0])
        raise


def _tenant(ring: KeyRing, authorization: str | None, *, may_be_empty: bool) -> TenantId:
    if ring.is_empty and not may_be_empty:
        raise AuthenticationError("there is no admin key, so nobody may ask this")
    return ring.tenant_of(authorization)


class Endpoint(Response):
    """The answer of one route; made per request, does all its work when the framework sends it."""

    def __init__(self, route: Route, request: Request, *, services: Services) -> None:
        super().__init__()
        self._route = route
        self._path_params: Mapping[str, str] = request.path_params
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the request; never raises but for cancellation."""
        exchange = Exchange()
        request_id: RequestId = scope["penstock.request_id"]
        scope["penstock.route"] = self._route.path
        reply: Reply | StreamReply
        if self._route.counts_as_work:
            self._services.in_flight.add(exchange)
        try:
            reply = await self._reply(scope, receive, exchange=exchange, request_id=request_id)
            await self._send(reply, scope, receive, send, exchange=exchange, request_id=request_id)
        finally:
            self._services.in_flight.remove(exchange)

    async def _reply(
        self, scope: Scope, receive: Receive, *, exchange: Exchange, request_id: RequestId
    ) -> Reply | StreamReply:
        try:
            call = await self._call(scope, receive, request_id=request_id)
            return await exchange.run(self._route.serve(call), receive=receive)
        except ClientGoneError as error:
            self._note(error, request_id=request_id)
            return Reply(status=_CLIENT_GONE_STATUS, body=b"")
        except PenstockError as error:
            self._note(error, request_id=request_id)
            return error_reply(error, request_id=request_id)
        except Exception as error:  # noqa: BLE001  the exception barrier of a request
            self._note(error, request_id=request_id)
            return error_reply(internal_error(), request_id=request_id)

    async def _call(self, scope: Scope, receive: Receive, *, request_id: RequestId) -> Call:
        services, route = self._services, self._route
        arrival_s = services.clock.monotonic()
        tenant_id = authorise(route, scope, services=services)
        if route.counts_as_work:
            services.gate.check()
        body = None
        if route.body is not None:
            body = await self._body(route.body, scope, receive)
        return Call(
            services=services,
            request_id=request_id,
            tenant_id=tenant_id,
            arrival_s=arrival_s,
            path_params=self._path_params,
            address=address_of(scope),
            body=body,
        )

    async def _body(self, model: type[BaseModel], scope: Scope, receive: Receive) -> BaseModel:
        takes_query = "GET" in self._route.methods or self._route.takes_query
        query = read_query(scope) if takes_query else {}
        if scope["method"] == "GET":
            return validate(self._route.from_query(query), model=model)
        check_content_type(scope)
        services = self._services
        raw = await read_body(scope, receive, limits=services.limits, budget=services.budget)
        try:
            if not raw and (query or self._route.takes_query):
                return validate(self._route.from_query(query), model=model)
            if query:
                raise InvalidParameterError("fields are in the query and in the body, use one of them")
            if len(raw) < services.limits.thread_bytes_min:
                return self._parse(raw, model)
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(services.parsers, self._parse, raw, model)
        finally:
            services.budget.free(len(raw))

    def _parse(self, raw: bytearray, model: type[BaseModel]) -> BaseModel:
        data = parse_json(raw, depth_max=self._services.limits.json_depth_max)
        return validate(self._route.from_json(data), model=model)

    async def _send(
        self,
        reply: Reply | StreamReply,
        scope: Scope,
        receive: Receive,
        send: Send,
        *,
        exchange: Exchange,
        request_id: RequestId,
    ) -> None:
        if isinstance(reply, StreamReply):
            stream = EventStream(reply, limits=self._services.limits, request_id=request_id)
            await stream.run(
                scope,
                receive,
                send,
                exchange=exchange,
                on_error=lambda e: self._note(e, request_id=request_id),
            )
        else:
            await send_reply(reply, send)

    def _note(self, error: Exception, *, request_id: RequestId) -> None:
        """Count and log; a client's own mistakes are counted only."""
        events = self._services.events
        if isinstance(error, PenstockError):
            events.on_error(error.code)
            if isinstance(error, EngineError):
                logger.warning(
                    "engine error",
                    extra={"request_id": request_id, "code": error.code, "detail": error.message},
                )
        elif isinstance(error, ClientGoneError):
            events.on_connection_closed("client_gone")
        elif isinstance(error, SlowReaderError):
            events.on_connection_closed("slow_reader")
            logger.warning("connection cut: slow reader", extra={"request_id": request_id})
        else:
            events.on_error("internal_error")
            logger.error("request failed", exc_info=error, extra={"request_id": request_id})


async def send_reply(reply: Reply, send: Send) -> None:
    """Send a whole answer."""
    headers = [
        (b"content-type", reply.content_type),
        (b"content-length", str(len(reply.body)).encode()),
        *reply.headers,
    ]
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": reply.body})
