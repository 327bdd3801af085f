"""A thought before a guided answer is free; what is said follows the grammar, of whatever kind."""

import pytest
from grammar_rig import compiler, request, spec, walk

from penstock.engine.grammar.matcher import start_matcher
from penstock.text.guided_thought import behind_thought

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
KINDS = [
    ("json_schema", SCHEMA, '{"a": 1}', "[]"),
    ("json_object", "", '{"x": 2}', "[]"),
    ("regex", "[0-9]+/x", "12/x", "x"),
    ("choice", ["yes", "no"], "no", "nothing"),
    ("grammar", 'root ::= "q" [0-9]', "q1", "1"),
    (
        "structural_tag",
        {"type": "structural_tag", "format": {"type": "const_string", "value": "hm"}},
        "hm",
        "ha",
    ),
]


def follows(grammar, text):
    matcher = start_matcher(compiler().compile(grammar), request(grammar), vocab_size=4096)
    return walk(matcher, text) and matcher.may_end


@pytest.mark.parametrize(("kind", "source", "yes", "no"), KINDS, ids=[kind for kind, *_ in KINDS])
def test_what_is_said_behind_a_thought_follows_the_grammar(kind, source, yes, no):
    inside = behind_thought(spec(kind, source), end="</think>")
    assert follows(inside, f"well, {{ hm </think>\n\n{yes}")
    assert not follows(inside, f"well </think>{no}")
    assert not follows(inside, yes)
