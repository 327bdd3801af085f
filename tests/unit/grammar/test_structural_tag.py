"""Structural tags: free text, and tagged parts that follow their schemas, in both forms."""

import pytest
from grammar_rig import encode, matches, start, tokenizer, walk

from penstock.core.errors import InvalidParameterError

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
OLD = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<f=a>", "schema": SCHEMA, "end": "</f>"},
        {"begin": "<f=b>", "schema": {}, "end": "</f>"},
    ],
    "triggers": ["<f="],
}
CITY = {"type": "json_schema", "json_schema": SCHEMA}
TAG = {"type": "tag", "begin": "<f=a>", "content": CITY, "end": "</f>"}
TRIGGERED = {"type": "triggered_tags", "triggers": ["<f="], "tags": [TAG]}
THOUGHT = {"type": "tag", "begin": "<think>", "content": {"type": "any_text"}, "end": "</think>"}
CALL = '<f=a>{"city": 1}</f>'


def new(node):
    return {"type": "structural_tag", "format": node}


@pytest.mark.parametrize(
    ("tag", "yes", "no"),
    [
        (OLD, "just text", "text <f=c>"),
        (OLD, f"a {CALL} b {CALL}", '<f=a>{"town": 1}</f>'),
        (OLD, '<f=b>{"q": [1]}</f> and <f', "<f=b>{</f>"),
        (new(TRIGGERED), f"x {CALL} y", "x <f=a>{}"),
        (new({**TRIGGERED, "at_least_one": True}), f"x {CALL} y", "x"),
        (new({**TRIGGERED, "stop_after_first": True}), CALL, f"{CALL} y"),
        (new({**TRIGGERED, "stop_after_first": True}), "x", f"{CALL}{CALL}"),
        (new(THOUGHT), "<think>a <b> c</think>", "a</think>"),
        (
            new({"type": "sequence", "elements": [THOUGHT, CITY]}),
            '<think>x</think>{"city": 2}',
            '{"city": 2}',
        ),
        (new({"type": "or", "elements": [CITY, {"type": "const_string", "value": "no"}]}), "no", "yes"),
        (new({"type": "regex", "pattern": "[0-9]+/[a-z]"}), "12/x", "12x"),
        (new({"type": "grammar", "grammar": 'root ::= "q" [0-9]+'}), "q12", "12"),
        (new({"type": "grammar", "grammar": 'start: "q" X\nX: /z+/'}), "qzz", "q"),
        (
            new({"type": "tags_with_separator", "tags": [TAG], "separator": ", "}),
            f"{CALL}, {CALL}",
            f"{CALL},",
        ),
        (
            new({"type": "tags_with_separator", "tags": [TAG], "separator": ";", "at_least_one": True}),
            CALL,
            "",
        ),
    ],
)
def test_a_tag_means_what_it_says(tag, yes, no):
    assert matches("structural_tag", tag, yes)
    assert not matches("structural_tag", tag, no)


def test_a_schema_in_a_tag_is_rewritten_too():
    schema = {"type": "integer", "not": {"minimum": 3}}
    tag = new({"type": "json_schema", "json_schema": schema})
    assert matches("structural_tag", tag, "2")
    assert not matches("structural_tag", tag, "3")


def test_behind_a_trigger_what_is_certain_is_forced():
    matcher = start("structural_tag", new(TRIGGERED))
    assert matcher.forced() == ()
    assert walk(matcher, "see <f=")
    assert tokenizer().decode(list(matcher.forced())).startswith('a>{"city":')


def test_a_special_token_matches_as_a_token():
    tag = {"begin": "<tool_call>", "content": CITY, "end": "</tool_call>"}
    matcher = start(
        "structural_tag", new({"type": "triggered_tags", "triggers": ["<tool_call>"], "tags": [tag]})
    )
    (call_id,) = encode("<tool_call>")
    assert walk(matcher, "x")
    assert matcher.num_valid([call_id]) == 1
    assert walk(matcher, '<tool_call>{"city": 1}</tool_call>')
    assert matcher.may_end


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        ({"type": "structural_tag"}, "structures must be an array"),
        ({**OLD, "triggers": ["<g="]}, "must start with one of the triggers"),
        ({**OLD, "triggers": []}, "triggers must be an array"),
        ({**OLD, "extra": 1}, "'extra', which is not known"),
        (new({"type": "json_schema", "json_schema": []}), "json_schema must be an object"),
        (new({"type": "sequence", "elements": [{"type": "any_text"}, CITY]}), "any_text must be the last"),
        (new({**TRIGGERED, "at_least_one": 1}), "must be true or false"),
        (new({**TRIGGERED, "triggers": ["<think>x"], "tags": [{**TAG, "begin": "<think>x"}]}), "not both"),
        (new({"type": "tag", "begin": 1, "content": CITY, "end": ""}), "begin must be a string"),
        (new({"type": "tag", "begin": "x", "content": 1, "end": ""}), "content must be an object"),
        (new({"type": "grammar", "grammar": "x"}), "neither Lark nor GBNF"),
    ],
)
def test_a_malformed_tag_is_refused_and_the_place_is_named(tag, words):
    with pytest.raises(InvalidParameterError) as caught:
        start("structural_tag", tag)
    assert words in caught.value.message
