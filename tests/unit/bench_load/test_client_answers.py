"""One request over a real socket: each thing that a server can do has its record."""

import json
import re
from typing import Any

import pytest
from aiohttp import web

from penstock.bench import load as load_module
from penstock.bench.client import RequestRecord, failure_of, one_line
from penstock.bench.load import LoadResult, drive
from penstock.bench.measure import summarize
from penstock.bench.workload import LoadRequest, Workload, from_lists
from tests.unit.bench_load.scripted_server import (
    DONE,
    Handler,
    ScriptedServer,
    broken_stream,
    event,
    good_answer,
    scripted,
    stream,
    text_event,
    usage_event,
)


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "ALIVE_DELAYS_S", (0.0, 0.0, 0.0))


def _saying(*chunks: bytes) -> Handler:
    async def handler(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, list(chunks))

    return handler


async def _ask(
    handler: Handler | None, *, num_tokens: int = 3, num_requests: int = 1, **options: Any
) -> tuple[RequestRecord, ScriptedServer]:
    async with scripted(ScriptedServer(handler=handler)) as server:
        target = server.target(**options)
        workload = from_lists([[5, 6, 7]] * num_requests, output_lens=[num_tokens] * num_requests)
        result = await drive(workload, target)
    return result.records[0], server


async def test_a_good_answer_has_its_tokens_its_pieces_and_no_failure() -> None:
    record, server = await _ask(None)
    assert record.failure is None
    assert (record.num_prompt_tokens, record.num_output_tokens, len(record.pieces_s)) == (3, 3, 3)
    assert record.counted_by == "usage"
    assert record.finish_reason == "length"
    assert 0 <= record.start_s <= record.sent_s <= record.pieces_s[0] <= record.last_s <= record.end_s
    assert server.bodies[0]["prompt"] == [5, 6, 7]


async def test_what_is_asked() -> None:
    _, server = await _ask(
        None, ignore_eos=True, temperature=0.5, body={"top_k": 3, "temperature": 0.25}, api_key="k"
    )
    assert server.bodies == [
        {
            "model": "tiny",
            "max_tokens": 3,
            "stream": True,
            "stream_options": {"include_usage": True},
            "prompt": [5, 6, 7],
            "ignore_eos": True,
            "temperature": 0.25,
            "top_k": 3,
        }
    ]


async def test_chat_sends_a_message_and_reads_deltas() -> None:
    async with scripted() as server:
        result = await drive(
            from_lists(["hello there"], output_lens=[4]), server.target(route="chat", temperature=None)
        )
    assert result.records[0].is_ok
    assert len(result.records[0].pieces_s) == 4
    assert server.bodies[0]["messages"] == [{"role": "user", "content": "hello there"}]
    assert "temperature" not in server.bodies[0]


async def test_a_role_without_text_is_not_the_first_text() -> None:
    role = event({"choices": [{"delta": {"role": "assistant", "content": ""}, "finish_reason": None}]})
    word = event({"choices": [{"delta": {"content": "hi"}, "finish_reason": None}]})
    thought = event({"choices": [{"delta": {"reasoning_content": "hm"}, "finish_reason": None}]})
    end = event({"choices": [{"delta": {}, "finish_reason": "stop"}]})
    record, _ = await _ask(_saying(role, thought, word, end, usage_event(prompt=3, completion=2), DONE))
    assert record.is_ok
    assert len(record.pieces_s) == 2


async def test_a_piece_may_stand_for_several_tokens() -> None:
    answer = (
        text_event("one two"),
        text_event(" three", finish="length"),
        usage_event(prompt=3, completion=3),
    )
    record, _ = await _ask(_saying(*answer))
    assert record.is_ok
    assert (record.num_output_tokens, len(record.pieces_s)) == (3, 2)


async def test_several_events_in_one_chunk_are_all_seen() -> None:
    record, _ = await _ask(_saying(b"".join(good_answer(3))))
    assert record.is_ok
    assert len(record.pieces_s) == 3


