"""`penstock chat --url`: reads the event stream of a server, and tells its errors."""

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest
from aiohttp import web

from penstock.cli.main import main
from penstock.cli.talk import ModelPartner, ServerPartner, TalkError
from penstock.core.ids import ModelName
from penstock.core.params import SamplingParams
from penstock.core.text import Message
from tests.fakes.model_client import FakeModelClient

HI = [Message(role="user", content="Hi")]
MODELS = {"data": [{"id": "first"}, {"id": "second"}]}
PARAMS = SamplingParams(temperature=0.5, max_tokens=9)


@asynccontextmanager
async def _server(
    lines: bytes, *, status: int = 200, models_answer: object = MODELS
) -> AsyncIterator[tuple[str, list[dict[str, object]]]]:
    bodies: list[dict[str, object]] = []

    async def chat(request: web.Request) -> web.Response:
        bodies.append({**await request.json(), "authorization": request.headers.get("Authorization")})
        return web.Response(body=lines, status=status)

    async def models(_: web.Request) -> web.Response:
        return web.json_response(models_answer)

    app = web.Application()
    app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}", bodies
    finally:
        await runner.cleanup()


async def _pieces(stream: AsyncGenerator[str, None]) -> str:
    return "|".join([piece async for piece in stream if piece])


async def test_pieces_come_as_the_server_sends_them() -> None:
    lines = (
        b'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n: keepalive\n\n'
        b'data: {"choices":[{"delta":{"content":"Hel"}}]}\n\n'
        b'data: {"choices":[{"delta":{"content":"lo"}}]}\n\ndata: {"choices":[]}\n\ndata: [DONE]\n\n'
    )
    async with _server(lines) as (url, bodies):
        partner = ServerPartner(url + "/v1", model=None, api_key="k")
        assert await _pieces(partner.answer(HI, PARAMS)) == "Hel|lo"
        await partner.close()
    assert bodies[0]["model"] == "first"
    assert bodies[0]["authorization"] == "Bearer k"
    assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0.5, 9)


async def test_a_refusal_is_told_with_its_message() -> None:
    async with _server(b'{"error": {"message": "n is 9"}}', status=400) as (url, _):
        partner = ServerPartner(url, model="m", api_key=None)
        with pytest.raises(TalkError, match="answered 400: n is 9"):
            await _pieces(partner.answer(HI, PARAMS))
        await partner.close()


async def test_an_error_inside_the_stream_is_told() -> None:
    async with _server(b'data: {"error": {"message": "engine died"}}\n\n') as (url, _):
        partner = ServerPartner(url, model="m", api_key=None)
        with pytest.raises(TalkError, match="engine died"):
            await _pieces(partner.answer(HI, PARAMS))
        await partner.close()


async def test_no_server_is_told_with_its_address() -> None:
    partner = ServerPartner("http://127.0.0.1:1", model="m", api_key=None)
    with pytest.raises(TalkError, match=r"127\.0\.0\.1:1"):
        await _pieces(partner.answer(HI, PARAMS))
    await partner.close()


async def test_leaving_a_model_early_cancels_its_request() -> None:
    client = FakeModelClient(name=ModelName("m"))

    async def close() -> None:
        pass

    stream = ModelPartner(client, close=close).answer(HI, PARAMS)
    assert await anext(stream) == "Hello"
    await stream.aclose()
    assert len(client.cancelled) == 1


@pytest.mark.parametrize("model", [None, "m"])
async def test_no_server_is_told_at_the_start_too(model: str | None) -> None:
    partner = ServerPartner("http://127.0.0.1:1", model=model, api_key=None)
    with pytest.raises(TalkError, match=r"127\.0\.0\.1:1"):
        await partner.connect()
    with pytest.raises(TalkError, match=r"127\.0\.0\.1:1"):
        await _pieces(partner.answer(HI, PARAMS))
    await partner.close()


@pytest.mark.parametrize(
    "line", [b"data: {\n", b"data: []\n", b'data: {"choices": 5}\n', b'data: {"error": "x"}\n']
)
async def test_a_line_that_is_no_event_of_a_chat_is_told(line: bytes) -> None:
    async with _server(line) as (url, _):
        partner = ServerPartner(url, model="m", api_key=None)
        with pytest.raises(TalkError):
            await _pieces(partner.answer(HI, PARAMS))
        await partner.close()


@pytest.mark.parametrize("answer", [{"data": []}, {}, [], {"data": {}}])
async def test_a_server_without_a_list_of_models_is_told(answer: object) -> None:
    async with _server(b"", models_answer=answer) as (url, _):
        partner = ServerPartner(url, model=None, api_key=None)
        with pytest.raises(TalkError, match="/v1/models"):
            await partner.connect()
        await partner.close()


async def test_a_named_model_needs_no_list() -> None:
    async with _server(b"data: [DONE]\n", models_answer={}) as (url, bodies):
        partner = ServerPartner(url, model="m", api_key=None)
        await partner.connect()
        assert await _pieces(partner.answer(HI, PARAMS)) == ""
        await partner.close()
    assert bodies[0]["model"] == "m"


@pytest.mark.parametrize(
    "url", ["localhost:8977", "notaurl", "ftp://host", "http://", "http://h:99999", "http://["]
)
def test_a_url_that_is_none_ends_with_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], url: str
) -> None:
    assert main(["chat", "--url", url]) == 2
    err = capsys.readouterr().err
    assert f"url is {url!r}" in err
    assert err.count("\n") == 1


def test_a_server_that_is_not_there_ends_with_one_line_and_exit_code_1(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["chat", "--url", "http://127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("penstock: http://127.0.0.1:1")
    assert err.count("\n") == 1
