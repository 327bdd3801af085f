"""Builds the public HTTP app from its route table.

Joined by `cli`, run by `lifecycle`. No request logic here: that is in `endpoint` and the dialects.
"""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from penstock.core.errors import NotFoundError, RequestError
from penstock.core.ids import ModelName
from penstock.core.ports import AdapterAdmin, Clock, EngineAdmin
from penstock.gateway.catalog import Catalog
from penstock.gateway.keys import FailureLimit, KeyRing
from penstock.server import document, health
from penstock.server.body import BodyBudget
from penstock.server.dialects import plain, scores
from penstock.server.dialects.openai import routes as openai
from penstock.server.edge import Edge
from penstock.server.endpoint import Endpoint
from penstock.server.engine_reports import EngineReports
from penstock.server.errors import MethodNotAllowedError, error_reply
from penstock.server.host_guard import HostGuard
from penstock.server.limits import Limits
from penstock.server.routes import Access, Route
from penstock.server.services import Gate, HttpEvents, Services

TITLE: Final = "Penstock"
_SERVING: Final[tuple[Route, ...]] = (*openai.ROUTES, *scores.ROUTES, *plain.ROUTES, *health.ROUTES)
PUBLIC_ROUTES: Final[tuple[Route, ...]] = (
    *_SERVING,
    *document.routes_for(_SERVING, title=TITLE, access=Access.PUBLIC),
)
"""Every route of the public listener, and nothing else is served there."""


def make_services(
    catalog: Catalog,
    *,
    clock: Clock,
    events: HttpEvents,
    user_keys: KeyRing | None = None,
    admin_keys: KeyRing | None = None,
    admins: Mapping[ModelName, EngineAdmin] | None = None,
    adapters: Mapping[ModelName, AdapterAdmin] | None = None,
    limits: Limits | None = None,
    gate: Gate | None = None,
) -> Services:
    """Join what both listeners need; one per process."""
    limits = limits or Limits()
    return Services(
        catalog=catalog,
        clock=clock,
        events=events,
        user_keys=user_keys or KeyRing(),
        admin_keys=admin_keys or KeyRing(),
        failures=FailureLimit(clock=clock),
        admins=admins if admins is not None else {},
        adapters=adapters if adapters is not None else {},
        reports=EngineReports(clock=clock),
        limits=limits,
        gate=gate or Gate(),
        budget=BodyBudget(limits.body_bytes_total_max),
    )


def _endpoint(route: Route, services: Services) -> Callable[[Request], Awaitable[Response]]:
    async def endpoint(request: Request) -> Response:
        return Endpoint(route, request, services=services)

    return endpoint


def _refuse_unmatched(services: Services) -> Callable[[Request, Exception], Awaitable[Response]]:
    async def refuse(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = error.headers or {}
        if error.status_code == 405:
            allow = headers.get("Allow", "")
            shown: RequestError = MethodNotAllowedError(
                f"this route does not know the method, it knows {allow}"
            )
            # The path is a row of the table; only the method is not.
            request.scope["penstock.route"] = "wrong_method"
        else:
            shown = NotFoundError("there is no such route; GET /docs shows those that exist")
        services.events.on_error(shown.code)
        reply = error_reply(shown, request_id=request.scope["penstock.request_id"])
        return Response(
            reply.body, status_code=reply.status, headers=headers, media_type=reply.content_type.decode()
        )

    return refuse


def build(
    routes: tuple[Route, ...], *, services: Services, title: str, hosts: tuple[str, ...] | None = None
) -> FastAPI:
    """Make an app that serves exactly `routes`, to requests for `hosts` only unless that is None."""
    app = FastAPI(title=title, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_exception_handler(HTTPException, _refuse_unmatched(services))
    if hosts is not None:
        app.add_middleware(HostGuard, hosts=hosts)
    app.add_middleware(Edge, services=services)
    for route in routes:
        app.add_api_route(
            route.path,
            _endpoint(route, services),
            methods=list(route.methods),
            response_model=None,
        )
    return app


def make_app(services: Services, *, hosts: tuple[str, ...] | None = None) -> FastAPI:
    """The public app: OpenAI's and the plain dialect, health, metrics and the API document.

    Args:
        services: what the routes use.
        hosts: names and addresses, without port, that a Host header may hold; None allows any.
    """
    return build(PUBLIC_ROUTES, services=services, title=TITLE, hosts=hosts)