@pytest.mark.parametrize("size", [1, 7])
async def test_events_cut_anywhere_are_all_seen(size: int) -> None:
    data = b"".join(good_answer(3))
    record, _ = await _ask(_saying(*(data[i : i + size] for i in range(0, len(data), size))))
    assert record.is_ok
    assert len(record.pieces_s) == 3


async def test_without_usage_pieces_are_counted_and_said_so() -> None:
    record, _ = await _ask(_saying(text_event("a"), text_event("b", finish="length"), DONE), num_tokens=9)
    assert record.is_ok
    assert (record.counted_by, record.num_output_tokens, record.num_prompt_tokens) == ("pieces", 2, 3)


async def test_usage_with_every_event_counts_once() -> None:
    def with_usage(text: str, count: int, finish: str | None = None) -> bytes:
        return event(
            {
                "choices": [{"text": text, "finish_reason": finish}],
                "usage": {"prompt_tokens": 3, "completion_tokens": count},
            }
        )

    record, _ = await _ask(
        _saying(with_usage("a", 1), with_usage("b", 2), with_usage("c", 3, "length"), DONE)
    )
    assert record.is_ok
    assert record.num_output_tokens == 3


async def test_cached_prompt_tokens_are_read() -> None:
    record, _ = await _ask(
        _saying(text_event("a", finish="stop"), usage_event(prompt=3, completion=1, cached=2), DONE)
    )
    assert record.num_cached_tokens == 2


@pytest.mark.parametrize(
    ("chunks", "kind", "words"),
    [
        ([text_event("a"), DONE], "cut_off", "ended after 1 tokens without a finish reason"),
        ([DONE], "cut_off", "ended after 0 tokens"),
        ([event({"error": {"message": "out of blocks", "code": 500}})], "stream_error", "out of blocks"),
        ([event({"error": "just words"})], "stream_error", "just words"),
        ([b"data: {oops\n\n"], "malformed", "JSON is malformed"),
        ([b'data: {"choices": 3}\n\n'], "malformed", "choices"),
        (good_answer(2), "wrong_length", "2 tokens with finish_reason length, 3 were asked for"),
        (good_answer(4), "wrong_length", "4 tokens .* 3 were asked for"),
        (
            [text_event("a", finish="stop"), usage_event(prompt=1, completion=5)],
            "wrong_length",
            "5 tokens with finish_reason stop, 3 were asked for",
        ),
    ],
)
async def test_a_bad_answer_is_a_failure_of_its_kind(chunks: list[bytes], kind: str, words: str) -> None:
    record, _ = await _ask(_saying(*chunks))
    assert record.failure is not None
    assert record.failure.kind == kind
    assert re.search(words, record.failure.message)


async def test_an_answer_that_stops_early_is_good_unless_eos_was_to_be_ignored() -> None:
    early = (text_event("a", finish="stop"), usage_event(prompt=3, completion=1), DONE)
    record, _ = await _ask(_saying(*early))
    assert record.is_ok
    record, _ = await _ask(_saying(*early), ignore_eos=True)
    assert record.failure is not None
    assert record.failure.kind == "wrong_finish"


