"""`POST /v1/chat/completions`: what the wire says and what the model is asked."""

import json

import pytest

from penstock.core.text import Priority
from penstock.server.dialects.openai.chat import ChatAnswer
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient

URL = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "hi"}]


def events(text: str) -> list[dict]:
    lines = [line[6:] for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


async def test_whole_answer_has_openai_shape_and_the_models_usage():
    async with bench() as b:
        reply = await b.http.post(URL, json={"model": "fake", "messages": HELLO})
    answer = ChatAnswer.model_validate(reply.json())
    assert reply.status_code == 200
    assert answer.object == "chat.completion"
    assert answer.id == "chatcmpl-" + reply.headers["x-request-id"]
    assert answer.choices[0].message.content == "Hello, world!"
    assert answer.choices[0].finish_reason == "stop"
    assert reply.json()["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 4,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


async def test_stream_begins_with_the_role_and_ends_with_done():
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": HELLO, "stream": True})
    chunks = events(reply.text)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks) == "Hello, world!"
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None, None, None, None, "stop"]
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_comes_in_a_chunk_of_its_own_when_asked_for():
    body = {"messages": HELLO, "stream": True, "stream_options": {"include_usage": True}}
    async with bench() as b:
        chunks = events((await b.http.post(URL, json=body)).text)
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 11


async def test_n_answers_stream_interleaved_each_with_its_own_role_and_end():
    async with bench() as b:
        chunks = events((await b.http.post(URL, json={"messages": HELLO, "stream": True, "n": 3})).text)
    for index in range(3):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert sum(choice["finish_reason"] is not None for choice in mine) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_logprobs_have_chat_style_and_never_minus_infinity(stream):
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 2, "stream": stream}
    async with bench() as b:
        reply = await b.http.post(URL, json=body)
    choice = events(reply.text)[1]["choices"][0] if stream else reply.json()["choices"][0]
    first = choice["logprobs"]["content"][0]
    assert first["token"] == "Hello"
    assert first["logprob"] == -9999.0
    assert first["bytes"] == list(b"Hello")
    assert [each["token"] for each in first["top_logprobs"]] == ["Hello0", "Hello1"]


async def test_fields_reach_the_model_as_asked():
    body = {
        "model": "alias",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                "name": "Ann",
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
                ],
            },
            {"role": "tool", "content": "2", "tool_call_id": "c1"},
        ],
        "max_completion_tokens": 3,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": -100},
        "seed": 7,
        "stop": "END",
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "min_tokens": 1,
        "ignore_eos": True,
        "priority": "realtime",
        "cache_salt": "salt",
        "add_generation_prompt": False,
        "continue_final_message": True,
    }
    async with bench() as b:
        reply = await b.http.post(URL, json=body)
    (asked,) = b.model.requests
    assert reply.json()["model"] == "alias"
    assert [m.role for m in asked.messages] == ["system", "user", "assistant", "tool"]
    assert asked.messages[1].content == "ab"
    assert asked.messages[1].name == "Ann"
    assert asked.messages[2].tool_calls[0]["function"] == {"name": "f", "arguments": {"x": 1}}
    assert asked.messages[3].tool_call_id == "c1"
    assert (asked.add_generation_prompt, asked.continue_final_message) == (False, True)
    assert asked.priority is Priority.REALTIME
    assert asked.cache_salt == "salt"
    p = asked.params
    assert (p.max_tokens, p.temperature, p.top_p, p.top_k, p.min_p) == (3, 0.5, 0.9, 5, 0.1)
    assert (p.presence_penalty, p.frequency_penalty, p.repetition_penalty) == (1, -1, 1.2)
    assert (p.logit_bias, p.seed, p.stop, p.stop_token_ids) == ({5: -100}, 7, ("END",), (9,))
    assert (p.include_stop_str_in_output, p.skip_special_tokens, p.min_tokens, p.ignore_eos) == (
        True,
        False,
        1,
        True,
    )
    assert reply.json()["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
        ({"messages": HELLO * 1025}, "messages"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"n": 9}, "n"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": [""]}, "stop.0"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": [""]}, "bad_words.0"),
        ({"typical_p": 0}, "typical_p"),
        ({"mirostat": 3}, "mirostat"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"priority": 3}, "priority"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"tempreature": 1}, "tempreature"),
    ],
)
async def test_a_wrong_field_is_a_400_that_names_it(change, param):
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": HELLO} | change)
    error = reply.json()["error"]
    assert reply.status_code == 400, reply.text
    assert error["param"] == param, error
    assert error["type"] == "invalid_request_error"
    assert param.rpartition(".")[2] in error["message"]
    assert b.model.requests == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"logit_bias": {"1": 1, "01": 2}},
            (
                "the key of logit_bias.01 is a string of 2 characters, "
                "it must be a token id in digits, without leading zeros"
            ),
        ),
        ({"logit_bias": {"7": 101}}, "logit_bias.7 is 101, it must be at most 100.0"),
        ({"metadata": {"My-Key": 1}}, "metadata.My-Key is 1, it must be a string"),
        ({"echo": True}, "echo is true, it must be false"),
        ({"service_tier": "x"}, 'service_tier is "x", it must be "auto" or "default"'),
        ({"max_tokens": -1}, "max_tokens is -1, it must be at least 1"),
        ({"max_tokens": 0}, "max_tokens is 0, it must be at least 1"),
        ({"top_k": -2}, "top_k is -2, it must be at least -1"),
        ({"top_k": 2**63}, f"top_k is {2**63}, it must be at most {2**63 - 1}"),
    ],
)
async def test_the_message_tells_the_place_the_value_and_the_limit_in_words_of_json(change, words):
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": HELLO} | change)
    assert (reply.status_code, reply.json()["error"]["message"]) == (400, words)


async def test_null_is_the_same_as_absent():
    nothing = dict.fromkeys(
        [
            "temperature",
            "top_p",
            "n",
            "stop",
            "max_tokens",
            "logit_bias",
            "stream",
            "tools",
            "logprobs",
            "seed",
            "user",
        ]
    )
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": HELLO} | nothing)
    assert reply.status_code == 200, reply.text


async def test_an_unknown_model_is_a_404_that_lists_those_that_exist():
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": HELLO, "model": "gpt-9"})
    assert reply.status_code == 404
    assert reply.json()["error"]["code"] == "model_not_found"
    assert "fake, alias" in reply.json()["error"]["message"]


async def test_one_token_costs_one_frame_and_the_text_is_encoded_as_json():
    model = FakeModelClient(pieces=('a"b\\\n', "\u2028é", "\x1b"))
    async with bench(model) as b:
        reply = await b.http.post(URL, json={"messages": HELLO, "stream": True})
    assert (
        "".join(c["choices"][0]["delta"].get("content", "") for c in events(reply.text))
        == 'a"b\\\n\u2028é\x1b'
    )
