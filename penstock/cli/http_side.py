"""Makes the half of the server that speaks HTTP, and runs it over the model's half.

Imported beside the start of the engine process, because the web framework takes as long to import as the
engine's libraries do.
"""

import ipaddress
import logging
from collections.abc import Callable
from typing import Final

from fastapi import FastAPI

from penstock.cli.build import ModelSide
from penstock.cli.settings import ServeSettings
from penstock.core.errors import StartupError
from penstock.core.ids import DEFAULT_TENANT, TenantId
from penstock.gateway.keys import MAX_KEY_CHARS, KeyRing
from penstock.server import lifecycle
from penstock.server.admin import make_admin_app
from penstock.server.app import make_app, make_services
from penstock.server.host_guard import LOCAL_HOSTS
from penstock.server.lifecycle import Addresses, ServerConfig
from penstock.server.services import Services

ADMIN_TENANT: Final = TenantId("admin")

log = logging.getLogger("penstock.cli")


class HttpSide:
    """Both listeners over one model's half.

    Raises:
        StartupError: a key is malformed.
    """

    def __init__(self, settings: ServeSettings, side: ModelSide) -> None:
        self._side = side
        self._services: Services = make_services(
            side.catalog,
            clock=side.clock,
            events=side.metrics,
            user_keys=_ring(settings.api_key, tenant=DEFAULT_TENANT, param="api_key"),
            admin_keys=_ring(settings.admin_key, tenant=ADMIN_TENANT, param="admin_key"),
            admins=side.admins,
            adapters=side.adapters,
        )
        self._app: FastAPI = make_app(self._services, hosts=allowed_hosts(settings))
        self._admin_app = None if settings.admin_key is None else make_admin_app(self._services)
        self._config = ServerConfig(
            host=settings.host,
            port=settings.port,
            admin_port=settings.admin_port,
            shutdown_timeout_s=settings.shutdown_timeout,
        )

    async def serve(self, on_ready: Callable[[Addresses], None]) -> None:
        """Serve until a signal.

        Raises:
            StartupError: a port is taken, or the model cannot start.
        """
        await lifecycle.serve(
            self._app,
            services=self._services,
            backend=self._side.backend,
            config=self._config,
            admin_app=self._admin_app,
            on_ready=on_ready,
        )


def allowed_hosts(settings: ServeSettings) -> tuple[str, ...] | None:
    """Names that requests may be addressed to; None is any. Logs a warning if anybody on the network may ask.

    A key protects by itself, whatever name a proxy has passed on.
    """
    if settings.api_key is not None:
        return None
    if is_loopback(settings.host):
        return (*LOCAL_HOSTS, settings.host)
    log.warning("open to the network without an API key", extra={"host": settings.host})
    return None


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a listener at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _ring(key: str | None, *, tenant: TenantId, param: str) -> KeyRing:
    if key is not None and not 1 <= len(key) <= MAX_KEY_CHARS:
        raise StartupError(
            f"{param} has {len(key)} characters, it must have 1 to {MAX_KEY_CHARS}", param=param
        )
    return KeyRing({} if key is None else {key: tenant})
