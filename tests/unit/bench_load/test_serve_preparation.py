"""Before the load: the server is found, the model chosen, prompts fit what the server takes."""

import io
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from rich.console import Console

import penstock
from penstock.bench import probe
from penstock.bench.arrivals import Arrivals
from penstock.bench.lengths import constant, uniform
from penstock.bench.prompts import TokenIdWriter, WordWriter
from penstock.bench.recipe import Recipe
from penstock.bench.serve import (
    Prepared,
    ServeOptions,
    loop_words,
    measure,
    prepare,
    record,
    title_of,
    warm_up,
)
from penstock.bench.target import FIXED_FIELDS, Target, TargetError, api_url
from penstock.bench.workload import LoadRequest
from penstock.core.errors import InvalidParameterError
from tests.unit.bench_load.scripted_server import ScriptedServer, scripted

EMBEDDED = Path(penstock.__file__).parent / "models" / "embedded"
QUIET = Console(file=io.StringIO())
SMALL = Recipe(num_requests=4, input_lens=constant(40), output_lens=constant(3), max_concurrency=2)


async def _prepared(server: ScriptedServer, **options: Any) -> Prepared:
    target = server.target(model=options.pop("model", ""), route=options.pop("route", "completions"),
                           api_key=options.pop("api_key", None))  # fmt: skip
    return await prepare(ServeOptions(target=target, recipe=options.pop("recipe", SMALL), **options))


async def test_the_only_model_is_taken_and_token_ids_are_sent() -> None:
    async with scripted(ScriptedServer(models=["only"])) as server:
        prepared = await _prepared(server)
    assert prepared.target.model == "only"
    assert isinstance(prepared.writer, TokenIdWriter)
    assert prepared.notes == ()


async def test_a_server_that_refuses_token_ids_gets_text_of_the_same_length() -> None:
    async with scripted(ScriptedServer(takes_ids=False, tokens_per_word=2, num_extra_tokens=4)) as server:
        prepared = await _prepared(server)
        options = ServeOptions(target=prepared.target, recipe=SMALL)
        measured = await measure(options, prepared=prepared, console=QUIET, is_shown=False)
    assert isinstance(prepared.writer, WordWriter)
    assert (
        "prompts are text: the server does not take token ids (http_400: prompt must be text)"
        in prepared.notes
    )
    assert [request.num_prompt_tokens for request in measured.result.records] == [40] * 4


async def test_a_server_that_reads_ids_as_something_else_gets_text() -> None:
    server = ScriptedServer(num_extra_tokens=0)
    server.count = lambda body: 3 if isinstance(body["prompt"], list) else len(body["prompt"].split())  # type: ignore[method-assign]
    async with scripted(server):
        prepared = await _prepared(server)
    assert isinstance(prepared.writer, WordWriter)
    assert "it counts 3 tokens where 16 were sent" in prepared.notes[0]


async def test_chat_takes_off_what_the_template_adds() -> None:
    async with scripted(ScriptedServer(num_extra_tokens=11)) as server:
        prepared = await _prepared(server, route="chat")
        options = ServeOptions(target=prepared.target, recipe=SMALL)
        measured = await measure(options, prepared=prepared, console=QUIET, is_shown=False)
    assert [request.num_prompt_tokens for request in measured.result.records] == [40] * 4


async def test_without_usage_lengths_are_in_words_and_said_so() -> None:
    async with scripted(ScriptedServer(sends_usage=False)) as server:
        prepared = await _prepared(server, route="chat")
    assert prepared.notes == (
        "prompt lengths are in words: the server sends no usage, and there is no --tokenizer",
    )


async def test_a_tokenizer_folder_widens_the_ids() -> None:
    async with scripted() as server:
        prepared = await _prepared(server, tokenizer=EMBEDDED)
    assert isinstance(prepared.writer, TokenIdWriter)
    assert prepared.writer.high == 4096