@pytest.mark.parametrize("status", [400, 404, 429, 503])
async def test_a_refusal_is_counted_by_its_status(status: int) -> None:
    async def handler(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({"error": {"message": "no\nroom"}}, status=status)

    record, _ = await _ask(handler)
    assert record.failure is not None
    assert (record.failure.kind, record.failure.message) == (f"http_{status}", "no room")


async def test_a_page_that_is_no_stream_is_malformed() -> None:
    async def handler(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.Response(text="<html>hello</html>", content_type="text/html")

    record, _ = await _ask(handler)
    assert record.failure is not None
    assert record.failure.kind == "malformed"
    assert "text/html, not an event stream" in record.failure.message


async def test_a_connection_that_breaks_in_mid_answer_keeps_what_came() -> None:
    async def handler(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return await broken_stream(request, good_answer(3)[:2])

    async with scripted(ScriptedServer(handler=handler)) as server:
        result = await drive(from_lists([[1]], output_lens=[3]), server.target())
    record = result.records[0]
    assert record.failure is not None
    assert record.failure.kind == "disconnected"
    assert len(record.pieces_s) == 2
    assert result.is_complete, "the server still listens"


async def test_silence_beyond_the_time_for_a_request_is_a_timeout() -> None:
    server = ScriptedServer()

    async def handler(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        await server.closing.wait()
        return web.Response()

    server.handler = handler
    async with scripted(server):
        result = await drive(from_lists([[1]], output_lens=[1]), server.target(timeout_s=0.05))
    record = result.records[0]
    assert record.failure is not None
    assert record.failure.kind == "timeout"


async def _dying_server_result() -> LoadResult:
    server = ScriptedServer()
    num_answered = 0

    async def handler(request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        nonlocal num_answered
        if num_answered == 4:
            assert server.runner is not None
            for site in list(server.runner.sites):
                await site.stop()
            return await broken_stream(request, [])
        num_answered += 1
        return await stream(request, good_answer(3))

    server.handler = handler
    async with scripted(server):
        workload = from_lists([[1, 2]] * 50, output_lens=[3] * 50, max_concurrency=1)
        return await drive(workload, server.target())


async def test_a_server_that_dies_in_mid_run_ends_it_and_keeps_what_was_measured() -> None:
    result = await _dying_server_result()
    summary = summarize(result)
    assert result.status == "server_died"
    assert "nobody listens there any more" in result.detail
    assert summary.num_ok == 4
    assert summary.num_sent < 10


async def test_a_port_where_nobody_listens_is_a_connect_failure() -> None:
    async with scripted() as server:
        target = server.target()
    result = await drive(from_lists([[1]], output_lens=[1]), target)
    assert result.status == "server_died"
    record = result.records[0]
    assert record.failure is not None
    assert record.failure.kind == "connect"
    assert "Connection refused" in record.failure.message


async def test_fields_of_a_request_are_over_those_of_the_target() -> None:
    request = LoadRequest(
        prompt="x", num_prompt_tokens=1, num_output_tokens=2, body={"temperature": 1.5, "seed": 4}
    )
    async with scripted() as server:
        await drive(Workload(requests=(request,)), server.target(temperature=0.0))
    assert server.bodies[0]["temperature"] == 1.5
    assert server.bodies[0]["seed"] == 4


async def test_many_streams_at_once_are_kept_apart() -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        return await stream(request, good_answer(body["max_tokens"], num_prompt_tokens=len(body["prompt"])))

    lens = [1 + i % 7 for i in range(60)]
    async with scripted(ScriptedServer(handler=handler)) as server:
        workload = from_lists([[1] * length for length in lens], output_lens=lens, max_concurrency=16)
        result = await drive(workload, server.target())
    assert [record.num_output_tokens for record in result.records] == lens
    assert [record.num_prompt_tokens for record in result.records] == lens
    assert all(record.is_ok for record in result.records)
    assert 1 < result.max_in_flight <= 16


def test_messages_are_one_short_line() -> None:
    assert one_line("a\n\tb\x1b[31m  c") == "a b [31m c"
    assert len(one_line("x" * 5000)) == 300
    assert failure_of(ValueError("odd\nbytes")).message == "odd bytes"


def test_the_key_is_not_in_the_words_of_a_target() -> None:
    server = ScriptedServer(url="http://127.0.0.1:1")
    assert "secret" not in repr(server.target(api_key="secret"))
    assert "secret" not in json.dumps({"target": str(server.target(api_key="secret"))})


@pytest.mark.parametrize(
    ("header", "seconds"), [("2", 2.0), ("86400", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), ("-1", 0.0)]
)
async def test_a_refusal_keeps_how_long_the_server_asks_to_wait(header: str, seconds: float) -> None:
    async def handler(_request: web.Request, _body: dict[str, Any]) -> web.StreamResponse:
        return web.json_response({}, status=503, headers={"Retry-After": header})

    record, _ = await _ask(handler)
    assert record.retry_after_s == seconds
