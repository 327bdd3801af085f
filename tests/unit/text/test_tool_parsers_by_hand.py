"""Tool parsers on texts that models are known to write, and on hostile ones."""

import json

import pytest

from penstock.text.tool_parsers import TOOL_PARSERS
from tests.unit.text.spelled_calls import read, read_whole

SCHEMAS = {"f": {"type": "object", "properties": {"a": {"type": "integer"}}}, "g": {"type": "object"}}


def calls(name, text):
    found = read_whole(name, text, SCHEMAS)
    return found.content, [(call.name, json.loads(call.arguments)) for call in found.calls]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", '<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', ("", [("f", {"a": 1})])),
        ("hermes", '<tool_call>{"name": "f"}</tool_call>', ("", [("f", {})])),
        ("hermes", '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("f", {"a": 1})])),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}\n</tool_call>', ("", [("f", {"a": 1})])),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}}}\n</tool_call>ok', ("ok", [("f", {})])),
        ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "x\ny"}}', ("", [("f", {"a": "x\ny"})])),
        ("hermes", 'So: <tool_call>{"name": "f"}</tool_call>\n', ("So: ", [("f", {})])),
        ("llama3_json", '<|python_tag|>{"name": "f", "parameters": {"a": 1}}', ("", [("f", {"a": 1})])),
        ("llama3_json", 'See {"name": "f", "parameters": {}}', ('See {"name": "f", "parameters": {}}', [])),
        ("llama3_json", '{"answer": 42}', ('{"answer": 42}', [])),
        ("mistral", '[TOOL_CALLS]f{"a": 1}[TOOL_CALLS]g[ARGS]{}', ("", [("f", {"a": 1}), ("g", {})])),
        ("mistral", '[TOOL_CALLS]f[CALL_ID]abc123XYZ[ARGS]{"a": 1}', ("", [("f", {"a": 1})])),
        ("pythonic", "[f(a=1), g(b=[1, 2.5], c={'d': None}, e=(True,))]",
         ("", [("f", {"a": 1}), ("g", {"b": [1, 2.5], "c": {"d": None}, "e": [True]})])),
        ("pythonic", "[g(s='it\\'s \\u00e9 \\x41', t=\"'\")]", ("", [("g", {"s": "it's \u00e9 A", "t": "'"})])),
        ("pythonic", "[f(x) for x in y]", ("[f(x) for x in y]", [])),
        ("generic", 'I call:\n```json\n[{"name": "f", "arguments": {}}]\n```\n', ("I call:\n", [("f", {})])),
        ("generic", '{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}', ("", [("f", {"a": 1})])),
        ("generic", '{"name": "Ann", "age": 3}', ('{"name": "Ann", "age": 3}', [])),
        ("qwen3_coder", "<function=f><parameter=a>7</parameter></function>", ("", [("f", {"a": 7})])),
        ("qwen3_coder", "<function=f>\n<parameter=a>\nseven\n</parameter>\n</function>", ("", [("f", {"a": "seven"})])),
    ],
)  # fmt: skip
def test_what_models_write(name, text, expected):
    assert calls(name, text) == expected


def test_a_call_that_breaks_keeps_what_was_valid_and_the_rest_is_content():
    found = read_whole(
        "hermes", '<tool_call>{"name": "f", "arguments": {"a": 1,, "b": 2}}</tool_call>', SCHEMAS
    )
    assert [(call.name, call.arguments) for call in found.calls] == [("f", '{"a": 1,')]
    assert found.content == ', "b": 2}}</tool_call>'


def test_what_is_held_back_is_bounded():
    """Arguments before their name wait for it, but not for ever."""
    text = '<tool_call>{"arguments": {"a": "' + "x" * 20_000 + '"}, "name": "f"}</tool_call>'
    found = read("hermes", [text[:17_000]], SCHEMAS)
    assert found.calls == []
    assert found.content == text[:17_000]
    assert read_whole("hermes", text, SCHEMAS).content == text


@pytest.mark.parametrize("name", sorted(TOOL_PARSERS))
@pytest.mark.parametrize(
    "part",
    ["[", "{", '{"name": ', '{"name": "f", "arguments": {"a": ', "[f(a=[", "[f(a={'b': ", "(", "<tool_call>"],
)
def test_nesting_without_end_is_text_and_no_exception(name, part):
    start = {"mistral": "[TOOL_CALLS]", "hermes": "<tool_call>", "llama3_json": "<|python_tag|>"}.get(
        name, ""
    )
    found = read_whole(name, start + part * 5_000, SCHEMAS)
    assert found.content or found.calls


def test_ids_are_as_each_family_wants_them():
    def first_id(name, text):
        return read_whole(name, text, SCHEMAS).calls[0].id

    hermes = [first_id("hermes", '<tool_call>{"name": "f"}</tool_call>') for _ in range(2)]
    assert hermes[0] != hermes[1]
    assert all(each.startswith("call_") and len(each) == 29 for each in hermes)
    mistral = first_id("mistral", "[TOOL_CALLS]f{}")
    assert len(mistral) == 9
    assert mistral.isalnum()
