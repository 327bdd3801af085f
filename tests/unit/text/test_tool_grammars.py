"""The grammars that force calls, given to the real matcher: what they let through is a call, and no more."""

import json
import random

import pytest
from llguidance import LLMatcher, LLTokenizer

from penstock.core.errors import InvalidParameterError
from penstock.text.reasoning import REASONING_STYLES
from penstock.text.tool_parsers import TOOL_PARSERS
from tests.unit.text.spelled_calls import read_whole, spell

BYTES = LLTokenizer("byte")
"""A vocabulary of the 256 bytes."""
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Oslo", "Rome"]},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city"],
    "additionalProperties": False,
}
FLAGS = {
    "type": "object",
    "properties": {
        "x": {"enum": [1, None]},
        "on": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"get_weather": WEATHER, "set-flags": FLAGS, "now": NOTHING}
parsers = pytest.mark.parametrize("name", sorted(TOOL_PARSERS))


def matcher(name, *, is_parallel=True, schemas=SCHEMAS, special_ids=None, **thought):
    spec = TOOL_PARSERS[name].grammar(
        schemas, is_parallel=is_parallel, special_ids=special_ids or {}, **thought
    )
    return matched(spec)


def matched(spec):
    made = LLMatcher(BYTES, LLMatcher.grammar_from_lark(spec.source))
    assert not made.is_error(), made.get_error()
    return made


def accepts(made, text):
    made = made.deep_copy()
    tokens = list(text.encode())
    return made.try_consume_tokens(tokens) == len(tokens) and made.is_accepting()


def walk(made, *, seed):
    """An answer of random bytes that the grammar allows; ends half of the times when it may."""
    rng, made, answer = random.Random(seed), made.deep_copy(), bytearray()
    while not made.is_stopped():
        mask = made.compute_bitmask()
        allowed = [i for i in range(BYTES.vocab_size) if mask[i // 8] >> (i % 8) & 1]
        if BYTES.eos_token in allowed and (len(allowed) == 1 or rng.random() < 0.5):
            break
        token = rng.choice([i for i in allowed if i not in {9, 10, 13, 32}] or allowed)
        if token == BYTES.eos_token:
            break
        made.consume_token(token)
        answer.append(token)
    return answer.decode()


@parsers
@pytest.mark.parametrize("is_parallel", [False, True])
def test_whatever_the_grammar_lets_through_is_read_as_calls_that_follow_their_schemas(name, is_parallel):
    made = matcher(name, is_parallel=is_parallel)
    for seed in range(6):
        found = read_whole(name, walk(made, seed=seed), SCHEMAS)
        assert found.content == ""
        assert len(found.calls) == 1 or (is_parallel and found.calls)
        for call in found.calls:
            arguments = json.loads(call.arguments)
            assert set(arguments) <= set(SCHEMAS[call.name]["properties"])
            assert arguments.get("city", "Oslo") in {"Oslo", "Rome"}
            assert arguments.get("days", 0) in range(10)
            assert "city" in arguments or call.name != "get_weather"


@pytest.mark.parametrize(
    "name", ["hermes", "llama3_json", "pythonic", "qwen3_coder", "deepseek_v3", "deepseek_v31"]
)
def test_the_grammar_spells_calls_as_the_model_does(name):
    """Letter by letter, as written down apart from the grammars."""
    made = matcher(name)
    call = ("get_weather", {"city": "Oslo", "days": 3})
    text = spell(name, [call])
    assert accepts(made, text.replace("'", '"'))
    assert not accepts(made, text.replace("'", '"').replace("Oslo", "Bergen"))
    assert not accepts(made, text.replace("'", '"').replace("get_weather", "get_time"))
    assert not accepts(made, "Well. " + text)


def test_a_single_call_is_not_followed_by_another():
    text = spell("hermes", [("now", {})])
    assert accepts(matcher("hermes"), text + "\n" + text)
    assert not accepts(matcher("hermes", is_parallel=False), text + "\n" + text)


def test_a_model_that_thinks_may_think_first():
    call = spell("hermes", [("now", {})])
    style = REASONING_STYLES["qwen3"]
    outside = matcher("hermes", thought=style)
    inside = matcher("hermes", thought=style, is_inside=True)
    assert accepts(outside, call)
    assert accepts(outside, f"<think>\nhm < a\n</think>\n\n{call}")
    assert not accepts(outside, f"<think>hm</think>so{call}")
    assert not accepts(outside, f"hm</think>{call}")
    assert accepts(inside, f"hm</think>{call}")
    assert not accepts(inside, call)


def test_markers_that_are_special_tokens_are_asked_for_as_tokens():
    spec = TOOL_PARSERS["mistral"].grammar(
        {"now": NOTHING}, is_parallel=False, special_ids={"[TOOL_CALLS]": 5, "[ARGS]": 6}
    )
    assert 'call_0: <[5]> "now" <[6]> %json' in spec.source


MARKED = ["hermes", "mistral", "qwen3_coder", "deepseek_v3", "deepseek_v31"]


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
def test_strict_tools_leave_the_text_free_and_bind_the_calls(name):
    parser = TOOL_PARSERS[name]
    if name not in MARKED:
        with pytest.raises(InvalidParameterError, match="strict"):
            parser.strict_grammar(SCHEMAS, is_parallel=True, special_ids={})
        return
    spec = parser.strict_grammar(SCHEMAS, is_parallel=True, special_ids={})
    made = matched(spec)
    call = spell(name, [("get_weather", {"city": "Oslo"})]).replace("[TOOL_CALLS] ", "[TOOL_CALLS]")
    assert accepts(made, "It is < 3 [so].")
    assert accepts(made, call)
    assert accepts(made, f"Let me look.\n{call}\nDone.")
    assert not accepts(made, call.replace("Oslo", "Bergen"))
    assert not accepts(made, call.replace("get_weather", "get_time"))
    assert not accepts(made, f"Use {parser.trigger} to call.")


def test_objects_that_list_their_properties_have_no_others():
    """A small model would go on making up arguments for ever."""
    inner = {"type": "object", "properties": {"b": {"type": "boolean"}}, "required": ["b"]}
    schema = {"type": "object", "properties": {"a": inner, "free": {"type": "object"}}, "required": ["a"]}
    made = matcher("hermes", schemas={"f": schema})
    assert accepts(made, spell("hermes", [("f", {"a": {"b": True}})]))
    assert accepts(made, spell("hermes", [("f", {"a": {"b": True}, "free": {"x": 1}})]))
    assert not accepts(made, spell("hermes", [("f", {"a": {"b": True}, "c": 1})]))
    assert not accepts(made, spell("hermes", [("f", {"a": {"b": True, "c": 1}})]))
    opened = matcher("hermes", schemas={"f": {**schema, "additionalProperties": True}})
    assert accepts(opened, spell("hermes", [("f", {"a": {"b": True}, "c": 1})]))


def test_definitions_go_with_the_arguments_that_need_them():
    """Where a format spells each argument by itself."""
    schema = {
        "type": "object",
        "properties": {"level": {"$ref": "#/$defs/level"}},
        "required": ["level"],
        "$defs": {"level": {"enum": [1, 2]}},
    }
    made = matcher("pythonic", schemas={"f": schema})
    assert accepts(made, "[f(level=2)]")
    assert not accepts(made, "[f(level=3)]")
