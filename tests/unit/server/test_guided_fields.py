"""Every way to ask for a form of the answer becomes one grammar; two at once are refused with both named."""

import json

import pytest

from penstock.core.grammar import GrammarKind, GrammarSpec
from tests.fakes.http_server import bench

CHAT = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]})
RAW = ("/v1/completions", {"prompt": "hi"})
PLAIN = ("/generate", {"prompt": "hi"})
SCHEMA = {"type": "object", "properties": {"z": {"type": "integer"}, "a": {"$ref": "#/$defs/x"}}}
TAG = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f>"],
}
NEW_TAG = {"type": "structural_tag", "format": {"type": "any_text"}}


def spec(kind, value):
    source = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return GrammarSpec(kind=GrammarKind(kind), source=source)


FORMS = [
    ({"response_format": {"type": "text"}}, None),
    ({"response_format": {"type": "json_object"}}, spec("json_object", "")),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "p", "schema": SCHEMA, "strict": True},
            }
        },
        spec("json_schema", SCHEMA),
    ),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p"}}}, spec("json_object", "")),
    ({"response_format": TAG}, spec("structural_tag", TAG)),
    ({"response_format": NEW_TAG}, spec("structural_tag", NEW_TAG)),
    ({"guided_json": SCHEMA}, spec("json_schema", SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, spec("json_schema", json.dumps(SCHEMA))),
    ({"guided_regex": "a+"}, spec("regex", "a+")),
    ({"guided_choice": ["b", "a"]}, spec("choice", ["b", "a"])),
    ({"guided_grammar": 'root ::= "x"'}, spec("grammar", 'root ::= "x"')),
]
STRUCTURED = [
    ({"json": SCHEMA}, spec("json_schema", SCHEMA)),
    ({"regex": "a+"}, spec("regex", "a+")),
    ({"choice": ["b", "a"]}, spec("choice", ["b", "a"])),
    ({"grammar": "start: x"}, spec("grammar", "start: x")),
    ({"json_object": True}, spec("json_object", "")),
    ({"structural_tag": json.dumps(TAG)}, spec("structural_tag", json.dumps(TAG))),
    ({"structural_tag": NEW_TAG}, spec("structural_tag", NEW_TAG)),
]


async def post(where, **fields):
    url, base = where
    async with bench() as b:
        reply = await b.http.post(url, json=base | fields)
        return reply, b.model.requests


@pytest.mark.parametrize("where", [CHAT, RAW], ids=["chat", "raw"])
@pytest.mark.parametrize(("fields", "grammar"), FORMS)
async def test_each_field_becomes_the_grammar_that_it_names(where, fields, grammar):
    reply, requests = await post(where, **fields)
    assert reply.status_code == 200, reply.text
    assert requests[0].grammar == grammar
    (field,) = fields
    assert grammar is None or requests[0].grammar_param == field


@pytest.mark.parametrize("where", [CHAT, RAW, PLAIN], ids=["chat", "raw", "plain"])
@pytest.mark.parametrize(("wanted", "grammar"), STRUCTURED)
async def test_structured_outputs_is_understood_by_every_dialect(where, wanted, grammar):
    reply, requests = await post(where, structured_outputs=wanted)
    assert reply.status_code == 200, reply.text
    assert requests[0].grammar == grammar
    assert requests[0].grammar_param == f"structured_outputs.{next(iter(wanted))}"


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", ["guided_regex", "guided_choice"]),
        (
            {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
            "structured_outputs.regex",
            ["response_format", "structured_outputs.regex"],
        ),
        (
            {"structured_outputs": {"regex": "a", "json_object": True}},
            "structured_outputs.json_object",
            ["structured_outputs.regex", "structured_outputs.json_object"],
        ),
        ({"structured_outputs": {}}, "structured_outputs", ["it must hold one of"]),
        ({"structured_outputs": {"json_object": False}}, "structured_outputs", ["it must hold one of"]),
        ({"structured_outputs": {"backend": "x"}}, "structured_outputs.backend", ["not a field"]),
        ({"response_format": {"type": "xml"}}, "response_format.type", ["json_schema"]),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", ["is missing"]),
        (
            {"response_format": {"type": "text", "json_schema": {"name": "p"}}},
            "response_format.json_schema",
            ["belongs to type json_schema"],
        ),
        ({"guided_json": "{"}, "guided_json", ["is not JSON"]),
        ({"guided_json": "[" * 100}, "guided_json", ["nested 100 levels", "64"]),
        ({"guided_choice": []}, "guided_choice", ["1 or more entries"]),
    ],
)
async def test_a_wrong_or_second_form_is_refused_by_name(fields, param, words):
    reply, requests = await post(CHAT, **fields)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param)
    assert all(word in error["message"] for word in words), error["message"]
    assert not requests
