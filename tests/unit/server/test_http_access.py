"""Who may ask what: every route of both tables against every kind of key, and nothing beside the tables."""

import httpx
import pytest

from penstock.core.ids import ModelName, RequestId, TenantId
from penstock.core.tokens import MemoryReport, RequestReport
from penstock.server.admin import ADMIN_ROUTES
from penstock.server.app import PUBLIC_ROUTES, make_app
from penstock.server.host_guard import LOCAL_HOSTS
from penstock.server.routes import Access
from tests.fakes.http_server import ADMIN_KEY, USER_KEY, bench, services_for
from tests.fakes.model_client import FakeModelClient

KEYS = {"none": None, "user": USER_KEY, "admin": ADMIN_KEY, "wrong": "sk-wrong"}
PASSES = {
    Access.PUBLIC: {"none", "user", "admin", "wrong"},
    Access.USER: {"user"},
    Access.ADMIN: {"admin"},
}
BODIES = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/completions": {"prompt": "hi"},
    "/v1/embeddings": {"input": "a"},
    "/tokenize": {"prompt": "hi"},
    **{path: {"text_1": "a", "text_2": "b"} for path in ("/score", "/v1/score")},
    **{path: {"query": "a", "documents": ["b"]} for path in ("/rerank", "/v1/rerank", "/v2/rerank")},
    "/classify": {"input": "a"},
    "/detokenize": {"tokens": [65]},
    "/generate": {"prompt": "hi"},
    "/stream": {"prompt": "hi"},
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "a"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
    "/admin/sleep": {"level": 1},
    "/admin/wake_up": {},
}
MATRIX = [
    (listener, route, method, kind)
    for listener, routes in (("public", PUBLIC_ROUTES), ("admin", ADMIN_ROUTES))
    for route in routes
    for method in route.methods
    for kind in KEYS
]


class FakeAdmin:
    """Implements `EngineAdmin`."""

    async def memory(self) -> MemoryReport:
        return MemoryReport(
            weights_bytes=1,
            kv_bytes_total=10,
            kv_bytes_free=5,
            kv_bytes_cached=3,
            kv_bytes_owned=2,
            prefix_tree_nodes=4,
            prefix_tree_bytes=6,
            buffer_bytes=7,
            process_rss_bytes=8,
        )

    async def requests(self) -> list[RequestReport]:
        return [
            RequestReport(
                request_id=RequestId("r"),
                tenant_id=TenantId("t"),
                priority=1,
                state="running",
                num_prompt_tokens=1,
                num_computed_tokens=1,
                num_generated_tokens=0,
                num_blocks=1,
                num_preemptions=0,
                age_s=0.5,
            )
        ]


def headers(kind: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[kind]}"} if KEYS[kind] else {}


@pytest.mark.parametrize(("listener", "route", "method", "kind"), MATRIX)
async def test_each_route_lets_in_exactly_whom_its_row_names(listener, route, method, kind):
    async with bench(keys=True) as b:
        http = b.http if listener == "public" else b.admin
        path = route.path.replace("{model:path}", "fake")
        sent = {"json": BODIES[route.path]} if method == "POST" else {"params": BODIES.get(route.path)}
        reply = await http.request(method, path, headers=headers(kind), **sent)
    passes = kind in PASSES[route.access]
    assert reply.status_code == (200 if passes else 401), reply.text
    if not passes:
        assert reply.json()["error"]["code"] == "invalid_api_key"
        assert reply.headers["www-authenticate"] == "Bearer"
        assert b.model.requests == []


@pytest.mark.parametrize("path", [route.path for route in ADMIN_ROUTES if route.path.startswith("/admin")])
async def test_admin_routes_do_not_exist_on_the_public_port(path):
    async with bench(keys=True) as b:
        assert (await b.http.get(path, headers=headers("admin"))).status_code == 404


