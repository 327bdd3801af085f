"""What llguidance lacks is said in other keywords, and never accepts more than before."""

import json

import pytest
from grammar_rig import matches, start

from penstock.core.errors import InvalidParameterError
from penstock.engine.grammar.schema_negation import negated

CASES = [
    ({"not": {"type": ["string", "boolean"]}}, ["[]", "1", "null"], ['"x"', "true"]),
    ({"not": {"minimum": 3}}, ["2"], ["3", '"x"']),
    ({"not": {"required": ["a"]}}, ['{"b": 1}', "{}"], ['{"a": 1}', "1"]),
    ({"not": {"const": "ab"}}, ['"a"', '"abc"', "3"], ['"ab"']),
    ({"if": {"maximum": 0}, "then": {"minimum": -9}, "else": {"multipleOf": 2}}, ["-9", "4"], ["-10", "3"]),
    ({"if": {"const": 1}, "then": False}, ["2", '"x"'], ["1"]),
    ({"contains": {"const": 5}}, ["[5]", "[1, 5]", "[5, 5]", "3"], ["[]", "[1]"]),
    ({"contains": {"const": 5}, "minContains": 2}, ["[5, 5]", "[0, 5, 5]"], ["[5]", "[]"]),
    ({"contains": {"const": 5}, "maxContains": 1}, ["[5]", "[1, 5, 2]"], ["[5, 5]", "[]"]),
    ({"contains": {"const": 5}, "minContains": 0}, ["[]", "[1]"], []),
    ({"type": "object", "propertyNames": {"enum": ["a"]}}, ['{"a": 1}', "{}"], ['{"b": 1}']),
    ({"type": "object", "propertyNames": {"maxLength": 2}}, ['{"ab": 1}'], ['{"abc": 1}']),
    ({"dependentRequired": {"a": ["b"]}}, ['{"b": 1}', '{"b": 1, "a": 2}', "3"], ['{"a": 1}']),
    ({"dependentSchemas": {"a": {"required": ["b"]}}}, ["{}", '{"b": 1, "a": 2}'], ['{"a": 1}']),
    ({"oneOf": [{"type": "integer"}, {"minimum": 2}]}, ["1", '"x"'], ["3"]),
    (
        {"properties": {"a": {"type": "string"}}, "allOf": [{"properties": {"b": True}}]}
        | {"unevaluatedProperties": False},
        ['{"a": "x", "b": 1}', "{}"],
        ['{"a": "x", "c": 1}'],
    ),
    (
        {"anyOf": [{"properties": {"a": True}, "required": ["a"]}, {"properties": {"b": True}}]}
        | {"unevaluatedProperties": False},
        ['{"a": 1}', '{"b": 1}'],
        ['{"c": 1}'],
    ),
    ({"prefixItems": [{"type": "string"}], "unevaluatedItems": False}, ['["x"]', "[]"], ['["x", 1]', "[1]"]),
    ({"uniqueItems": False, "maxItems": 2.0}, ["[1, 1]"], ["[1, 1, 1]"]),
    ({"type": "array", "uniqueItems": True, "maxItems": 1}, ["[1]"], ["[1, 1]"]),
    ({"type": "string", "format": "idn-email"}, ['"anything"'], ["1"]),
    (
        {
            "items": {"$dynamicRef": "#node"},
            "type": "array",
            "$defs": {"n": {"$dynamicAnchor": "node", "type": "null"}},
        },
        ["[null]"],
        ["[1]"],
    ),
]


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"), CASES, ids=[json.dumps(case[0])[:60] for case in CASES]
)
def test_a_rewritten_schema_accepts_what_is_valid_and_nothing_else(schema, valid, invalid):
    assert all(matches("json_schema", schema, text) for text in valid)
    assert not any(matches("json_schema", schema, text) for text in invalid)


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"uniqueItems": True}, "uniqueItems"),
        ({"not": {"pattern": "a"}}, "not"),
        ({"if": {"pattern": "a"}, "then": False}, "if"),
        (
            {"if": {"required": ["a"]}, "then": {"properties": {"b": True}}, "unevaluatedProperties": False},
            "uneval",
        ),
        ({"contains": {"pattern": "a"}, "maxContains": 1}, "maxContains"),
    ],
)
def test_what_cannot_be_rewritten_is_refused_by_its_own_name(schema, keyword):
    with pytest.raises(InvalidParameterError, match=keyword):
        start("json_schema", schema)


@pytest.mark.parametrize("schema", [{"pattern": "a"}, {"enum": [1, 2]}, {"$ref": "#"}, 3, {"minLength": "x"}])
def test_an_unknown_negation_is_none(schema):
    assert negated(schema) is None


def test_double_negation_is_the_schema():
    assert negated({"not": {"type": "string"}}) == {"type": "string"}
    assert negated(True) is False
    assert negated({"title": "x"}) is False


def test_copies_of_copies_end_at_a_limit():
    schema: object = {"const": 1}
    for _ in range(30):
        schema = {"contains": schema}
    with pytest.raises(InvalidParameterError, match="contains"):
        start("json_schema", schema)
