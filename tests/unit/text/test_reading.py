"""How answers are read: what is chosen for a model, and whole requests with tools and thoughts."""

import json

import pytest

from penstock.core.errors import InvalidParameterError, StartupError
from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, ToolChoice, ToolMode
from penstock.core.tools import add_calls
from penstock.engine.grammar.compiler import refusal
from penstock.text.reading import ReadingConfig, make_reading
from penstock.text.service import TextService
from tests.unit.text.scripted_engine import ScriptedEngine, Sink, TickingClock, last, make_info, tokens
from tests.unit.text.test_text_service import make_request
from tests.unit.text.test_tool_grammars import accepts, matched
from tests.unit.text.tiny_vocabularies import make_tokenizer

TOKENIZER = make_tokenizer("byte-level")
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def choose(template="", **config):
    return make_reading(ReadingConfig(**config), template=template, tokenizer=TOKENIZER)


@pytest.mark.parametrize(
    ("template", "tools", "start"),
    [
        ("{{ messages }}", None, None),
        ("{{ tools }} <tool_call>{'name'...}", "hermes", None),
        ("{{ tools }} <tool_call><function=f>", "qwen3_coder", None),
        ("{{ tools }} [TOOL_CALLS]", "mistral", None),
        ("{{ tools }} <\uff5ctool\u2581calls\u2581begin\uff5c>", "deepseek_v3", None),
        ("{{ tools }} <|python_tag|>", "llama3_json", None),
        ("{{ tools }} [func_name1(params_name1=params_value1)]", "pythonic", None),
        ("{{ tools }}", "generic", None),
        ("{{ tools }} <tool_call> <think></think>", "hermes", "<think>"),
        ("[THINK]", None, "[THINK]"),
    ],
)
def test_auto_reads_the_formats_from_the_chat_template(template, tools, start):
    reading = choose(template)
    assert (reading.tools and reading.tools.name) == tools
    assert (reading.reasoning and reading.reasoning.start) == start


def test_an_operators_choice_comes_first():
    reading = choose("<tool_call> <think>", tool_call_parser="pythonic", reasoning_parser="none")
    assert (reading.tools.name, reading.reasoning) == ("pythonic", None)
    tags = choose(reasoning_parser="tags", reasoning_start_str="((", reasoning_end_str="))")
    assert (tags.reasoning.start, tags.reasoning.end) == ("((", "))")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (
            {"tool_call_parser": "nope"},
            "tool_call_parser is 'nope', it must be one of auto, none, deepseek_v3",
        ),
        ({"reasoning_parser": "nope"}, "reasoning_parser is 'nope'"),
        ({"reasoning_start_str": ""}, "reasoning_start_str has 0 characters"),
    ],
)
def test_a_wrong_option_is_named_with_what_there_is(config, words):
    with pytest.raises(StartupError) as refused:
        choose(**config)
    assert words in refused.value.message


def service(text, *, template="{{ tools }} <tool_call>", reasoning="qwen3", end=None, **config):
    ids = TOKENIZER.encode(text, add_special_tokens=False)
    script = [*(tokens([i]) for i in ids), end or last()]
    engine = ScriptedEngine(script, info=make_info(max_model_len=1024))
    reading = choose(template, reasoning_parser=reasoning, **config)
    made = TextService(
        engine, TOKENIZER, None, name="m", events=Sink(), clock=TickingClock(), reading=reading
    )
    return made, engine


async def answer(made, **fields):
    fields = {"tools": (TOOL,), "is_rendered": True} | fields
    deltas = [delta async for delta in await made.generate(make_request("hello", **fields))]
    calls = []
    for delta in deltas:
        add_calls(calls, delta.tool_calls)
    text = "".join(delta.text for delta in deltas)
    reasoning = "".join(delta.reasoning for delta in deltas)
    return text, reasoning, [(call.name, json.loads(call.arguments)) for call in calls], deltas[-1]


