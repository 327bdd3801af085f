"""Tokens, models, health, readiness, metrics: the small routes."""

import asyncio

import msgspec
import pytest

from penstock.core.errors import NotReadyError
from penstock.core.ids import ModelName
from penstock.server import engine_reports
from penstock.server.services import Gate
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient
from tests.unit.server.test_http_access import FakeAdmin


async def test_tokenize_and_detokenize_are_inverse():
    async with bench() as b:
        tokens = (await b.http.post("/tokenize", json={"prompt": "hé", "add_special_tokens": False})).json()
        text = (await b.http.post("/detokenize", json={"tokens": tokens["tokens"]})).json()
    assert tokens == {"count": 2, "max_model_len": 4096, "tokens": [104, 233]}
    assert text == {"prompt": "hé"}


@pytest.mark.parametrize(
    ("body", "special"),
    [
        ({"prompt": "a"}, True),
        ({"messages": [{"role": "user", "content": "a"}]}, False),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, True),
    ],
)
async def test_special_tokens_are_added_to_prompts_and_left_to_templates(body, special):
    async with bench() as b:
        tokens = (await b.http.post("/tokenize", json=body)).json()["tokens"]
    assert (tokens[0] == 0) == special


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [2**40]}, "tokens.0"),
    ],
)
async def test_a_wrong_field_is_a_400_that_names_it(path, body, param):
    async with bench() as b:
        reply = await b.http.post(path, json=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param


async def test_models_lists_names_and_aliases():
    async with bench() as b:
        models = (await b.http.get("/v1/models")).json()
        one = (await b.http.get("/v1/models/alias")).json()
        unknown = await b.http.get("/v1/models/org/nope")
    assert [(m["id"], m["parent"]) for m in models["data"]] == [("fake", None), ("alias", "fake")]
    assert (one["id"], one["max_model_len"]) == ("alias", 4096)
    assert unknown.status_code == 404


@pytest.mark.parametrize(
    ("gate", "model", "reason"),
    [
        (None, None, None),
        ("loading", None, "loading"),
        ("draining", None, "draining"),
        (None, "queue_full", "fake: queue_full"),
        (None, "restarting", "fake: restarting"),
    ],
)
async def test_ready_says_why_not(gate, model, reason):
    async with bench(FakeModelClient(not_ready=model), gate=Gate(closed_reason=gate)) as b:
        reply = await b.http.get("/health/ready")
        alive = await b.http.get("/health")
    assert reply.status_code == (200 if reason is None else 503)
    assert reply.json()["reason"] == reason
    assert alive.status_code == 200


async def test_nothing_is_admitted_while_the_gate_is_closed():
    async with bench(gate=Gate(closed_reason="loading", retry_after_s=2)) as b:
        reply = await b.http.post("/v1/completions", json={"prompt": "a"})
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "2")
    assert b.model.requests == []


class StuckAdmin:
    """An engine that hangs."""

    async def memory(self):
        await asyncio.Event().wait()

    async def requests(self):
        raise NotReadyError("restarting")


async def test_health_answers_though_an_engine_hangs():
    async with bench(keys=True, admins={ModelName("fake"): StuckAdmin()}) as b:
        reply = await b.http.get("/health")
    assert reply.status_code == 200
    assert reply.json()["memory"]["engines"] == []


class SlowAdmin(FakeAdmin):
    """An engine that answers its second question late, and is then gone."""

    def __init__(self):
        self.num_asked = 0
        self.may_answer = asyncio.Event()

    async def memory(self):
        self.num_asked += 1
        if self.num_asked == 2:
            await self.may_answer.wait()
        if self.num_asked > 2:
            raise NotReadyError("restarting")
        return msgspec.structs.replace(await super().memory(), weights_bytes=self.num_asked)


async def test_health_keeps_the_last_figures_with_their_age_while_an_engine_is_busy(monkeypatch):
    monkeypatch.setattr(engine_reports, "WAIT_S", 0.02)
    admin = SlowAdmin()
    async with bench(keys=True, admins={ModelName("fake"): admin}) as b:

        async def engine():
            return (await b.http.get("/health")).json()["memory"]["engines"][0]

        first, busy, still_busy = await engine(), await engine(), await engine()
        num_asked_while_busy = admin.num_asked
        admin.may_answer.set()
        await asyncio.sleep(0)
        gone = await engine()
    assert [first["weights_bytes"], busy["weights_bytes"], still_busy["weights_bytes"]] == [1, 1, 1]
    assert first["age_s"] < 0.01 < busy["age_s"] < still_busy["age_s"]
    assert num_asked_while_busy == 2
    assert gone["weights_bytes"] == 2


async def test_answers_are_counted_by_route_and_status_and_never_by_what_was_sent():
    async with bench() as b:
        await b.http.get("/v1/models/fake")
        await b.http.get("/some/xyzzy/path")
        await b.http.put("/generate")
        text = (await b.http.get("/metrics")).text
    assert 'penstock_http_requests_total{route="/v1/models/{model:path}",status="200"} 1.0' in text
    assert 'penstock_http_requests_total{route="unmatched",status="404"} 1.0' in text
    assert "xyzzy" not in text
