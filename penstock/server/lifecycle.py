"""From bound port to exit code: listen, load, serve, drain, leave.

```
  bind -> loading -> open -> draining -> stopped
           |  (backend.start)   ^  first SIGTERM or SIGINT: readiness 503, no new requests, the rest finishes
           +-- StartupError ----+  budget over or second signal: the rest ends with an error event
```

The listeners are open from the start, so that `/health` answers while the model loads. Engines are started
and stopped through callbacks: nothing here knows what they are.
"""

import asyncio
import contextlib
import errno
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Final, Protocol

import uvicorn
from starlette.types import ASGIApp

from penstock.core.errors import NotReadyError, StartupError
from penstock.server.protocol import ListenerConfig
from penstock.server.services import Services

logger = logging.getLogger("penstock.server")

_BACKLOG: Final = 2048
_TICK_S: Final = 1.0
_POLL_S: Final = 0.02


class Backend(Protocol):
    """What is behind the models; given by `cli`. Each method is called at most once, in this order."""

    async def start(self) -> None:
        """Load, warm up and fill the catalog; raises `StartupError` if that cannot be."""
        ...

    async def drain(self, budget_s: float) -> None:
        """Finish what is inside, within the budget."""
        ...

    async def close(self) -> None:
        """End all processes and free everything; also after a failed `start`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Where to listen and how to leave."""

    host: str = "127.0.0.1"
    port: int = 8000
    """0 to 65535; 0 lets the system choose."""
    admin_host: str = "127.0.0.1"
    admin_port: int = 8001
    shutdown_timeout_s: float = 30.0
    """Seconds that requests in flight get at SIGTERM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Addresses:
    """Where the server listens, once it does."""

    public: str
    admin: str | None


class _Listener(uvicorn.Server):
    """One uvicorn server inside our loop: no signal handlers, a tick a second, a bounded end."""

    config: ListenerConfig

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def open(self, sock: socket.socket) -> None:
        self.config.load()
        self.lifespan = self.config.lifespan_class(self.config)
        await self.startup(sockets=[sock])

    async def tick(self) -> None:
        """Renew the Date header."""
        while True:
            await self.on_tick(0)
            await asyncio.sleep(_TICK_S)

    async def end(self, budget_s: float) -> None:
        """Close listeners and idle connections; cut the rest when the budget is over."""
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(budget_s):
                while self.server_state.connections or self.server_state.tasks:  # noqa: ASYNC110  uvicorn's sets
                    await asyncio.sleep(_POLL_S)
        for connection in list(self.server_state.connections):
            if connection.transport is not None:
                connection.transport.abort()
        for task in list(self.server_state.tasks):
            task.cancel()
        await asyncio.gather(*self.server_state.tasks, return_exceptions=True)


def bind(host: str, port: int) -> socket.socket:
    """Bind a TCP socket, or say in one line why not.

    Raises:
        StartupError: the port is in use, or the address is not ours.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"host {host!r} cannot be listened on: {error.strerror}", param="host") from None
    except UnicodeError:
        raise StartupError(
            f"host {host!r:.200}, it must be an address or the name of this machine", param="host"
        ) from None
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        sock.listen(_BACKLOG)
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            raise StartupError(f"port {port} on {host} is in use; choose another with --port") from None
        raise StartupError(f"port {port} on {host} cannot be listened on: {error.strerror}") from None
    sock.setblocking(False)
    return sock


def _url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Signals:
    """SIGTERM and SIGINT: the first asks to leave, the second insists."""

    def __init__(self) -> None:
        self.first = asyncio.Event()
        self.second = asyncio.Event()

    def hit(self) -> None:
        (self.second if self.first.is_set() else self.first).set()

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for each in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(each, self.hit)
        try:
            yield
        finally:
            for each in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(each)


