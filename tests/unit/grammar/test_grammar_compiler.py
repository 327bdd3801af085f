"""Every kind compiles to what it says; what cannot be enforced is refused in time, by name."""

import contextlib
import json
import time

import pytest
from grammar_rig import compiler, matches, spec, start

from penstock.core.errors import InvalidParameterError
from penstock.engine.grammar import compiler as compile_file
from penstock.engine.grammar.compiler import BYTES_PER_GRAMMAR, GrammarCompiler
from penstock.engine.grammar.schema_width import check_width
from penstock.models.embedded_model import embedded_path

PERSON = {
    "type": "object",
    "properties": {"b": {"type": "integer"}, "a": {"type": "string"}},
    "required": ["b"],
}


@pytest.mark.parametrize(
    ("kind", "source", "yes", "no"),
    [
        ("json_schema", PERSON, '{"b": 1, "a": "x"}', '{"a": "x", "b": 1}'),
        ("json_schema", PERSON, '{"b": -12}', '{"b":1}'),
        ("json_schema", {"type": "array", "items": {"type": "null"}}, "[null, null]", "[null,null]"),
        ("json_schema", True, "[1]", "]"),
        ("json_object", "", '{"any": [1, {"x": null}]}', "[]"),
        ("regex", "[a-c]+(-[0-9]{2})?", "abc-12", "abc-1"),
        ("regex", "a/b\\.c", "a/b.c", "a/bxc"),
        ("regex", r"a\\", "a\\", "a"),
        ("choice", ["\x7f"], "\x7f", "x"),
        ("choice", ["left", "right", 'say "hi"\n', "\u00fc\u2603"], 'say "hi"\n', "lef"),
        ("choice", ["left", "right", 'say "hi"\n', "\u00fc\u2603"], "\u00fc\u2603", "\u00fc"),
        ("grammar", 'start: "a" b*\nb: "b" | "c"', "abcb", "ad"),
        ("grammar", 'root ::= "a" [0-9]+ tail?\ntail ::= "!" | "?"', "a12!", "a!"),
    ],
)
def test_a_grammar_means_what_it_says(kind, source, yes, no):
    assert matches(kind, source, yes)
    assert not matches(kind, source, no)


@pytest.mark.parametrize(
    ("kind", "source", "words"),
    [
        ("json_schema", {"not": {"pattern": "a"}}, "not"),
        ("json_schema", {"oneOf": [{"pattern": "a"}, {"pattern": "b"}]}, "oneOf"),
        ("json_schema", {"type": "strin"}, "strin"),
        ("json_schema", {"$ref": "#/$defs/none"}, "none"),
        ("json_schema", {"$ref": "https://example.org/x"}, "example.org"),
        ("json_schema", False, "false"),
        ("regex", "(", "unclosed group"),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "a\\", "backslash"),
        ("regex", r"[^\s\S]", "nothing satisfies"),
        ("json_schema", {"$ref": "#"}, "nothing satisfies"),
        ("grammar", "hello", "neither Lark"),
        ("grammar", "start: missing", "missing"),
        ("structural_tag", {"type": "structural_tag", "format": {"type": "x"}}, "format.type"),
    ],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(kind, source, words):
    with pytest.raises(InvalidParameterError) as caught:
        start(kind, source)
    assert f"a {kind} that cannot be enforced" in caught.value.message
    assert words in caught.value.message
    assert len(caught.value.message) < 500
    assert caught.value.code == "invalid_grammar"


def optional(count):
    return {f"property_{i}": {"type": "string"} for i in range(count)}


WIDE = {
    "an object": {"properties": optional(491)},
    "an object behind a required property": {"properties": {"a": True} | optional(981), "required": ["a"]},
    "an object inside": {"items": {"properties": {"x": {"properties": optional(600)}}}},
}


@pytest.mark.parametrize("name", WIDE)
def test_more_optional_properties_than_the_parser_has_room_for_are_refused_with_the_limit(name):
    with pytest.raises(InvalidParameterError, match="more than (490|980) optional properties"):
        start("json_schema", WIDE[name])


def test_as_many_optional_properties_as_are_allowed_can_be_generated():
    schema = {"type": "object", "properties": optional(490)}
    assert matches("json_schema", schema, '{"property_0": "a", "property_489": "b"}')
    schema = {"type": "object", "properties": {"a": True} | optional(980), "required": ["a"]}
    assert matches("json_schema", schema, '{"a": 1, "property_0": "a", "property_979": "b"}')


