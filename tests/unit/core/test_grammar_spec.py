"""A grammar is bounded in bytes, depth and choices before anything is compiled; messages name value and limit."""

import pytest

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_JSON_DEPTH,
    GrammarKind,
    GrammarSpec,
    json_depth,
    validate_grammar,
)


def deep(levels: int) -> str:
    return '{"items":' * levels + "true" + "}" * levels


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", "[1]", "it must be an object"),
        ("json_schema", "{", "is not JSON"),
        ("json_schema", deep(MAX_JSON_DEPTH + 1), f"at most {MAX_JSON_DEPTH}"),
        ("json_schema", "[" * 100_000, "nested 100000 levels"),
        ("regex", "", "is empty"),
        ("regex", "x" * (MAX_GRAMMAR_BYTES + 1), f"at most {MAX_GRAMMAR_BYTES}"),
        ("regex", "\ud800", "lone surrogate"),
        ("grammar", "  \n", "is empty"),
        ("choice", "[]", "0 choices"),
        ("choice", '["a", ""]', "none of them empty"),
        ("choice", '["a", 1]', "array of strings"),
        ("choice", "[" + ",".join(['"a"'] * (MAX_CHOICES + 1)) + "]", f"1 to {MAX_CHOICES}"),
        ("structural_tag", "3", "it must be an object"),
    ],
)
def test_a_grammar_beyond_a_limit_is_refused_with_value_and_limit(kind: str, source: str, words: str) -> None:
    spec = GrammarSpec(kind=GrammarKind(kind), source=source)
    with pytest.raises(InvalidParameterError, match="guided_x") as caught:
        validate_grammar(spec, param="guided_x")
    assert words in caught.value.message
    assert caught.value.param == "guided_x"


@pytest.mark.parametrize(
    ("kind", "source"),
    [
        ("json_schema", deep(MAX_JSON_DEPTH)),
        ("json_schema", "true"),
        ("json_object", ""),
        ("regex", "a"),
        ("choice", '["a","b"]'),
    ],
)
def test_what_is_within_the_limits_passes(kind: str, source: str) -> None:
    validate_grammar(GrammarSpec(kind=GrammarKind(kind), source=source))


def test_brackets_in_strings_have_no_depth() -> None:
    assert json_depth('{"a\\"[[[":["]]",{}]}') == 3


def test_the_order_of_keys_is_kept() -> None:
    spec = GrammarSpec.of_json(GrammarKind.JSON_SCHEMA, {"b": 1, "a": 2})
    assert spec.source == '{"b":1,"a":2}'
