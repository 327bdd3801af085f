"""Orders about adapters, on the administrators' listener alone."""

import pytest

from penstock.core.ids import ModelName
from tests.fakes.adapter_admin import FakeAdapters
from tests.fakes.http_server import ADMIN_KEY, bench

HEADERS = {"authorization": f"Bearer {ADMIN_KEY}"}
ENTRY = {
    "model": "fake",
    "name": "a",
    "revision": "0123",
    "rank": 8,
    "num_bytes": 4096,
    "is_in_memory": True,
    "num_requests": 2,
}
"""Never where its files are."""


async def test_adapters_are_listed_without_their_paths():
    async with bench(keys=True, adapters={ModelName("fake"): FakeAdapters()}) as b:
        reply = await b.admin.get("/admin/adapters", headers=HEADERS)
    assert reply.json() == {"adapters": [ENTRY]}


async def test_orders_reach_the_model_with_their_fields():
    adapters = FakeAdapters()
    async with bench(keys=True, adapters={ModelName("fake"): adapters}) as b:
        body = {"lora_name": "a", "lora_path": "folder", "load_inplace": True}
        loaded = await b.admin.post("/v1/load_lora_adapter", json=body, headers=HEADERS)
        again = {"lora_name": "b", "lora_path": "folder"}
        await b.admin.post("/v1/load_lora_adapter", json=again, headers=HEADERS)
        gone = await b.admin.post("/v1/unload_lora_adapter", json={"lora_name": "a"}, headers=HEADERS)
    assert (loaded.status_code, gone.status_code) == (200, 200)
    assert loaded.json() == gone.json() == ENTRY
    assert adapters.orders == [("a", "folder", True), ("b", "folder", False), ("a", "", False)]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "x"}, "lora_name"),
        ({"lora_name": "x"}, "lora_path"),
        ({"lora_name": "x" * 129, "lora_path": "x"}, "lora_name"),
        ({"lora_name": "x", "lora_path": "x", "load_inplace": 1}, "load_inplace"),
        ({"lora_name": "x", "lora_path": "x", "lora_int_id": 1}, "lora_int_id"),
    ],
)
async def test_a_wrong_field_of_an_order_is_named(body: dict[str, object], param: str):
    async with bench(keys=True, adapters={ModelName("fake"): FakeAdapters()}) as b:
        reply = await b.admin.post("/v1/load_lora_adapter", json=body, headers=HEADERS)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_without_a_model_that_takes_adapters_orders_are_refused():
    async with bench(keys=True, adapters={}) as b:
        body = {"lora_name": "a", "lora_path": "a"}
        reply = await b.admin.post("/v1/load_lora_adapter", json=body, headers=HEADERS)
    assert reply.status_code == 400
    assert "enable_lora" in reply.json()["error"]["message"]


async def test_the_public_port_takes_no_orders():
    async with bench(keys=True) as b:
        body = {"lora_name": "a", "lora_path": "a"}
        reply = await b.http.post("/v1/load_lora_adapter", json=body, headers=HEADERS)
    assert reply.status_code == 404