async def serve(
    app: ASGIApp,
    *,
    services: Services,
    backend: Backend,
    config: ServerConfig,
    admin_app: ASGIApp | None = None,
    on_ready: Callable[[Addresses], None] | None = None,
) -> None:
    """Serve until a signal; returns when everything has ended well.

    Args:
        app: the public app.
        services: the same that the apps were made with; its gate is turned here.
        backend: the engines.
        config: addresses and budget.
        admin_app: the administrators' app, or None to open no such listener.
        on_ready: told the addresses once requests are let in.

    Raises:
        StartupError: a port is taken, or the backend cannot start.
    """
    services.gate.closed_reason = "loading"
    apps = [app] if admin_app is None else [app, admin_app]
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bind(config.host, config.port))]
        if admin_app is not None:
            sockets.append(stack.enter_context(bind(config.admin_host, config.admin_port)))
        session = _Session(
            listeners=[
                _Listener(ListenerConfig(each, limits=services.limits, events=services.events))
                for each in apps
            ],
            services=services,
            backend=backend,
            budget_s=config.shutdown_timeout_s,
            signals=_Signals(),
        )
        stack.enter_context(session.signals.installed())
        admin_url = None if admin_app is None else _url(sockets[1])
        await session.run(
            sockets, addresses=Addresses(public=_url(sockets[0]), admin=admin_url), on_ready=on_ready
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Session:
    """One life of the server."""

    listeners: list[_Listener]
    services: Services
    backend: Backend
    budget_s: float
    signals: _Signals

    async def run(
        self,
        sockets: list[socket.socket],
        *,
        addresses: Addresses,
        on_ready: Callable[[Addresses], None] | None,
    ) -> None:
        ticks: list[asyncio.Task[None]] = []
        try:
            for listener, sock in zip(self.listeners, sockets, strict=True):
                await listener.open(sock)
                ticks.append(asyncio.create_task(listener.tick()))
            if await self._start():
                self.services.gate.closed_reason = None
                if on_ready is not None:
                    on_ready(addresses)
                await self.signals.first.wait()
                await self._drain()
        finally:
            for tick in ticks:
                tick.cancel()
            await self._end()

    async def _start(self) -> bool:
        """Start the backend; False if a signal came first."""
        start = asyncio.create_task(self.backend.start())
        told = asyncio.create_task(self.signals.first.wait())
        try:
            await asyncio.wait({start, told}, return_when=asyncio.FIRST_COMPLETED)
            if start.done():
                await start
            return start.done()
        finally:
            start.cancel()
            told.cancel()
            await asyncio.gather(start, told, return_exceptions=True)

    async def _drain(self) -> None:
        services, loop = self.services, asyncio.get_running_loop()
        end_s = loop.time() + self.budget_s
        services.gate.closed_reason = "draining"
        logger.info(
            "draining", extra={"requests_in_flight": len(services.in_flight), "budget_s": self.budget_s}
        )
        empty, insisted = services.in_flight.wait_empty(), self.signals.second.wait()
        if not await _first_of(empty, insisted, budget_s=self.budget_s):
            await self._cut()
        await self.backend.drain(max(0.0, end_s - loop.time()))

    async def _cut(self) -> None:
        in_flight = self.services.in_flight
        logger.warning("requests cut at shutdown", extra={"requests_in_flight": len(in_flight)})
        in_flight.stop_all(
            NotReadyError("the server is stopping and the time for this request is over", code="stopping")
        )
        await _first_of(in_flight.wait_empty(), budget_s=self.services.limits.close_timeout_s)

    async def _end(self) -> None:
        budget_s = self.services.limits.close_timeout_s
        try:
            await asyncio.gather(*(each.end(budget_s) for each in self.listeners if each.started))
        finally:
            await self.backend.close()


async def _first_of(
    wanted: Coroutine[object, object, object], *others: Coroutine[object, object, object], budget_s: float
) -> bool:
    """Await several; True if `wanted` was the first to end, within the budget."""
    tasks = [asyncio.ensure_future(each) for each in (wanted, *others)]
    try:
        await asyncio.wait(tasks, timeout=budget_s, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].done()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
