"""Refuses JSON Schemas whose objects have more optional properties than the parser has room for.

Each optional property may come next: all of them stand in one row of the parser. Found here, a schema is
refused with the number; the parser would find out at the answer's first token. Pure; called by `compiler`.
"""

from typing import Final

MAX_OPTIONAL_FIRST: Final = 490
"""Optional properties before the first required one. Each takes four items of the parser's row, since a comma
may come before it or not, and the row holds 2,000 (`compile.LIMITS`)."""
MAX_OPTIONAL_LATER: Final = 980
"""Optional properties between two required ones, or behind the last: two items each."""
DATA_KEYWORDS: Final = frozenset({"enum", "const", "default", "examples"})
"""Their values are no schemas."""


def check_width(schema: object) -> None:
    """Look at every object of a schema; linear in its size.

    Args:
        schema: decoded JSON, or a larger structure that holds schemas.

    Raises:
        ValueError: an object is too wide; says how wide, and the limit.
    """
    left = [schema]
    while left:
        node = left.pop()
        if isinstance(node, list):
            left.extend(node)
        elif isinstance(node, dict):
            _check_object(node)
            left.extend(value for name, value in node.items() if name not in DATA_KEYWORDS)


def _check_object(node: dict[str, object]) -> None:
    properties, listed = node.get("properties"), node.get("required")
    if not isinstance(properties, dict) or len(properties) <= MAX_OPTIONAL_FIRST:
        return
    required = frozenset(name for name in listed if isinstance(name, str)) if isinstance(listed, list) else ()
    limit, width = MAX_OPTIONAL_FIRST, 0
    for name in properties:
        if name in required:
            limit, width = MAX_OPTIONAL_LATER, 0
            continue
        width += 1
        if width > limit:
            raise ValueError(
                f"an object has more than {limit} optional properties without a required one among them "
                f"({len(properties)} properties in all)"
            )
