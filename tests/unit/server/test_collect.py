"""Deltas of accepted answers: merged, collected, and always closed at their source."""

import pytest

from penstock.core.errors import GenerateError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, GenerateRequest, TextDelta
from penstock.server.collect import Deltas, close_all, collect, merge, submit
from tests.fakes.model_client import FakeModelClient


def request(name: str, *, n: int = 1) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name), model=ModelName("fake"), prompt=name, params=SamplingParams(n=n)
    )


async def test_closing_reaches_an_answer_that_nobody_has_read_from():
    model = FakeModelClient()
    streams = await submit(model, [request("a"), request("b")])
    assert model.num_open == 2
    await close_all(streams)
    await close_all(streams)
    assert model.num_open == 0
    assert sorted(model.cancelled) == ["a", "b"]


async def test_answers_are_collected_by_prompt_and_index():
    model = FakeModelClient()
    collected = await collect(await submit(model, [request("a", n=2), request("b", n=2)]), n=2)
    assert [answer.text for answer in collected.answers] == ["Hello, world!"] * 4
    assert len(collected.usages) == 2
    assert model.cancelled == []


async def test_leaving_a_merge_closes_every_stream():
    model = FakeModelClient(repeat=1000)
    merged = merge(await submit(model, [request("a"), request("b"), request("c")]))
    async for _ in merged:
        break
    await merged.aclose()
    assert model.num_open == 0
    assert len(model.cancelled) == 3


async def test_a_stream_without_an_end_is_an_error_of_that_request():
    async def endless():
        yield TextDelta(request_id=RequestId("a"), index=0, text="x")

    with pytest.raises(GenerateError, match="finish reason"):
        await collect([Deltas(endless())], n=1)


async def test_an_answer_that_was_cancelled_elsewhere_has_no_openai_word():
    from penstock.server.dialects.openai.answers import finish_word

    assert finish_word(FinishReason.CONTENT_FILTER) == "content_filter"
    with pytest.raises(GenerateError):
        finish_word(FinishReason.CANCELLED)
