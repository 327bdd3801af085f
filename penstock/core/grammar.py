"""What an answer's text must look like, as it crosses from a dialect to the engine; and its first check.

A `GrammarSpec` is a kind and a canonical text. Dialects make it, `validate_grammar` bounds it in the API
process, `engine/grammar` compiles it. Whether a schema can be enforced, only the compiler knows.
"""

import enum
from typing import Final, Self

import msgspec

from penstock.core.errors import InvalidParameterError

MAX_GRAMMAR_BYTES: Final = 1 << 18
"""Bytes of `source` in UTF-8."""
MAX_JSON_DEPTH: Final = 64
"""Objects and arrays inside each other, in the kinds whose source is JSON; the compiler ends at 128."""
MAX_CHOICES: Final = 4096
GRAMMAR_PARAM: Final = "structured_outputs"
"""What errors call a grammar where nothing is known of the request's own fields."""


class GrammarKind(enum.StrEnum):
    """What `GrammarSpec.source` is."""

    JSON_SCHEMA = "json_schema"
    """A JSON Schema (an object, or true or false) as JSON text; the order of `properties` is the answer's."""
    JSON_OBJECT = "json_object"
    """Empty: any JSON object."""
    REGEX = "regex"
    """A regular expression that the whole answer matches."""
    CHOICE = "choice"
    """A JSON array of strings, one of which is the answer."""
    GRAMMAR = "grammar"
    """A context-free grammar: llguidance's dialect of Lark, or GBNF."""
    STRUCTURAL_TAG = "structural_tag"
    """JSON text of a structural tag: free text with tagged parts that follow schemas."""


JSON_KINDS: Final = frozenset({GrammarKind.JSON_SCHEMA, GrammarKind.CHOICE, GrammarKind.STRUCTURAL_TAG})


class GrammarSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A grammar by its content; equal ones are compiled once."""

    kind: GrammarKind
    source: str = ""

    @classmethod
    def of_json(cls, kind: GrammarKind, value: object) -> Self:
        """A grammar whose source is `value` as JSON, keys in the order in which they stand.

        Args:
            kind: one of `JSON_KINDS`.
            value: what a JSON parser gives; nested at most as deep as Python's own limit.
        """
        assert kind in JSON_KINDS, kind
        return cls(kind=kind, source=msgspec.json.encode(value).decode())

    @classmethod
    def of(cls, kind: GrammarKind, value: object) -> Self:
        """A grammar as a request states it: text as it came, data as JSON; `JSON_OBJECT` needs no source."""
        if kind is GrammarKind.JSON_OBJECT:
            return cls(kind=kind)
        return cls(kind=kind, source=value) if isinstance(value, str) else cls.of_json(kind, value)


class AskedGrammar(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks an answer to look like, and where it says so."""

    spec: GrammarSpec | None = None
    param: str = GRAMMAR_PARAM
    """The field of the request, for errors."""


def validate_grammar(spec: GrammarSpec, *, param: str = GRAMMAR_PARAM) -> None:
    """Bound a grammar's size and shape; cheap, linear in its length.

    Args:
        spec: from a request.
        param: the request field that an error names.

    Raises:
        InvalidParameterError: names the field, its value and the limit.
    """
    try:
        num_bytes = len(spec.source.encode())
    except UnicodeEncodeError:
        raise InvalidParameterError(
            f"{param} holds a lone surrogate, it must be valid Unicode", param=param
        ) from None
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise InvalidParameterError(
            f"{param} has {num_bytes} bytes, it must have at most {MAX_GRAMMAR_BYTES}", param=param
        )
    if spec.kind in JSON_KINDS:
        _check_json(spec, param=param)
    elif spec.kind is not GrammarKind.JSON_OBJECT and not spec.source.strip():
        raise InvalidParameterError(f"{param} is empty, it must hold a {spec.kind}", param=param)


def _check_json(spec: GrammarSpec, *, param: str) -> None:
    depth = json_depth(spec.source)
    if depth > MAX_JSON_DEPTH:
        raise InvalidParameterError(
            f"{param} is nested {depth} levels deep, it must be at most {MAX_JSON_DEPTH}", param=param
        )
    try:
        value: object = msgspec.json.decode(spec.source)
    except msgspec.DecodeError as error:
        raise InvalidParameterError(f"{param} is not JSON: {error}", param=param) from None
    if spec.kind is GrammarKind.CHOICE:
        _check_choices(value, param=param)
    elif not isinstance(value, dict | bool):
        raise InvalidParameterError(
            f"{param} is a JSON {type(value).__name__}, it must be an object", param=param
        )


def _check_choices(value: object, *, param: str) -> None:
    if not isinstance(value, list) or not all(isinstance(choice, str) and choice for choice in value):
        raise InvalidParameterError(f"{param} must be an array of strings, none of them empty", param=param)
    if not 1 <= len(value) <= MAX_CHOICES:
        raise InvalidParameterError(
            f"{param} has {len(value)} choices, it must have 1 to {MAX_CHOICES}", param=param
        )


def json_depth(text: str) -> int:
    """How deep objects and arrays of a JSON text, valid or not, lie inside each other; without recursion."""
    depth = deepest = 0
    is_string = is_escaped = False
    for char in text:
        if is_string:
            is_string = is_escaped or char != '"'
            is_escaped = char == "\\" and not is_escaped
        elif char == '"':
            is_string = True
        elif char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}":
            depth -= 1
    return deepest
