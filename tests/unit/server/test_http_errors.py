"""Every error, wherever it arises, leaves in OpenAI's shape with the status of the one table."""

import json

import pytest

from penstock.core import errors as core
from penstock.server.errors import STATUS, status_of
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient

CHAT = "/v1/chat/completions"
HELLO = {"messages": [{"role": "user", "content": "hi"}]}


def every_class(root: type[core.PenstockError]) -> list[type[core.PenstockError]]:
    return [root] + [found for each in root.__subclasses__() for found in every_class(each)]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (core.InvalidParameterError("x", param="p"), 400),
        (core.NotFoundError("x"), 404),
        (core.AuthenticationError("x"), 401),
        (core.PayloadTooLargeError("x"), 413),
        (core.QueueFullError("x", retry_after_s=2.2), 429),
        (core.NotReadyError("x"), 503),
        (core.GenerateError("x", code="numerical_error"), 500),
        (core.EngineDeadError("x"), 503),
    ],
)
async def test_a_refusal_before_the_first_byte_has_its_own_status(error, status):
    for stream in (False, True):
        async with bench(FakeModelClient(refusal=error)) as b:
            reply = await b.http.post(CHAT, json=HELLO | {"stream": stream})
        body = reply.json()["error"]
        assert reply.status_code == status
        assert set(body) == {"message", "type", "param", "code"}
        assert body["code"] == error.code
        assert ("retry-after" in reply.headers) == (status in {429, 503})
        assert b.metric(f'penstock_errors_total{{code="{error.code}"}}') == 1
    if isinstance(error, core.QueueFullError):
        assert reply.headers["retry-after"] == "3"


def test_every_error_class_has_a_status():
    for cls in every_class(core.PenstockError):
        assert status_of(cls("x"))[0] in range(400, 600)
    assert STATUS[core.PenstockError][0] == 500


@pytest.mark.parametrize("after", [0, 2])
async def test_a_failure_in_the_middle_of_a_stream_is_an_error_event_and_the_end(after, caplog):
    model = FakeModelClient(failure=core.EngineDeadError("secret reason"), fail_after=after)
    async with bench(model) as b:
        reply = await b.http.post(CHAT, json=HELLO | {"stream": True})
    tail = reply.text.split("event: error\ndata: ")[1]
    assert json.loads(tail)["error"]["code"] == "engine_restarting"
    assert "[DONE]" not in reply.text
    assert "secret" not in reply.text
    (record,) = [record for record in caplog.records if record.getMessage() == "engine error"]
    assert (record.detail, record.request_id) == ("secret reason", reply.headers["x-request-id"])


async def test_a_failure_without_streaming_is_a_503_and_can_be_retried():
    model = FakeModelClient(failure=core.EngineDeadError("x"), fail_after=2)
    async with bench(model) as b:
        reply = await b.http.post(CHAT, json=HELLO)
    assert reply.status_code == 503
    assert reply.headers["retry-after"]


@pytest.mark.parametrize("stream", [False, True])
async def test_an_unexpected_exception_tells_the_request_id_and_nothing_else(stream, caplog):
    model = FakeModelClient(failure=RuntimeError("/etc/secret at 0x7f00"), fail_after=1)
    async with bench(model) as b:
        reply = await b.http.post(CHAT, json=HELLO | {"stream": stream}, headers={"x-request-id": "req-1"})
    assert reply.status_code == (200 if stream else 500)
    assert "req-1" in reply.text
    assert "secret" not in reply.text
    assert "0x7f" not in reply.text
    assert "secret" in caplog.text
    assert b.model.num_open == 0


@pytest.mark.parametrize(
    "path", ["/nope", "/v1/chat/completions/", "/admin/memory", "/v1", "//health", "/health/"]
)
async def test_what_is_not_in_the_table_is_a_404(path):
    async with bench() as b:
        reply = await b.http.get(path)
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "not_found"


async def test_a_wrong_method_is_a_405_with_allow():
    async with bench() as b:
        reply = await b.http.delete(CHAT)
    assert reply.status_code == 405
    assert reply.headers["allow"] == "POST"
    assert reply.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("sent", "kept"),
    [("abc.DEF_1-2", True), ("a" * 128, True), ("a" * 129, False), ("a b", False), ('"x"', False)],
)
async def test_a_request_id_is_kept_if_it_is_well_formed_and_replaced_otherwise(sent, kept):
    async with bench() as b:
        reply = await b.http.get("/health", headers={"x-request-id": sent})
    assert (reply.headers["x-request-id"] == sent) == kept
    assert reply.headers["x-request-id"]