async def test_thought_text_and_call_are_told_apart():
    made, _ = service(f"<think>\nhm\n</think>\n\nLook: {CALL}")
    text, reasoning, calls, end = await answer(made)
    assert (text, reasoning, calls) == ("Look: ", "hm", [("f", {"a": 1})])
    (record,) = made._events.records
    assert (record.num_tool_calls, record.finish_reason) == (1, FinishReason.TOOL_CALLS)
    assert end.finish_reason is FinishReason.TOOL_CALLS


async def test_a_named_choice_ends_with_stop_as_at_openai():
    made, engine = service(CALL)
    *_, calls, end = await answer(made, tool_choice=ToolChoice(ToolMode.NAMED, "f"))
    assert (calls, end.finish_reason) == ([("f", {"a": 1})], FinishReason.STOP)
    assert engine.requests[0].grammar.kind is GrammarKind.GRAMMAR


async def test_an_answer_that_was_cut_keeps_its_reason():
    made, _ = service(CALL[:50], end=last(reason=FinishReason.LENGTH))
    deltas = [d async for d in await made.generate(make_request("hello", tools=(TOOL,), is_rendered=True))]
    assert [call.name for delta in deltas for call in delta.tool_calls if call.id] == ["f"]
    assert deltas[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("stop", ["1", '"a"', ": {"])
async def test_a_call_that_a_stop_string_has_cut_ends_with_stop(stop):
    """The client is not told to make a call whose arguments do not parse; it sees what there is of it."""
    made, _ = service(CALL)
    params = SamplingParams(stop=(stop,))
    request = make_request("hello", tools=(TOOL,), is_rendered=True, params=params)
    deltas = [d async for d in await made.generate(request)]
    calls = []
    for delta in deltas:
        add_calls(calls, delta.tool_calls)
    shown = CALL[: CALL.index(stop)].partition('"arguments": ')[2]
    assert [call.arguments for call in calls] == ([shown] if shown else [])
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, stop)


@pytest.mark.parametrize("stop", ["}\n", "\n</tool", "</tool_call>"])
async def test_a_stop_string_behind_the_arguments_leaves_the_call_to_be_made(stop):
    made, _ = service(CALL)
    *_, calls, end = await answer(made, params=SamplingParams(stop=(stop,)))
    assert (calls, end.finish_reason, end.stop_reason) == ([("f", {"a": 1})], FinishReason.TOOL_CALLS, stop)


async def test_without_parallel_calls_the_first_one_ends_the_answer_and_the_bill():
    made, engine = service(f"{CALL}\n{CALL}")
    *_, calls, end = await answer(made, parallel_tool_calls=False)
    assert calls == [("f", {"a": 1})]
    assert end.finish_reason is FinishReason.TOOL_CALLS
    assert end.usage.completion_tokens == engine.num_played < len(engine.script)


async def test_the_text_of_a_call_is_content_where_nothing_may_be_called():
    made, _ = service(CALL)
    text, _, calls, end = await answer(made, tool_choice=ToolChoice(ToolMode.NONE))
    assert (text, calls, end.finish_reason) == (CALL, [], FinishReason.STOP)


async def test_raw_prompts_are_not_read():
    made, _ = service(f"<think>hm</think>{CALL}")
    text, reasoning, calls, _ = await answer(made, tools=(), is_rendered=False)
    assert (text, reasoning, calls) == (f"<think>hm</think>{CALL}", "", [])


async def test_thoughts_can_be_left_out_and_are_billed_all_the_same():
    made, engine = service("<think>hm</think>Yes")
    text, reasoning, _, end = await answer(made, include_reasoning=False)
    assert (text, reasoning) == ("Yes", "")
    assert end.usage.completion_tokens == len(engine.script) - 1


async def test_stop_strings_cut_before_anything_is_read():
    made, _ = service("<think>one two</think>three", end=last())
    text, reasoning, _, end = await answer(made, params=SamplingParams(stop=("two",)))
    assert (text, reasoning, end.stop_reason) == ("", "one ", "two")


