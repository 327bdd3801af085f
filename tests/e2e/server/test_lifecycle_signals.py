"""From loading to exit: readiness, draining at the first signal, cutting at the second."""

import asyncio
import json
import socket

import httpx
import pytest

from penstock.core.errors import StartupError
from penstock.server.app import make_app
from penstock.server.lifecycle import ServerConfig, bind, serve
from tests.fakes.http_server import FakeBackend, running, services_for
from tests.fakes.model_client import FakeModelClient

HELLO = {"messages": [{"role": "user", "content": "hi"}]}
PATIENCE_S = 10


async def test_while_loading_the_server_is_alive_and_not_ready():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    model = FakeModelClient()
    services = services_for(model, in_catalog=False)
    backend = FakeBackend(services.catalog, model)
    ready: asyncio.Event = asyncio.Event()
    task = asyncio.create_task(
        serve(
            make_app(services),
            services=services,
            backend=backend,
            config=ServerConfig(port=port, shutdown_timeout_s=1),
            on_ready=lambda _: ready.set(),
        )
    )
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        while "start" not in backend.calls:
            await asyncio.sleep(0)
        assert (await http.get("/health")).status_code == 200
        reply = await http.get("/health/ready")
        assert (reply.status_code, reply.json()["reason"]) == (503, "loading")
        refused = await http.post("/v1/chat/completions", json=HELLO)
        assert refused.status_code == 503
        assert refused.headers["retry-after"]
        backend.ready.set()
        await asyncio.wait_for(ready.wait(), PATIENCE_S)
        assert (await http.get("/health/ready")).status_code == 200
        model.not_ready = "restarting"
        assert (await http.get("/health/ready")).json()["reason"] == "fake: restarting"
    asyncio.get_running_loop().call_soon(_term)
    await asyncio.wait_for(task, PATIENCE_S)
    assert backend.calls == ["start", "drain", "close"]


def _term() -> None:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGTERM)


async def test_a_backend_that_cannot_start_ends_the_server_with_its_error():
    model = FakeModelClient()
    services = services_for(model, in_catalog=False)
    backend = FakeBackend(services.catalog, model, error=StartupError("no such folder"))
    backend.ready.set()
    with pytest.raises(StartupError, match="no such folder"):
        await serve(make_app(services), services=services, backend=backend, config=ServerConfig(port=0))
    assert backend.calls == ["start", "close"]


async def test_a_signal_while_loading_ends_the_server_at_once():
    services = services_for(FakeModelClient(), in_catalog=False)
    backend = FakeBackend(services.catalog, FakeModelClient())
    task = asyncio.create_task(
        serve(make_app(services), services=services, backend=backend, config=ServerConfig(port=0))
    )
    while "start" not in backend.calls:
        await asyncio.sleep(0)
    _term()
    await asyncio.wait_for(task, PATIENCE_S)
    assert backend.calls == ["start", "close"]


def test_a_port_in_use_is_one_clear_line():
    with bind("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartupError, match=rf"port {port} on 127\.0\.0\.1 is in use; choose another"):
            bind("127.0.0.1", port)


async def test_the_first_signal_lets_streams_finish_and_admits_nobody():
    model = FakeModelClient(hold_after=2)
    async with running(model) as server, httpx.AsyncClient(base_url=server.addresses.public) as http:
        stream = asyncio.create_task(http.post("/v1/chat/completions", json=HELLO | {"stream": True}))
        await asyncio.wait_for(model.held.wait(), PATIENCE_S)
        server.term()
        while server.services.gate.closed_reason is None:
            await asyncio.sleep(0)
        ready = await http.get("/health/ready")
        assert (ready.status_code, ready.json()["reason"]) == (503, "draining")
        refused = await http.post("/v1/chat/completions", json=HELLO)
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "not_ready"
        assert (await http.get("/health")).status_code == 200
        model.resume.set()
        reply = await stream
        assert reply.text.endswith("data: [DONE]\n\n")
        await asyncio.wait_for(server.task, PATIENCE_S)
        assert server.backend.calls == ["start", "drain", "close"]
        assert model.cancelled == []


@pytest.mark.parametrize("how", ["second signal", "budget over"])
@pytest.mark.parametrize("stream", [False, True])
async def test_what_does_not_finish_is_told_so(how, stream):
    model = FakeModelClient(hold_after=2)
    budget_s = 30.0 if how == "second signal" else 0.05
    async with running(model, shutdown_timeout_s=budget_s) as server:
        async with httpx.AsyncClient(base_url=server.addresses.public) as http:
            asked = asyncio.create_task(http.post("/v1/chat/completions", json=HELLO | {"stream": stream}))
            await asyncio.wait_for(model.held.wait(), PATIENCE_S)
            server.term()
            if how == "second signal":
                while server.services.gate.closed_reason is None:
                    await asyncio.sleep(0)
                server.term()
            reply = await asyncio.wait_for(asked, PATIENCE_S)
        await asyncio.wait_for(server.task, PATIENCE_S)
    body = reply.text.split("event: error\ndata: ")[1] if stream else reply.text
    assert json.loads(body)["error"]["code"] == "stopping"
    assert reply.status_code == (200 if stream else 503)
    assert len(model.cancelled) == 1
