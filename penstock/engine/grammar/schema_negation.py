"""The negation of a JSON Schema, as a schema without `not`.

Sound and not complete: whatever the negation accepts, the schema does not; some of what the schema does not
accept the negation does not either (numbers, where integers are negated). Called by `schema_rewrite`.
"""

from collections.abc import Callable, Mapping
from typing import Final

Schema = dict[str, object] | bool
TYPES: Final = ("null", "boolean", "object", "array", "number", "string")
ANNOTATIONS: Final = frozenset(
    {
        "$comment",
        "$schema",
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
    }
)
OPPOSITE_BOUNDS: Final = {
    "minimum": "exclusiveMaximum",
    "maximum": "exclusiveMinimum",
    "exclusiveMinimum": "maximum",
    "exclusiveMaximum": "minimum",
}
SIZES: Final = {
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}


def negated(schema: object) -> Schema | None:
    """A schema that accepts only what `schema` does not; None if it is not known how."""
    if isinstance(schema, bool):
        return not schema
    if not isinstance(schema, dict):
        return None
    parts: list[Schema] = []
    for keyword, value in schema.items():
        if keyword in ANNOTATIONS:
            continue
        part = _negated_keyword(keyword, value)
        if part is None:
            return None
        parts.append(part)
    return any_of(parts)


def any_of(schemas: list[Schema]) -> Schema:
    """One of them holds."""
    if any(each is True or each == {} for each in schemas):
        return True
    possible = [each for each in schemas if each is not False]
    if not possible:
        return False
    return possible[0] if len(possible) == 1 else {"anyOf": possible}


def _negated_keyword(keyword: str, value: object) -> Schema | None:
    if keyword in OPPOSITE_BOUNDS:
        return {"type": "number", OPPOSITE_BOUNDS[keyword]: value}
    if keyword in SIZES:
        return _negated_size(keyword, value)
    negate = _NEGATIONS.get(keyword)
    return None if negate is None else negate(value)


def _negated_size(keyword: str, value: object) -> Schema | None:
    kind, opposite, offset = SIZES[keyword]
    if not isinstance(value, int):
        return None
    limit = value + offset
    return False if limit < 0 else {"type": kind, opposite: limit}


def _negated_type(value: object) -> Schema | None:
    named = {value} if isinstance(value, str) else set(value) if isinstance(value, list) else set()
    if "integer" in named:
        named.add("number")
    rest: list[object] = [kind for kind in TYPES if kind not in named]
    return {"type": rest} if rest else False


def _negated_const(value: object) -> Schema | None:
    if isinstance(value, bool):
        return any_of([{"const": not value}, _other_types("boolean")])
    if value is None:
        return _other_types("null")
    if isinstance(value, int | float):
        sides: list[Schema] = [
            {"type": "number", "exclusiveMinimum": value},
            {"type": "number", "exclusiveMaximum": value},
        ]
        return any_of([*sides, _other_types("number")])
    if isinstance(value, str):
        longer: Schema = {"type": "string", "minLength": len(value) + 1}
        shorter: Schema = {"type": "string", "maxLength": len(value) - 1} if value else False
        return any_of([longer, shorter, _other_types("string")])
    return _other_types("array" if isinstance(value, list) else "object")


def _other_types(kind: str) -> Schema:
    others: list[object] = [each for each in TYPES if each != kind]
    return {"type": others}


def _negated_enum(value: object) -> Schema | None:
    return _negated_const(value[0]) if isinstance(value, list) and len(value) == 1 else None


def _negated_required(value: object) -> Schema | None:
    if not isinstance(value, list):
        return None
    return any_of([{"type": "object", "properties": {name: False}} for name in value])


def _negated_properties(value: object) -> Schema | None:
    if not isinstance(value, dict):
        return None
    ways: list[Schema] = []
    for name, schema in value.items():
        other = negated(schema)
        if other is None:
            return None
        if other is not False:
            ways.append({"type": "object", "required": [name], "properties": {name: other}})
    return any_of(ways)


def _negated_any(value: object) -> Schema | None:
    parts = [negated(each) for each in value] if isinstance(value, list) else [None]
    if None in parts:
        return None
    return {"allOf": parts}


def _negated_all(value: object) -> Schema | None:
    parts = [negated(each) for each in value] if isinstance(value, list) else [None]
    known = [part for part in parts if part is not None]
    return any_of(known) if len(known) == len(parts) else None


def _negated_not(value: object) -> Schema | None:
    return value if isinstance(value, dict | bool) else None


_NEGATIONS: Final[Mapping[str, Callable[[object], Schema | None]]] = {
    "type": _negated_type,
    "const": _negated_const,
    "enum": _negated_enum,
    "required": _negated_required,
    "properties": _negated_properties,
    "anyOf": _negated_any,
    "allOf": _negated_all,
    "not": _negated_not,
}
