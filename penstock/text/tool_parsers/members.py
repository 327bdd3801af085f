"""The arguments of a schema one by one, for formats that spell each by itself (`pythonic`, `qwen3_coder`)."""

from collections.abc import Mapping

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.tools import NAME


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One property of a schema."""

    name: str
    schema: object
    """With the definitions of the whole, so that it stands alone."""
    is_required: bool


def members_of(schema: Mapping[str, object]) -> list[Member]:
    """The properties, in their order.

    Raises:
        InvalidParameterError: the schema says more than properties can; such arguments cannot be enforced in
            these formats.
    """
    for word in ("anyOf", "oneOf", "allOf", "$ref", "not", "if", "patternProperties", "minProperties"):
        if word in schema:
            raise InvalidParameterError(
                f"tools holds parameters with {word!r}, this model's format of calls cannot enforce it",
                param="tools",
            )
    found = schema.get("properties")
    properties = found if isinstance(found, dict) else {}
    listed = schema.get("required")
    required = frozenset(listed if isinstance(listed, list) else ())
    shared = {word: schema[word] for word in ("$defs", "definitions") if word in schema}
    for name in properties:
        if not NAME.match(name):
            raise InvalidParameterError(
                f"tools holds the argument {name[:64]!a}, this model's format of calls cannot spell it",
                param="tools",
            )
    return [
        Member(
            name=name,
            schema={**each, **shared} if isinstance(each, dict) else each,
            is_required=name in required,
        )
        for name, each in properties.items()
    ]


def is_text(schema: object) -> bool | None:
    """Whether a value of `schema` is always text, never, or (None) perhaps."""
    if not isinstance(schema, dict):
        return None
    kind = schema.get("type")
    if kind is None and isinstance(schema.get("enum"), list):
        kinds = {isinstance(each, str) for each in schema["enum"]}
        return kinds.pop() if len(kinds) == 1 else None
    if isinstance(kind, str):
        return kind == "string"
    return None
