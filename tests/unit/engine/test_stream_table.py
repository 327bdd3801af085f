"""Each request in flight has one stream that ends exactly once, whatever happens to the engine."""

import asyncio
from typing import Any

import pytest

from penstock.core.error_info import error_to_info
from penstock.core.errors import EngineDeadError, InvalidParameterError, QueueFullError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineRequest, RequestStats, TokenDelta
from penstock.engine.client import StreamTable, TokenStream
from penstock.engine.wire import Abort, Accepted, Output, Refused, Submit, ToEngine

STATS = RequestStats(1, 0, 1, 0.0, 1, 0.0, 0)


class Recorder:
    """EngineEvents that keeps nothing."""

    def on_step(self, model: ModelName, stats: Any) -> None: ...
    def on_token_gap(self, model: ModelName, gap_s: float) -> None: ...
    def on_request(self, record: Any) -> None: ...
    def on_engine_restart(self, model: ModelName, reason: str) -> None: ...
    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None: ...


def make_table() -> tuple[StreamTable, list[ToEngine]]:
    sent: list[ToEngine] = []
    return StreamTable(name=ModelName("m"), events=Recorder(), send=sent.append), sent


def make_request(name: str = "r") -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name), prompt_token_ids=[1], params=SamplingParams(max_tokens=4)
    )


async def submit(table: StreamTable, name: str = "r") -> TokenStream:
    task = asyncio.create_task(table.submit(make_request(name)))
    await asyncio.sleep(0)
    table.on_message(Accepted(RequestId(name)))
    return await task


def last(name: str = "r") -> TokenDelta:
    return TokenDelta(RequestId(name), 0, (5,), None, FinishReason.LENGTH, None, 0, STATS)


async def test_submit_returns_only_after_the_engine_has_accepted() -> None:
    table, sent = make_table()
    task = asyncio.create_task(table.submit(make_request()))
    await asyncio.sleep(0)
    assert not task.done()
    assert sent == [Submit(make_request())]
    table.on_message(Accepted(RequestId("r")))
    await task


async def test_a_refusal_is_raised_by_submit_and_leaves_nothing_behind() -> None:
    table, _ = make_table()
    task = asyncio.create_task(table.submit(make_request()))
    await asyncio.sleep(0)
    table.on_message(Refused(RequestId("r"), error_to_info(QueueFullError("full"))))
    with pytest.raises(QueueFullError, match="full"):
        await task
    assert len(table) == 0


async def test_deltas_arrive_in_order_and_the_stream_ends_after_the_last() -> None:
    table, _ = make_table()
    stream = await submit(table)
    table.on_message(Output([TokenDelta(RequestId("r"), 0, (4,))]))
    table.on_message(Output([last()]))
    assert [delta.token_ids async for delta in stream] == [(4,), (5,)]
    assert len(table) == 0


async def test_closing_a_stream_aborts_it_even_before_the_first_read() -> None:
    table, sent = make_table()
    stream = await submit(table)
    await stream.aclose()
    await stream.aclose()
    assert sent[1:] == [Abort(RequestId("r"))]
    table.on_message(Output([last()]))  # the engine may still send what was under way
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_closing_an_ended_stream_sends_nothing() -> None:
    table, sent = make_table()
    stream = await submit(table)
    table.on_message(Output([last()]))
    await anext(stream)
    await stream.aclose()
    assert len(sent) == 1


async def test_a_request_that_cannot_be_sent_leaves_nothing_behind() -> None:
    def refuse(message: ToEngine) -> None:
        raise UnicodeEncodeError("utf-8", "x", 0, 1, "surrogates not allowed")

    table = StreamTable(name=ModelName("m"), events=Recorder(), send=refuse)
    with pytest.raises(UnicodeEncodeError):
        await table.submit(make_request())
    assert len(table) == 0


async def test_cancelling_while_waiting_for_acceptance_aborts() -> None:
    table, sent = make_table()
    task = asyncio.create_task(table.submit(make_request()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert sent[-1] == Abort(RequestId("r"))
    assert len(table) == 0


async def test_an_id_in_use_is_refused_by_name() -> None:
    table, _ = make_table()
    await submit(table)
    with pytest.raises(InvalidParameterError, match="request_id"):
        await table.submit(make_request())


async def test_after_a_death_started_streams_fail_and_fresh_ones_are_queued_again_once() -> None:
    table, sent = make_table()
    started, fresh = await submit(table, "started"), await submit(table, "fresh")
    table.on_message(Output([TokenDelta(RequestId("started"), 0, (4,))]))
    await anext(started)
    sent.clear()
    table.fail_started(EngineDeadError("died"))
    table.resubmit()
    assert sent == [Submit(fresh.request)]
    with pytest.raises(EngineDeadError):
        await anext(started)
    table.fail_started(EngineDeadError("died again"))
    with pytest.raises(EngineDeadError, match="again"):
        await anext(fresh)
    assert len(table) == 0


async def test_wait_empty_returns_when_the_last_request_has_ended() -> None:
    table, _ = make_table()
    await submit(table)
    waiter = asyncio.create_task(table.wait_empty())
    await asyncio.sleep(0)
    assert not waiter.done()
    table.on_message(Output([last()]))
    await asyncio.wait_for(waiter, 1)
