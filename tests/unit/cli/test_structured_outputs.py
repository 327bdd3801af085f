"""The offline way to say what an answer must look like: one field, checked before anything runs."""

import pytest

from penstock import StructuredOutputsParams
from penstock.cli.structured_outputs import grammars_of
from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarKind, GrammarSpec

DIGITS = StructuredOutputsParams(regex="[0-9]+")


@pytest.mark.parametrize(
    ("fields", "kind", "source"),
    [
        ({"json": {"b": 1, "a": 2}}, "json_schema", '{"b":1,"a":2}'),
        ({"json": '{"type": "null"}'}, "json_schema", '{"type": "null"}'),
        ({"json": True}, "json_schema", "true"),
        ({"json": False}, "json_schema", "false"),
        ({"regex": "a+"}, "regex", "a+"),
        ({"choice": ["x", "y"]}, "choice", '["x","y"]'),
        ({"grammar": "start: x"}, "grammar", "start: x"),
        ({"json_object": True}, "json_object", ""),
        ({"structural_tag": {"format": {}}}, "structural_tag", '{"format":{}}'),
    ],
)
def test_each_field_is_a_grammar(fields: dict[str, object], kind: str, source: str) -> None:
    found = StructuredOutputsParams(**fields).spec()  # type: ignore[arg-type]  # the cases are of all types
    assert found == GrammarSpec(kind=GrammarKind(kind), source=source)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "sets nothing"),
        ({"regex": "a", "json_object": True}, "sets regex, json_object"),
        ({"regex": ""}, "empty"),
    ],
)
def test_no_field_two_fields_and_an_empty_one_are_refused(fields: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        StructuredOutputsParams(**fields).spec()  # type: ignore[arg-type]  # as above


def test_one_is_for_all_and_a_list_has_one_or_none_for_each() -> None:
    spec = DIGITS.spec()
    assert grammars_of(None, num_prompts=2) == [None, None]
    assert grammars_of(DIGITS, num_prompts=2) == [spec, spec]
    assert grammars_of([None, DIGITS], num_prompts=2) == [None, spec]


@pytest.mark.parametrize("value", [[DIGITS], "[0-9]+", {"regex": "a"}, [1, 2]])
def test_a_list_of_another_length_and_another_type_are_refused(value: object) -> None:
    with pytest.raises(InvalidParameterError, match="structured_outputs") as caught:
        grammars_of(value, num_prompts=2)
    assert caught.value.param == "structured_outputs"
