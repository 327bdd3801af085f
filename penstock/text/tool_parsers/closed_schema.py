"""A tool's schema as a grammar enforces it: objects that list their properties have no others.

JSON Schema lets an object have what it does not mention. A model that is held to such a schema would be free
to make up arguments for ever; nobody who lists the arguments of a function means that. A schema that says
`additionalProperties` itself is left as it is.
"""

from collections.abc import Mapping
from typing import Final

_OPEN: Final = frozenset(
    {
        "additionalProperties",
        "patternProperties",
        "unevaluatedProperties",
        "$ref",
        "allOf",
        "anyOf",
        "oneOf",
    }
)
"""Words beside `properties` that speak of further ones, so that closing could forbid what they allow."""
_NAMED: Final = ("properties", "$defs", "definitions")
_LISTED: Final = ("anyOf", "oneOf", "prefixItems")


def closed(schema: Mapping[str, object]) -> dict[str, object]:
    """A copy of `schema` with its objects closed; nested at most as deep as a checked schema."""
    made = dict(schema)
    for word in _NAMED:
        found = made.get(word)
        if isinstance(found, dict):
            made[word] = {name: _closed(each) for name, each in found.items()}
    for word in _LISTED:
        found = made.get(word)
        if isinstance(found, list):
            made[word] = [_closed(each) for each in found]
    if "items" in made:
        made["items"] = _closed(made["items"])
    if isinstance(made.get("properties"), dict) and _OPEN.isdisjoint(made):
        made["additionalProperties"] = False
    return made


def _closed(schema: object) -> object:
    return closed(schema) if isinstance(schema, dict) else schema
