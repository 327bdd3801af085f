"""The unmodified `openai` Python client against a real socket: answers, streams, and the SDK's own exceptions."""

from collections.abc import AsyncIterator

import openai
import pytest
from openai import AsyncOpenAI

from penstock.core import errors as core
from tests.fakes.http_server import USER_KEY, Running, running
from tests.fakes.model_client import FakeModelClient

HELLO = [{"role": "user", "content": "hi"}]


@pytest.fixture
async def server() -> AsyncIterator[Running]:
    async with running(keys=True) as found:
        yield found


@pytest.fixture
async def client(server: Running) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(
        base_url=server.addresses.public + "/v1", api_key=USER_KEY, max_retries=0
    ) as found:
        yield found


async def test_chat_answer(client):
    answer = await client.chat.completions.create(model="fake", messages=HELLO, n=2)
    assert [choice.message.content for choice in answer.choices] == ["Hello, world!"] * 2
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_chat_stream_with_usage(client):
    stream = await client.chat.completions.create(
        model="fake", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == "Hello, world!"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 4


async def test_chat_stream_helper_collects_the_same_answer(client):
    async with client.chat.completions.stream(model="fake", messages=HELLO) as stream:
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "Hello, world!"


async def test_chat_logprobs(client):
    answer = await client.chat.completions.create(model="fake", messages=HELLO, logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, len(first.top_logprobs)) == ("Hello", 2)


async def test_completion_answer_and_stream(client):
    answer = await client.completions.create(model="fake", prompt=["a", "b"], logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].logprobs.text_offset == [0, 5, 6, 12]
    stream = await client.completions.create(model="fake", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "Hello, world!"


async def test_models(client):
    assert [model.id async for model in await client.models.list()] == ["fake"]
    assert (await client.models.retrieve("fake")).owned_by == "penstock"


async def test_vllm_extras_pass_through_extra_body(client, server):
    await client.chat.completions.create(model="fake", messages=HELLO, extra_body={"top_k": 3, "min_p": 0.2})
    assert server.model.requests[0].params.top_k == 3


async def test_the_key_names_the_tenant(client, server):
    await client.chat.completions.create(model="fake", messages=HELLO)
    assert server.model.requests[0].tenant_id == "tenant-a"


@pytest.mark.parametrize(
    ("change", "raised"),
    [
        ({"temperature": 3}, openai.BadRequestError),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, openai.BadRequestError),
        ({"model": "nope"}, openai.NotFoundError),
        ({"extra_headers": {"authorization": "Bearer wrong"}}, openai.AuthenticationError),
    ],
)
async def test_refusals_are_the_sdks_exceptions(client, change, raised):
    with pytest.raises(raised) as caught:
        await client.chat.completions.create(**({"model": "fake", "messages": HELLO} | change))
    assert caught.value.code
    assert caught.value.request_id


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (
            core.QueueFullError("the queue holds 8 requests, its limit", retry_after_s=1),
            openai.RateLimitError,
        ),
        (core.NotReadyError("restarting"), openai.InternalServerError),
        (core.GenerateError("x"), openai.InternalServerError),
    ],
)
async def test_faults_of_the_server_are_the_sdks_exceptions(error, raised):
    async with (
        running(FakeModelClient(refusal=error)) as server,
        AsyncOpenAI(base_url=server.addresses.public + "/v1", api_key="x", max_retries=0) as client,
    ):
        with pytest.raises(raised):
            await client.chat.completions.create(model="fake", messages=HELLO)


async def test_a_stream_that_fails_raises_the_sdks_error():
    model = FakeModelClient(failure=core.EngineDeadError("x"), fail_after=2)
    async with (
        running(model) as server,
        AsyncOpenAI(base_url=server.addresses.public + "/v1", api_key="x", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(model="fake", messages=HELLO, stream=True)
        with pytest.raises(openai.APIError, match="restarted"):
            async for _ in stream:
                pass