async def test_ids_that_are_insisted_on_and_refused_are_an_error() -> None:
    async with scripted(ScriptedServer(takes_ids=False)) as server:
        with pytest.raises(TargetError, match="does not take token ids: http_400"):
            await _prepared(server, prompt_format="ids")


@pytest.mark.parametrize(
    ("models", "wanted", "words"),
    [
        (["a", "b"], "", r"the server has 2 models \(a, b\): choose with --model"),
        ([], "", r"the server has 0 models \(none\)"),
        (["a", "b"], "c", "the server has no model 'c', it has a, b"),
    ],
)
async def test_a_model_that_is_not_there_is_told(models: list[str], wanted: str, words: str) -> None:
    async with scripted(ScriptedServer(models=models)) as server:
        with pytest.raises(TargetError, match=words):
            await _prepared(server, model=wanted)


async def test_a_dead_server_is_told_with_its_address() -> None:
    async with scripted() as server:
        url = server.url
    with pytest.raises(TargetError, match=f"no server answers at {url}/v1/models: .*Connection refused"):
        await _prepared(server)


async def test_a_wrong_key_is_told() -> None:
    async with scripted(ScriptedServer(api_key="right")) as server:
        with pytest.raises(TargetError, match="refuses the key .*give --api-key"):
            await _prepared(server, api_key="wrong")


async def test_another_kind_of_server_is_told() -> None:
    async def page(_request: web.Request) -> web.Response:
        return web.Response(text="<html>")

    server = ScriptedServer()
    server.list_models = page  # type: ignore[method-assign, assignment]
    async with scripted(server):
        with pytest.raises(TargetError, match="does not list models, is this an OpenAI-compatible server"):
            await _prepared(server)


async def test_a_path_that_is_not_there_is_told() -> None:
    async with scripted() as server:
        target = Target(base_url=f"{server.url}/other", model="")
        with pytest.raises(TargetError, match="/other/v1/models answers 404, is this an OpenAI-compatible"):
            await prepare(ServeOptions(target=target))


async def test_a_late_server_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "RETRY_PERIOD_S", 0.0)
    async with scripted() as server:
        answer, num_asked = server.list_models, 0

        async def late(request: web.Request) -> web.Response:
            nonlocal num_asked
            num_asked += 1
            if num_asked < 3:
                return web.Response(status=503)
            return await answer(request)

        second = ScriptedServer()
        second.list_models = late  # type: ignore[method-assign]
        async with scripted(second):
            prepared = await _prepared(second, ready_timeout_s=60.0)
    assert (num_asked, prepared.target.model) == (3, "tiny")


async def test_requests_beyond_the_context_are_refused_before_anything_is_sent() -> None:
    recipe = Recipe(input_lens=uniform(1, high=90), output_lens=constant(20), prefix_len=5)
    async with scripted(ScriptedServer(max_model_len=100)) as server:
        with pytest.raises(
            InvalidParameterError, match="up to 115 tokens, max_model_len of the server is 100"
        ):
            await _prepared(server, recipe=recipe)
    assert server.bodies == []


async def test_warm_up_is_sent_and_not_measured() -> None:
    async with scripted() as server:
        prepared = await _prepared(server)
        options = ServeOptions(target=prepared.target, recipe=SMALL, num_warmups=3)
        num_probes = len(server.bodies)
        await warm_up(options, prepared=prepared, console=QUIET, is_shown=False)
        assert len(server.bodies) == num_probes + 3
        measured = await measure(options, prepared=prepared, console=QUIET, is_shown=False)
    assert measured.summary.num_sent == 4