def test_properties_of_data_are_none():
    assert matches(
        "json_schema",
        {"const": {"properties": {str(i): 0 for i in range(3)}}},
        json.dumps({"properties": {"0": 0, "1": 0, "2": 0}}),
    )
    check_width({"enum": [{"properties": optional(600)}]})


def test_a_grammar_that_fails_at_the_first_token_is_refused_when_it_is_compiled():
    several = [{"type": "object", "properties": {f"{k}_{i}": True for i in range(300)}} for k in "abc"]
    with pytest.raises(InvalidParameterError, match="items"):
        start("json_schema", {"anyOf": several})
    lark = f'start: "<call>" args\nargs: %json {json.dumps({"anyOf": several})}'
    with pytest.raises(InvalidParameterError, match="items"):
        start("grammar", lark)


HOSTILE = {
    "a counted repetition of counted repetitions": ("regex", "((a{1,999}b){1,999}c){1,999}"),
    "many words": ("regex", "|".join(f"w{i}" for i in range(20_000))),
    "states by the power of two": ("regex", "(.|\n)*a(.|\n){60}x"),
    "a large prime": ("json_schema", {"type": "integer", "multipleOf": 999_999_937}),
    "rules of empty rules": ("grammar", 'start: x{10000}\nx: y{10000}\ny: "a"'),
    "ambiguity": ("grammar", 'start: s\ns: s s | s s s | "a" | '),
    "many lexemes": (
        "grammar",
        f"start: ({' | '.join(f'T{i}' for i in range(2000))})*\n"
        + "\n".join(f"T{i}: /[a-z]{{1,30}}{i}.*/" for i in range(2000)),
    ),
    "references in a circle": ("json_schema", {"$defs": {"a": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}),
    "references that double": (
        "json_schema",
        {
            "$defs": {f"a{i}": {"allOf": [{"$ref": f"#/$defs/a{i + 1}"}] * 2} for i in range(30)}
            | {"a30": {"type": "string"}},
            "$ref": "#/$defs/a0",
        },
    ),
    "parentheses": ("regex", "(" * 20_000 + "a" + ")" * 20_000),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_grammar_ends_within_its_fuel(name):
    """It is refused or it compiles; either way the thread is free again. The CPU time is its own, not the clock's."""
    kind, source = HOSTILE[name]
    began_s = time.thread_time()
    with contextlib.suppress(InvalidParameterError):
        compiler().compile(spec(kind, source))
    assert time.thread_time() - began_s < 2


def test_equal_grammars_are_compiled_once_and_a_refusal_is_remembered():
    own = GrammarCompiler(embedded_path())
    good, bad = spec("regex", "abc"), spec("regex", "a(")
    assert own.cached(good) is None
    assert own.compile(good) is own.cached(good)
    with pytest.raises(InvalidParameterError):
        own.compile(bad)
    with pytest.raises(InvalidParameterError, match="unclosed group"):
        own.cached(bad)


def test_the_cache_keeps_to_its_bytes_and_drops_the_least_recently_used():
    own = GrammarCompiler(embedded_path(), max_cache_bytes=3 * BYTES_PER_GRAMMAR)
    specs = [spec("regex", letter) for letter in "abc"]
    for each in specs[:2]:
        own.compile(each)
    assert own.cached(specs[0]) is not None
    own.compile(specs[2])
    assert own.num_bytes <= 3 * BYTES_PER_GRAMMAR
    assert [own.cached(each) is not None for each in specs] == [True, False, True]


def test_a_model_without_a_tokenizer_refuses_by_name(tmp_path):
    own = GrammarCompiler(tmp_path)
    own.warm_up()
    with pytest.raises(InvalidParameterError, match=r"no tokenizer\.json"):
        own.compile(spec("regex", "a"))


def test_the_form_of_json_is_that_of_json_dumps():
    value = {"a": [1, 2.5, True, None, "x\ty"], "b": {}}
    assert matches("json_object", "", json.dumps(value))


def test_what_takes_long_to_compile_is_charged_for_its_states(monkeypatch):
    monkeypatch.setattr(compile_file, "FREE_COMPILE_CPU_S", 0.0)
    monkeypatch.setattr(compile_file, "BYTES_PER_COMPILE_CPU_S", 1 << 50)
    own = GrammarCompiler(embedded_path(), max_cache_bytes=100 * BYTES_PER_GRAMMAR)
    large, small = spec("regex", "a{1000}b"), spec("regex", "[ab]c")
    own.compile(large)
    own.compile(small)
    assert own.cached(large) is None
    assert own.cached(small).num_bytes == own.num_bytes
