"""The embedded model calls tools: by itself, when it must, and never anything else."""

import json
from collections.abc import Iterator

import pytest

from penstock import LLM, SamplingParams
from penstock.core.errors import InvalidParameterError
from tools.embedded.instructions import function_tool

WEATHER = function_tool("get_weather", "Get the weather of a city.", {"city": "string"})
ADD = function_tool("add", "Add two numbers.", {"a": "integer", "b": "integer"})
TOOLS = [WEATHER, ADD]
GREEDY = SamplingParams(temperature=0.0, max_tokens=96)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=8, max_model_len=1024) as llm:
        yield llm


def ask(llm, question, params=GREEDY, **fields):
    return llm.chat([{"role": "user", "content": question}], params, tools=TOOLS, use_tqdm=False, **fields)[
        0
    ].outputs


def calls_of(output):
    return [(call.name, json.loads(call.arguments)) for call in output.tool_calls]


def test_the_model_decides_by_itself(llm):
    (output,) = ask(llm, "What is the weather in Paris?")
    assert calls_of(output) == [("get_weather", {"city": "Paris"})]
    assert (output.finish_reason, output.text) == ("tool_calls", "")
    (output,) = ask(llm, "What is the capital of France?")
    assert (output.text, output.tool_calls) == ("The capital of France is Paris.", [])


@pytest.mark.parametrize("question", ["What is the capital of France?", "Tell me a story."])
def test_it_must_call_where_it_would_not(llm, question):
    """Hot and in two answers at once, so that the grammar alone holds it."""
    params = SamplingParams(n=2, temperature=1.5, seed=3, max_tokens=512, logprobs=1)
    for output in ask(llm, question, params, tool_choice="required"):
        if output.finish_reason == "length":
            continue  # a string may go on until the room is used up
        assert output.finish_reason == "tool_calls"
        for name, arguments in calls_of(output):
            assert name in {"get_weather", "add"}
            assert isinstance(arguments.get("city", ""), str)
            assert isinstance(arguments.get("a", 0), int)


def test_a_named_function_is_called_whatever_was_asked(llm):
    choice = {"type": "function", "function": {"name": "add"}}
    (output,) = ask(llm, "What is the weather in Paris?", tool_choice=choice)
    ((name, arguments),) = calls_of(output)
    assert name == "add"
    assert set(arguments) >= {"a", "b"}
    assert output.finish_reason == "stop"


def test_strict_functions_bind_the_call_and_leave_the_text_free(llm):
    tool = function_tool("get_weather", "Get the weather of a city.", {"city": "string"})
    tool["function"]["strict"] = True
    tool["function"]["parameters"]["properties"]["city"]["enum"] = ["Oslo", "Rome"]

    def answer(question):
        turns = [{"role": "user", "content": question}]
        return llm.chat(turns, GREEDY, tools=[tool], use_tqdm=False)[0].outputs[0]

    ((_, arguments),) = calls_of(answer("What is the weather in Paris?"))
    assert arguments["city"] in {"Oslo", "Rome"}
    assert answer("What is the capital of France?").text == "The capital of France is Paris."


def test_thoughts_come_apart(llm):
    (output,) = llm.chat(
        [{"role": "user", "content": "What is 37 + 45? Think first."}], GREEDY, use_tqdm=False
    )[0].outputs
    assert output.text == "37 + 45 = 82."
    assert "12" in output.reasoning_content


def test_a_schema_that_cannot_be_enforced_is_told_of_the_tools(llm):
    tool = function_tool("f", "", {"x": "string"})
    tool["function"]["parameters"]["properties"]["x"] = {"type": "strange"}
    with pytest.raises(InvalidParameterError) as refused:
        llm.chat([{"role": "user", "content": "Hi"}], GREEDY, tools=[tool], tool_choice="required")
    assert refused.value.param == "tools"
    assert "structured_outputs" not in refused.value.message
