"""The real app over a fake model: in-process through ASGI, or on a real loopback socket."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import httpx

from penstock.core.ids import ModelName, TenantId
from penstock.core.ports import AdapterAdmin, EngineAdmin
from penstock.gateway.catalog import Catalog
from penstock.gateway.keys import KeyRing
from penstock.observe.clock import SystemClock
from penstock.observe.metrics import Metrics
from penstock.server.admin import make_admin_app
from penstock.server.app import make_app, make_services
from penstock.server.lifecycle import Addresses, ServerConfig, serve
from penstock.server.limits import Limits
from penstock.server.services import Gate, Services
from tests.fakes.adapter_admin import FakeAdapters
from tests.fakes.model_client import FakeModelClient

USER_KEY = "user-key-0123456789"
ADMIN_KEY = "admin-key-0123456789"


@dataclass
class Bench:
    """An app in this process and a client that speaks ASGI to it."""

    model: FakeModelClient
    services: Services
    http: httpx.AsyncClient
    admin: httpx.AsyncClient

    def metric(self, line: str) -> float:
        """Value of the series whose line starts so; 0 if there is none."""
        for each in self.services.events.exposition()[0].decode().splitlines():
            if each.startswith(line + " "):
                return float(each.rsplit(" ", 1)[1])
        return 0.0


def services_for(
    model: FakeModelClient,
    *,
    keys: bool = False,
    limits: Limits | None = None,
    gate: Gate | None = None,
    admins: Mapping[ModelName, EngineAdmin] | None = None,
    adapters: Mapping[ModelName, AdapterAdmin] | None = None,
    in_catalog: bool = True,
) -> Services:
    catalog = Catalog()
    if in_catalog:
        catalog.add(model, name=model.name, aliases=(ModelName("alias"),))
    clock = SystemClock()
    return make_services(
        catalog,
        clock=clock,
        events=Metrics([model.name], clock=clock),
        user_keys=KeyRing({USER_KEY: TenantId("tenant-a")}) if keys else None,
        admin_keys=KeyRing({ADMIN_KEY: TenantId("admin")}) if keys else None,
        limits=limits,
        gate=gate,
        admins=admins,
        adapters={model.name: FakeAdapters()} if adapters is None else adapters,
    )


@asynccontextmanager
async def bench(model: FakeModelClient | None = None, **options: object) -> AsyncIterator[Bench]:
    """An app without sockets."""
    model = model or FakeModelClient()
    services = services_for(model, **options)  # type: ignore[arg-type]  # keyword options of services_for
    public = httpx.ASGITransport(app=make_app(services), raise_app_exceptions=True)
    admin = httpx.ASGITransport(app=make_admin_app(services), raise_app_exceptions=True)
    async with (
        httpx.AsyncClient(transport=public, base_url="http://penstock") as http,
        httpx.AsyncClient(transport=admin, base_url="http://127.0.0.1") as admin_http,
    ):
        yield Bench(model=model, services=services, http=http, admin=admin_http)


@dataclass
class FakeBackend:
    """Implements `lifecycle.Backend`; `ready` lets a test hold the start."""

    catalog: Catalog
    model: FakeModelClient
    error: Exception | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    calls: list[str] = field(default_factory=list)

    async def start(self) -> None:
        self.calls.append("start")
        await self.ready.wait()
        if self.error is not None:
            raise self.error
        self.catalog.add(self.model, name=self.model.name)

    async def drain(self, budget_s: float) -> None:
        assert budget_s >= 0
        self.calls.append("drain")

    async def close(self) -> None:
        self.calls.append("close")


@dataclass
class Running:
    """A server on real sockets of the loopback interface."""

    model: FakeModelClient
    services: Services
    backend: FakeBackend
    task: "asyncio.Task[None]"
    addresses: Addresses

    @property
    def port(self) -> int:
        return int(self.addresses.public.rsplit(":", 1)[1])

    def term(self) -> None:
        """One SIGTERM to this process, which the server has taken over."""
        os.kill(os.getpid(), signal.SIGTERM)


@asynccontextmanager
async def running(
    model: FakeModelClient | None = None,
    *,
    limits: Limits | None = None,
    keys: bool = False,
    shutdown_timeout_s: float = 5.0,
) -> AsyncIterator[Running]:
    """Serve on free ports; ends by SIGTERM unless the test has ended it."""
    model = model or FakeModelClient()
    services = services_for(model, keys=keys, limits=limits, in_catalog=False)
    backend = FakeBackend(services.catalog, model)
    backend.ready.set()
    told: asyncio.Future[Addresses] = asyncio.get_running_loop().create_future()
    config = ServerConfig(port=0, admin_port=0, shutdown_timeout_s=shutdown_timeout_s)
    task = asyncio.create_task(
        serve(
            make_app(services),
            services=services,
            backend=backend,
            config=config,
            admin_app=make_admin_app(services) if keys else None,
            on_ready=told.set_result,
        )
    )
    await asyncio.wait({task, told}, return_when=asyncio.FIRST_COMPLETED)
    server = Running(model, services, backend, task, told.result() if told.done() else await _failed(task))
    try:
        yield server
    finally:
        if not task.done():
            server.term()
        await asyncio.wait({task}, timeout=20)
        if not task.done():
            task.cancel()
            raise AssertionError("the server did not end within 20 s of SIGTERM")


async def _failed(task: "asyncio.Task[None]") -> Addresses:
    await task
    raise AssertionError("serve returned before it was ready")
