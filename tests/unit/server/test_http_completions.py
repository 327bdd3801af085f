"""`POST /v1/completions`: prompts of every form, indexes, echo, legacy log-probabilities."""

import asyncio
import json

import pytest

from penstock.core.errors import QueueFullError
from penstock.core.text import GenerateRequest
from penstock.server.dialects.openai.completions import CompletionAnswer
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient
from tests.unit.server.test_http_chat import events

URL = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "asked"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_every_form_of_prompt_becomes_one_request_per_prompt(prompt, asked):
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": prompt})
    answer = CompletionAnswer.model_validate(reply.json())
    assert sorted(map(str, (r.prompt for r in b.model.requests))) == sorted(map(str, asked))
    assert [choice.index for choice in answer.choices] == list(range(len(asked)))
    assert answer.usage.prompt_tokens == 7 * len(asked)
    assert len({r.request_id for r in b.model.requests}) == len(asked)


async def test_a_clients_request_id_is_its_own_affair():
    """Two requests under one id, at once and with several prompts, are different requests to the engine."""
    model = FakeModelClient(hold_after=1)
    sent = {"headers": {"x-request-id": "x"}, "json": {"prompt": ["a", "b"]}}
    async with bench(model) as b:
        both = [asyncio.create_task(b.http.post(URL, **sent)) for _ in range(2)]
        async with asyncio.timeout(10):
            while model.num_open < 4:
                await asyncio.sleep(0)
        model.resume.set()
        replies = await asyncio.gather(*both)
    assert len({request.request_id for request in model.requests}) == 4
    assert {request.client_request_id for request in model.requests} == {"x"}
    assert [reply.json()["id"] for reply in replies] == ["cmpl-x"] * 2
    assert [reply.headers["x-request-id"] for reply in replies] == ["x"] * 2


async def test_max_tokens_is_sixteen_by_default():
    async with bench(FakeModelClient(repeat=100)) as b:
        reply = await b.http.post(URL, json={"prompt": "a"})
    assert b.model.requests[0].params.max_tokens == 16
    assert reply.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("stream", [False, True])
async def test_index_is_prompt_times_n_plus_answer(stream):
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": ["a", "b"], "n": 2, "stream": stream})
    if stream:
        texts = ["", "", "", ""]
        for chunk in events(reply.text):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == ["Hello, world!"] * 4
    else:
        assert [choice["index"] for choice in reply.json()["choices"]] == [0, 1, 2, 3]


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_are_four_lists_and_offsets_run_through_the_text(stream):
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": "a", "logprobs": 1, "stream": stream})
    parts = [c["choices"][0]["logprobs"] for c in (events(reply.text) if stream else [reply.json()])]
    assert [offset for part in parts for offset in part["text_offset"]] == [0, 5, 6, 12]
    assert [token for part in parts for token in part["tokens"]] == ["Hello", ",", " world", "!"]
    assert parts[0]["top_logprobs"][0] == {"Hello0": 0.0}
    assert parts[0]["token_logprobs"][0] == -9999.0


async def test_echo_begins_with_the_prompt_and_may_ask_for_no_new_token():
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": "Once", "echo": True, "max_tokens": 0})
    assert reply.json()["choices"][0]["text"] == "Once"
    assert b.model.requests[0].echo is True


async def test_usage_of_a_stream_is_the_sum_over_its_prompts():
    body = {"prompt": ["a", "b", "c"], "stream": True, "stream_options": {"include_usage": True}}
    async with bench() as b:
        chunks = events((await b.http.post(URL, json=body)).text)
    assert chunks[-1]["usage"]["prompt_tokens"] == 21
    assert chunks[-1]["choices"] == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt.0"),
        ({"prompt": [1, "a"]}, "prompt.1"),
        ({"prompt": [-1]}, "prompt.0"),
        ({"prompt": ["a"] * 33}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt": "a", "prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt": "a", "suffix": "z"}, "suffix"),
        ({"prompt": "a", "best_of": 1, "n": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 21}, "logprobs"),
        ({"prompt": "a", "messages": []}, "messages"),
    ],
)
async def test_a_wrong_field_is_a_400_that_names_it(body, param):
    async with bench() as b:
        reply = await b.http.post(URL, json=body)
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param, reply.text
    assert b.model.requests == []


@pytest.mark.parametrize("max_tokens", [-1, 0])
async def test_max_tokens_has_one_limit(max_tokens):
    async with bench() as b:
        reply = await b.http.post(URL, json={"prompt": "a", "max_tokens": max_tokens})
    words = f"max_tokens is {max_tokens}, it must be at least 1, or 0 with echo"
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, words)


class OnePromptRefused(FakeModelClient):
    async def generate(self, request: GenerateRequest):
        if request.prompt == "bad":
            raise QueueFullError("the queue is full", retry_after_s=3)
        return await super().generate(request)


async def test_if_one_prompt_is_refused_none_is_left_running():
    async with bench(OnePromptRefused()) as b:
        reply = await b.http.post(URL, json={"prompt": ["a", "bad", "b"]})
    assert reply.status_code == 429
    assert reply.headers["retry-after"] == "3"
    assert b.model.num_open == 0


async def test_if_one_stream_fails_the_others_are_cancelled_and_the_client_is_told():
    class OneFails(FakeModelClient):
        async def generate(self, request):
            stream = await super().generate(request)
            if request.prompt == "bad":
                await anext(stream)
                await stream.aclose()
                return self.failing()
            return stream

        async def failing(self):
            raise QueueFullError("late")
            yield

    model = OneFails(repeat=1000)
    async with bench(model) as b:
        reply = await b.http.post(URL, json={"prompt": ["a", "bad"], "stream": True, "max_tokens": 4000})
    last = json.loads(reply.text.rsplit("data: ", 1)[1])
    assert reply.status_code == 200
    assert last["error"]["code"] == "queue_full"
    assert model.num_open == 0
    assert next(r.request_id for r in model.requests if r.prompt == "a") in model.cancelled