@pytest.mark.parametrize(
    ("config", "fields", "param"),
    [
        ({"template": "no place"}, {}, "tools"),
        ({"enable_auto_tool_choice": False}, {}, "tool_choice"),
        ({}, {"is_rendered": False}, "tools"),
        (
            {},
            {
                "tool_choice": ToolChoice(ToolMode.REQUIRED),
                "grammar": GrammarSpec(kind=GrammarKind.JSON_OBJECT),
            },
            "tool_choice",
        ),
    ],
)
async def test_what_cannot_be_read_is_refused_before_the_engine_hears_of_it(config, fields, param):
    made, engine = service(CALL, **config)
    with pytest.raises(InvalidParameterError) as refused:
        await answer(made, **fields)
    assert refused.value.param == param
    assert engine.requests == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": ToolChoice(ToolMode.REQUIRED)}, "tools"),
        ({"grammar": GrammarSpec(kind=GrammarKind.REGEX, source="a"), "tools": ()}, "structured_outputs"),
        (
            {
                "grammar": GrammarSpec(kind=GrammarKind.JSON_OBJECT),
                "grammar_param": "response_format",
            },
            "response_format",
        ),
    ],
)
async def test_a_grammar_that_cannot_be_enforced_is_told_of_the_field_that_asked_for_it(fields, param):
    made, engine = service(CALL)
    engine.refusal = refusal(GrammarSpec(kind=GrammarKind.REGEX, source="a"), "why")
    with pytest.raises(InvalidParameterError) as refused:
        await answer(made, **fields)
    assert (refused.value.code, refused.value.param) == ("invalid_grammar", param)
    assert refused.value.message.startswith(f"{param} holds a ")


def lark_of(reading, **fields):
    request = make_request("hello", is_rendered=True, **fields)
    return reading.grammar(request, token_ids=[])


JSON_ANSWER = GrammarSpec(kind=GrammarKind.JSON_SCHEMA, source='{"enum": [7, 8]}')


def test_beside_a_json_answer_tools_may_be_called():
    """`response_format` binds what is said, not whether a tool is called."""
    made = matched(lark_of(choose("{{ tools }} <tool_call>"), tools=(TOOL,), grammar=JSON_ANSWER))
    assert accepts(made, "7")
    assert accepts(made, CALL)
    assert not accepts(made, "9")
    assert not accepts(made, CALL.replace('"f"', '"g"'))


def test_a_grammar_is_left_alone_where_nothing_else_may_come():
    reading = choose("{{ tools }} <tool_call>")
    assert lark_of(reading, grammar=JSON_ANSWER) is JSON_ANSWER
    words = GrammarSpec(kind=GrammarKind.REGEX, source="a|b")
    assert lark_of(reading, tools=(TOOL,), grammar=words) is words


def test_a_thought_that_the_prompt_has_begun_comes_before_a_json_answer():
    made = matched(lark_of(choose(reasoning_parser="deepseek_r1"), grammar=JSON_ANSWER))
    assert accepts(made, "hm 9</think>\n\n8")
    assert not accepts(made, "8")


@pytest.mark.parametrize(
    ("template", "may_think"), [("{{ tools }} <tool_call>", False), ("{{ tools }} <tool_call> <think>", True)]
)
def test_a_forced_call_waits_for_a_thought_only_where_the_template_knows_thoughts(
    template, may_think, monkeypatch
):
    """A model whose vocabulary alone has the tags would fill its context with an unasked thought."""
    monkeypatch.setattr("penstock.text.reading._thinks", lambda tokenizer: True)
    reading = choose(template)
    assert reading.reasoning is not None
    made = matched(lark_of(reading, tools=(TOOL,), tool_choice=ToolChoice(ToolMode.REQUIRED)))
    assert accepts(made, CALL)
    assert accepts(made, f"<think>hm</think>{CALL}") is may_think


@pytest.mark.parametrize("name", ["reasoning_start_str", "reasoning_end_str"])
def test_tags_are_refused_where_no_parser_reads_them(name):
    with pytest.raises(StartupError, match=f"{name} is '<x>', which needs reasoning_parser tags; it is auto"):
        choose(**{name: "<x>"})