@pytest.mark.parametrize(
    "path",
    [
        "/v1//models",
        "/V1/models",
        "/v1/models/../../health",
        "/health/../v1/models",
        "/v1/models;x",
        "/%76%31/models",
    ],
)
async def test_no_spelling_of_a_path_goes_round_the_key(path):
    async with bench(keys=True) as b:
        reply = await b.http.get(path, headers={"host": "evil/health"})
    assert reply.status_code in {401, 404, 405} or path.endswith("/../health"), (path, reply.text)


@pytest.mark.parametrize(
    "value",
    ["", "Bearer", "Bearer ", "Basic dXNlcg==", USER_KEY, f"Bearer {USER_KEY}x", "Bearer " + "k" * 600],
)
async def test_malformed_credentials_are_refused(value):
    async with bench(keys=True) as b:
        assert (await b.http.get("/v1/models", headers={"authorization": value})).status_code == 401


async def test_without_keys_everybody_is_a_user_and_nobody_an_administrator():
    async with bench() as b:
        assert (await b.http.get("/v1/models")).status_code == 200
        assert (await b.admin.get("/admin/memory", headers=headers("admin"))).status_code == 401


async def test_many_failed_log_ins_are_slowed_down_and_a_right_key_still_passes():
    async with bench(keys=True) as b:
        statuses = [(await b.http.get("/v1/models", headers=headers("wrong"))).status_code for _ in range(30)]
        right = await b.http.get("/v1/models", headers=headers("user"))
    assert statuses[0] == 401
    assert statuses[-1] == 429
    assert right.status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8001", "127.0.0.1.evil.example", "", "127.0.0.1:8001@evil"]
)
async def test_the_admin_listener_refuses_foreign_host_headers(host):
    async with bench(keys=True) as b:
        reply = await b.admin.get("/admin/memory", headers=headers("admin") | {"host": host})
    assert reply.status_code == 421
    assert reply.json()["error"]["code"] == "wrong_host"


async def ask_guarded(headers):
    model = FakeModelClient()
    app = make_app(services_for(model), hosts=LOCAL_HOSTS)
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as http:
        return await http.get("/generate", params={"prompt": "hi"}, headers=headers), model


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:9", "LOCALHOST", "[::1]:8000", "[::1]"])
async def test_a_local_listener_answers_to_local_names(host):
    reply, model = await ask_guarded({"host": host})
    assert (reply.status_code, len(model.requests)) == (200, 1)


@pytest.mark.parametrize(
    ("sent", "status", "code", "words"),
    [
        ({"host": "evil.example:8000"}, 421, "wrong_host", "'evil.example:8000'"),
        ({"host": "127.0.0.1.evil.example"}, 421, "wrong_host", "localhost"),
        ({"sec-fetch-site": "cross-site"}, 403, "foreign_page", "another site"),
    ],
)
async def test_a_page_of_another_site_cannot_drive_a_local_listener(sent, status, code, words):
    reply, model = await ask_guarded(sent)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"]) == (status, code)
    assert words in error["message"]
    assert "x-request-id" in reply.headers
    assert model.requests == []


@pytest.mark.parametrize("value", ["same-origin", "same-site", "none"])
async def test_our_own_pages_may_ask(value):
    assert (await ask_guarded({"sec-fetch-site": value}))[0].status_code == 200


async def test_the_administrator_sees_memory_and_requests():
    async with bench(keys=True, admins={ModelName("fake"): FakeAdmin()}) as b:
        memory = (
            await b.admin.get("/admin/memory", headers=headers("admin") | {"host": "localhost:8001"})
        ).json()
        requests = (await b.admin.get("/admin/requests", headers=headers("admin"))).json()
        health = (await b.http.get("/health")).json()
    assert memory["models"][0]["kv_bytes_owned"] == 2
    assert requests["requests"][0]["state"] == "running"
    assert health["memory"]["engines"][0]["weights_bytes"] == 1
    assert health["memory"]["process_rss_bytes"] > 0


def test_the_app_serves_exactly_the_table():
    app = make_app(services_for(FakeModelClient()))
    served = {(route.path, method) for route in app.routes for method in route.methods}
    assert served == {(route.path, method) for route in PUBLIC_ROUTES for method in route.methods}
