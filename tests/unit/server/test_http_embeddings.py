"""`/v1/embeddings` over a fake model: forms of input and answer, refusals by name, all inputs at once."""

import asyncio
import base64
import struct

import pytest

from penstock.core.errors import QueueFullError
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient

PATH = "/v1/embeddings"


@pytest.mark.parametrize(
    ("inputs", "prompts"),
    [
        ("four", ["four"]),
        (["a", "bb"], ["a", "bb"]),
        ([7, 8, 9], [(7, 8, 9)]),
        ([[7], [8, 9]], [(7,), (8, 9)]),
    ],
)
async def test_every_form_of_input_becomes_one_request_for_each_and_answers_in_order(inputs, prompts):
    async with bench() as b:
        reply = await b.http.post(PATH, json={"input": inputs, "model": "alias", "user": "u"})
    body = reply.json()
    assert [request.prompt for request in b.model.pooled] == prompts
    assert [item["embedding"] for item in body["data"]] == [[0.5, -float(len(p)), 0.25] for p in prompts]
    assert [item["index"] for item in body["data"]] == list(range(len(prompts)))
    total = sum(map(len, prompts))
    assert body["usage"] == {"prompt_tokens": total, "total_tokens": total}
    assert (body["object"], body["model"]) == ("list", "alias")


async def test_base64_is_little_endian_float32():
    async with bench() as b:
        reply = await b.http.post(PATH, json={"input": "ab", "encoding_format": "base64"})
    raw = base64.b64decode(reply.json()["data"][0]["embedding"])
    assert struct.unpack("<3f", raw) == (0.5, -2.0, 0.25)


async def test_fields_reach_the_model():
    fields = {"dimensions": 2, "normalize": False, "pooling_type": "mean", "truncate_prompt_tokens": -1}
    async with bench() as b:
        reply = await b.http.post(
            PATH, json={"input": "ab", **fields, "priority": "batch", "cache_salt": "s"}
        )
        (asked,) = b.model.pooled
    assert len(reply.json()["data"][0]["embedding"]) == 2
    assert (asked.dimensions, asked.normalize, asked.pooling) == (2, False, "mean")
    assert (asked.truncate_prompt_tokens, asked.priority.name, asked.cache_salt) == (-1, "BATCH", "s")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": [[1], []]}, "input.1"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "pooling_type": "cls"}, "pooling_type"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"input": "a", "temperature": 1}, "temperature"),
        ({"input": "a", "stream": True}, "stream"),
    ],
)
async def test_what_is_wrong_is_a_400_that_names_it(body, param):
    async with bench() as b:
        reply = await b.http.post(PATH, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param
    assert b.model.pooled == []


async def test_an_unknown_model_is_a_404():
    async with bench() as b:
        assert (await b.http.post(PATH, json={"input": "a", "model": "x"})).status_code == 404


async def test_a_full_queue_is_a_429_with_retry_after():
    async with bench(FakeModelClient(refusal=QueueFullError("full", retry_after_s=3.0))) as b:
        reply = await b.http.post(PATH, json={"input": ["a", "b"]})
    assert (reply.status_code, reply.headers["retry-after"]) == (429, "3")
    assert b.model.num_open == 0


async def test_a_large_request_has_a_bounded_number_of_inputs_in_the_engine():
    model = FakeModelClient(hold_after=0)
    async with bench(model) as b:
        task = asyncio.create_task(b.http.post(PATH, json={"input": ["a"] * 300}))
        await model.held.wait()
        for _ in range(1000):
            await asyncio.sleep(0)
        assert model.num_open == 256
        model.resume.set()
        assert len((await task).json()["data"]) == 300


@pytest.mark.parametrize(
    ("field", "value", "limit"),
    [("encoding_format", "int8", '"float" or "base64"'), ("pooling_type", "cls", '"mean" or "last"')],
)
async def test_a_wrong_word_is_told_with_the_words_there_are(field, value, limit):
    async with bench() as b:
        reply = await b.http.post(PATH, json={"input": "a", field: value})
    assert reply.json()["error"]["message"] == f'{field} is "{value}", it must be {limit}'