async def test_a_warm_up_that_nobody_answers_ends_it() -> None:
    async def refuse(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no blocks"}}, status=500)

    async with scripted() as server:
        prepared = await _prepared(server)
        server.handler = refuse
        with pytest.raises(TargetError, match="no warm-up request was answered: http_500: no blocks"):
            options = ServeOptions(target=prepared.target, recipe=SMALL)
            await warm_up(options, prepared=prepared, console=QUIET, is_shown=False)


async def test_a_cache_that_knows_the_prompts_is_told() -> None:
    async with scripted() as server:
        prepared = await _prepared(server)
        options = ServeOptions(target=prepared.target, recipe=SMALL)
        server.handler = _cached
        measured = await measure(options, prepared=prepared, console=QUIET, is_shown=False)
    assert "120 of 160 prompt tokens came from the server's prefix cache" in measured.notes[0]


async def _cached(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
    from tests.unit.bench_load.scripted_server import DONE, stream, text_event, usage_event

    usage = usage_event(prompt=40, completion=body["max_tokens"], cached=30)
    return await stream(request, [text_event("x", finish="length"), usage, DONE])


async def test_the_record_says_how_to_make_the_load_again() -> None:
    async with scripted() as server:
        prepared = await _prepared(server)
        options = ServeOptions(target=prepared.target, recipe=SMALL)
        measured = await measure(options, prepared=prepared, console=QUIET, is_shown=False)
    kept: Any = record(options, prepared=prepared, measured=measured, metadata={"a": "b"}, is_detailed=True)
    workload = kept["workload"]
    assert (workload["seed"], workload["num_prompts"], workload["max_concurrency"]) == (0, 4, 2)
    assert (workload["input_lens"], workload["output_lens"], workload["prompts"]) == ("40", "3", "token ids")
    assert kept["results"]["completed"] == 4
    assert kept["metadata"] == {"a": "b"}
    assert [row["output_tokens"] for row in kept["requests"]] == [3] * 4
    assert {"cpu", "cores", "commit", "date", "versions"} <= set(kept["environment"])
    assert "4 requests, closed loop, 2 at a time" in title_of(options, prepared=prepared)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"route": "chat", "prompt_format": "ids"}, "endpoint chat takes text only"),
        ({"route": "chat", "token_ids": (1, 2)}, "random_token_ids is set, prompts are text"),
        ({"prompt_format": "text", "token_ids": (1, 2)}, "random_token_ids is set, prompts are text"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], words: str) -> None:
    target = Target(base_url="http://127.0.0.1:1", model="", route=options.pop("route", "completions"))
    with pytest.raises(InvalidParameterError, match=words):
        ServeOptions(target=target, **options)


@pytest.mark.parametrize("name", FIXED_FIELDS)
def test_fields_that_would_change_what_is_counted_are_refused(name: str) -> None:
    with pytest.raises(InvalidParameterError, match=f"extra_body has {name}, it must have none of model"):
        Target(base_url="http://h", model="", body={name: 2})
    with pytest.raises(InvalidParameterError, match=f"extra_body has {name}"):
        LoadRequest(prompt="x", num_prompt_tokens=1, num_output_tokens=1, body={name: 2})


@pytest.mark.parametrize(
    ("base_url", "expected"),
    [
        ("http://h:1", "http://h:1/v1"),
        ("http://h:1/", "http://h:1/v1"),
        ("http://h:1/v1", "http://h:1/v1"),
        ("https://h/api/v3/", "https://h/api/v3"),
        ("http://h/proxy", "http://h/proxy/v1"),
    ],
)
def test_the_version_is_added_unless_it_is_there(base_url: str, expected: str) -> None:
    assert api_url(base_url) == expected


@pytest.mark.parametrize("url", ["", "localhost:8000", "ftp://h", "http://", "http://h:0", "http://h:99999"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(InvalidParameterError, match="base_url is .* it must be like http://host:8000"):
        Target(base_url=url, model="")


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (Recipe(), "all at once"),
        (Recipe(max_concurrency=3), "closed loop, 3 at a time"),
        (Recipe(arrivals=Arrivals(request_rate=2.5)), "open loop, 2.5 requests/s, poisson"),
        (Recipe(arrivals=Arrivals(request_rate=2), max_concurrency=9),
         "open loop, 2 requests/s, poisson, at most 9 in flight"),
    ],
)  # fmt: skip
def test_the_kind_of_load_is_told_in_words(recipe: Recipe, words: str) -> None:
    assert loop_words(recipe) == words
