"""Tools and thoughts on OpenAI's wire, over a scripted model."""

import pytest

from penstock.core.text import FinishReason, TextDelta, ToolCallDelta, ToolMode, Usage
from tests.fakes.http_server import bench
from tests.fakes.model_client import FakeModelClient
from tests.unit.server.test_http_chat import events

URL = "/v1/chat/completions"
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
BODY = {"messages": [{"role": "user", "content": "hi"}], "tools": [TOOL]}


class CallingModel(FakeModelClient):
    """Thinks, says a word, calls twice."""

    async def _deltas(self, request):
        def delta(**fields):
            return TextDelta(request_id=request.request_id, index=0, **fields)

        yield delta(reasoning="hm")
        yield delta(text="Look:")
        first = (ToolCallDelta(0, id="call_1", name="get_weather"), ToolCallDelta(0, arguments='{"a"'))
        yield delta(tool_calls=first)
        yield delta(tool_calls=(ToolCallDelta(0, arguments=":1}"),))
        last = (ToolCallDelta(1, id="call_2", name="get_weather"), ToolCallDelta(1, arguments="{}"))
        usage = Usage(prompt_tokens=7, completion_tokens=9)
        yield delta(tool_calls=last, finish_reason=FinishReason.TOOL_CALLS, usage=usage)


async def test_a_whole_answer_has_calls_thought_and_reason():
    async with bench(CallingModel()) as b:
        choice = (await b.http.post(URL, json=BODY)).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Look:",
        "refusal": None,
        "reasoning_content": "hm",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"a":1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}},
        ],
    }


async def test_a_stream_names_the_call_first_and_then_sends_its_arguments():
    async with bench(CallingModel()) as b:
        chunks = events((await b.http.post(URL, json=BODY | {"stream": True})).text)
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas == [
        {"role": "assistant", "content": ""},
        {"reasoning_content": "hm"},
        {"content": "Look:"},
        {"tool_calls": [_begin(0, "call_1")]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]},
        {"tool_calls": [_begin(1, "call_2")]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 8 + ["tool_calls"]


def _begin(index, call_id):
    function = {"name": "get_weather", "arguments": ""}
    return {"index": index, "id": call_id, "type": "function", "function": function}


async def test_an_answer_without_calls_does_not_speak_of_them():
    async with bench() as b:
        message = (await b.http.post(URL, json=BODY)).json()["choices"][0]["message"]
    assert message == {"role": "assistant", "content": "Hello, world!", "refusal": None}


@pytest.mark.parametrize(
    ("choice", "mode", "name"),
    [
        (None, ToolMode.AUTO, ""),
        ("auto", ToolMode.AUTO, ""),
        ("none", ToolMode.NONE, ""),
        ("required", ToolMode.REQUIRED, ""),
        ({"type": "function", "function": {"name": "get_weather"}}, ToolMode.NAMED, "get_weather"),
    ],
)
async def test_the_model_is_asked_what_the_wire_says(choice, mode, name):
    body = BODY | {"tool_choice": choice, "parallel_tool_calls": False, "include_reasoning": False}
    async with bench() as b:
        reply = await b.http.post(URL, json=body | {"chat_template_kwargs": {"enable_thinking": False}})
    assert reply.status_code == 200, reply.text
    (request,) = b.model.requests
    assert request.tools == (TOOL,)
    assert (request.tool_choice.mode, request.tool_choice.name) == (mode, name)
    assert (request.parallel_tool_calls, request.include_reasoning) == (False, False)
    assert request.chat_template_kwargs == {"enable_thinking": False}


def _tool(**function):
    return {"type": "function", "function": {"name": "f"} | function}


@pytest.mark.parametrize(
    ("change", "param", "words"),
    [
        ({"tools": [_tool(name="no spaces")]}, "tools.0.function.name", "1 to 64"),
        ({"tools": [_tool(name="x" * 65)]}, "tools.0.function.name", "at most 64"),
        ({"tools": [_tool(), _tool()]}, "tools.1.function.name", "another tool"),
        ({"tools": [_tool(name=f"f{i}") for i in range(129)]}, "tools", "at most 128"),
        ({"tools": [_tool(parameters={"type": "array"})]}, "tools.0.function.parameters.type", "'object'"),
        ({"tools": [_tool(parameters={"d": "x" * 70_000})]}, "tools.0.function.parameters", "at most 65536"),
        ({"tools": [_tool(strange=1)]}, "tools.0.function.strange", "not a field"),
        ({"tools": [_tool()], "tool_choice": "any"}, "tool_choice", '"none", "auto" or "required"'),
        (
            {"tools": [_tool()], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "tool_choice",
            "must name one of tools",
        ),
        ({"tools": None, "tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
    ],
)
async def test_what_is_wrong_with_tools_is_named(change, param, words):
    async with bench() as b:
        reply = await b.http.post(URL, json=BODY | change)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
    assert b.model.requests == []


async def test_messages_of_an_agent_loop_reach_the_model():
    turns = [
        {"role": "user", "content": "hi"},
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
    ]
    async with bench() as b:
        reply = await b.http.post(URL, json={"messages": turns, "tools": [_tool()]})
    assert reply.status_code == 200, reply.text
    _, assistant, tool = b.model.requests[0].messages
    assert assistant.reasoning_content == "hm"
    assert assistant.tool_calls[0]["function"] == {"name": "f", "arguments": {"a": 1}}
    assert (tool.tool_call_id, tool.content) == ("call_1", "sunny")
