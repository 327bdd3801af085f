"""JSON Schemas that llguidance does not take as they are, said in keywords that it has.

Sound and not complete: the schema that comes out accepts only what the one that went in accepts. Where a
rewriting would leave out too much, or is not known, the keyword stays and the compiler refuses it by name.
Only called for schemas that were refused; pure.

```
contains S             one of the first places holds S: anyOf [S, ...], [true, S, ...], ...
if A then B else C     anyOf: A and B, or not A and C
not A                  the negation, where there is one
unevaluated* S         additionalProperties, items S beside what is certainly evaluated
dependent*, propertyNames, uniqueItems, oneOf, $dynamicRef: likewise
```

**Source:** JSON Schema draft 2020-12, core (section 11, unevaluated) and validation (6.4, 6.5).
"""

from collections.abc import Callable, Iterator
from typing import Final, cast

from penstock.engine.grammar.schema_negation import Schema, any_of, negated

MAX_PLACES: Final = 6
"""Places of an array in which `contains` looks; what it wants further behind is not generated."""
MAX_BRANCHES: Final = 16
"""Branches of a `oneOf` or sets of places; more stay as they are."""
KNOWN_FORMATS: Final = frozenset(
    {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"}
)
"""Enforced; others are annotations, as the draft has it."""
MAX_NODES: Final = 4096
"""Subschemas of what comes out: copies of copies would grow without end."""
COUNTS: Final = (
    "minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties", "minContains",
    "maxContains",
)  # fmt: skip
MAPS: Final = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
LISTS: Final = ("allOf", "anyOf", "oneOf", "prefixItems")
SINGLES: Final = (
    "additionalProperties", "items", "contains", "not", "if", "then", "else", "propertyNames",
    "unevaluatedProperties", "unevaluatedItems",
)  # fmt: skip
EVALUATE_BY_CASE: Final = frozenset({"if", "dependentSchemas", "contains", "$dynamicRef"})
Node = dict[str, object]


class SchemaTooLargeError(Exception):
    """The rewritten schema would have more than `MAX_NODES` nodes."""


def rewrite_schema(schema: object) -> object:
    """The schema in keywords that llguidance has, as far as a rewriting is known.

    Args:
        schema: decoded JSON, nested at most `MAX_JSON_DEPTH` deep; not changed.

    Raises:
        SchemaTooLargeError: what would come out is too large.
    """
    root = _with_static_references(schema)
    return _Rewriter(root).rewrite(root)


class _Rewriter:
    """Rewrites the nodes of one schema, from the leaves up."""

    def __init__(self, root: object) -> None:
        self._root = root
        self._num_nodes = 0
        self._rules: tuple[Callable[[Node], None], ...] = (
            _drop_what_says_nothing,
            _rewrite_property_names,
            _rewrite_dependents,
            _rewrite_contains,
            _rewrite_unique_items,
            _rewrite_condition,
            _rewrite_not,
            _rewrite_one_of,
        )

    def rewrite(self, schema: object) -> object:
        if not isinstance(schema, dict):
            return schema
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise SchemaTooLargeError
        node: Node = dict(schema)
        self._rewrite_unevaluated(node, "unevaluatedProperties", self._closed_object)
        self._rewrite_unevaluated(node, "unevaluatedItems", self._closed_array)
        for rule in self._rules:
            rule(node)
        for name in MAPS:
            if isinstance(node.get(name), dict):
                entries = cast("Node", node[name])
                node[name] = {key: self.rewrite(each) for key, each in entries.items()}
        for name in LISTS:
            if isinstance(node.get(name), list):
                node[name] = [self.rewrite(each) for each in cast("list[object]", node[name])]
        for name in SINGLES:
            if name in node:
                node[name] = self.rewrite(node[name])
        return node

    def _rewrite_unevaluated(
        self, node: Node, keyword: str, closed: Callable[[list[Node], object], Schema]
    ) -> None:
        """Close the object or array beside what every way through the schema evaluates, one way at a time."""
        if keyword not in node:
            return
        rest = node[keyword]
        always = list(self._in_place(node))
        if rest is not True and rest != {} and any(part.keys() & EVALUATE_BY_CASE for part in always):
            return  # what is evaluated depends on the instance: closed without it, too much would be left out
        del node[keyword]
        if rest is True or rest == {}:
            return
        choices = [each for part in always for name in ("anyOf", "oneOf") if (each := part.get(name))]
        if len(choices) == 1 and isinstance(choices[0], list):
            ways = [
                _all_of(branch, closed([*always, *self._in_place(branch)], rest)) for branch in choices[0]
            ]
            _add(node, any_of(ways))
        else:
            _add(node, closed(always, rest))

    def _in_place(self, schema: object, *, depth: int = 0) -> Iterator[Node]:
        """The node and what certainly applies to the same instance: `allOf`, references."""
        if not isinstance(schema, dict) or depth > MAX_BRANCHES:
            return
        yield schema
        parts = schema.get("allOf")
        for part in parts if isinstance(parts, list) else []:
            yield from self._in_place(part, depth=depth + 1)
        target = self._target(schema.get("$ref"))
        if target is not None:
            yield from self._in_place(target, depth=depth + 1)

    def _target(self, reference: object) -> object | None:
        if not isinstance(reference, str) or not reference.startswith("#/"):
            return None
        found: object = self._root
        for part in reference[2:].split("/"):
            key = part.replace("~1", "/").replace("~0", "~")
            if not isinstance(found, dict) or key not in found:
                return None
            found = found[key]
        return found

    def _closed_object(self, nodes: list[Node], rest: object) -> Schema:
        if any("additionalProperties" in node or "unevaluatedProperties" in node for node in nodes):
            return True
        names: Node = {}
        patterns: Node = {}
        for node in nodes:
            names |= dict.fromkeys(cast("Node", node.get("properties") or {}), True)
            patterns |= dict.fromkeys(cast("Node", node.get("patternProperties") or {}), True)
        closed: Node = {"properties": names, "additionalProperties": rest}
        return closed | ({"patternProperties": patterns} if patterns else {})

    def _closed_array(self, nodes: list[Node], rest: object) -> Schema:
        if any("items" in node or "unevaluatedItems" in node for node in nodes):
            return True
        length = max((len(cast("list[object]", node.get("prefixItems") or [])) for node in nodes), default=0)
        return {"prefixItems": [True] * length, "items": rest} if length else {"items": rest}


def _all_of(*schemas: object) -> Schema:
    parts = [each for each in schemas if each is not True and each != {}]
    if not parts:
        return True
    return cast("Schema", parts[0]) if len(parts) == 1 else {"allOf": parts}


def _add(node: Node, schema: Schema) -> None:
    """One more condition."""
    if schema is not True and schema != {}:
        node["allOf"] = [*cast("list[object]", node.get("allOf") or []), schema]


def _drop_what_says_nothing(node: Node) -> None:
    for name in COUNTS:
        value = node.get(name)
        if isinstance(value, float) and value.is_integer():
            node[name] = int(value)
    if "contains" not in node:
        node.pop("minContains", None)
        node.pop("maxContains", None)
    if "if" not in node or not {"then", "else"} & node.keys():
        for name in ("if", "then", "else"):
            node.pop(name, None)
    if node.get("uniqueItems") is False:
        del node["uniqueItems"]
    if node.get("propertyNames") in (True, {}):
        del node["propertyNames"]
    if isinstance(node.get("format"), str) and node["format"] not in KNOWN_FORMATS:
        del node["format"]


def _rewrite_property_names(node: Node) -> None:
    wanted = node.get("propertyNames")
    if wanted is False:
        del node["propertyNames"]
        _add(node, {"maxProperties": 0})
    if not isinstance(wanted, dict) or len(wanted) != 1:
        return
    ((keyword, value),) = wanted.items()
    if keyword in {"enum", "const"}:
        names = [name for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)]
        closed: Node = {"properties": dict.fromkeys(names, True), "additionalProperties": False}
    elif keyword in {"pattern", "maxLength"}:
        pattern = value if keyword == "pattern" else f"^(.|\\n){{0,{value}}}$"
        closed = {"patternProperties": {str(pattern): True}, "additionalProperties": False}
        if "patternProperties" in node or "properties" in node:
            return  # two patterns for one name are beyond the compiler
        if "additionalProperties" in node:
            closed["patternProperties"] = {str(pattern): node.pop("additionalProperties")}
    else:
        return
    del node["propertyNames"]
    _add(node, closed)


def _rewrite_dependents(node: Node) -> None:
    for name, required in cast("Node", node.pop("dependentRequired", None) or {}).items():
        if required:
            _add(node, any_of([{"properties": {name: False}}, {"required": required}]))
    for name, schema in cast("Node", node.pop("dependentSchemas", None) or {}).items():
        _add(node, any_of([{"properties": {name: False}}, cast("Schema", schema)]))


def _rewrite_contains(node: Node) -> None:
    """Between `minContains` and `maxContains` in a row, from one of the first places on."""
    if "contains" not in node:
        return
    wanted = cast("Schema", node["contains"])
    least, most = node.get("minContains", 1), node.get("maxContains")
    if least == 0 and most is None:
        conditions: Schema | None = True
    elif most is not None:
        other = negated(wanted)
        conditions = None if other is None else _exactly(wanted, other, least=least, most=most)
    else:
        conditions = _at_least(wanted, least)
    if conditions is not None:
        for name in ("contains", "minContains", "maxContains"):
            node.pop(name, None)
        _add(node, conditions)


def _at_least(wanted: Schema, least: object) -> Schema | None:
    """So many in a row, from one of the first places on."""
    if not isinstance(least, int):
        return None
    if wanted is False:
        return negated({"type": "array"})
    return any_of(
        [
            {"prefixItems": [True] * place + [wanted] * least, "minItems": place + least}
            for place in range(MAX_PLACES)
        ]
    )


def _exactly(wanted: Schema, other: Schema, *, least: object, most: object) -> Schema | None:
    """Between `least` and `most` in a row, before and after them none."""
    if not isinstance(least, int) or not isinstance(most, int):
        return None
    ways: list[Schema] = [
        {"prefixItems": [other] * place + [wanted] * num, "items": other, "minItems": place + num}
        for num in range(least, most + 1)
        for place in range(MAX_PLACES if num else 1)
    ]
    return any_of([*ways, cast("Schema", negated({"type": "array"}))])


def _rewrite_unique_items(node: Node) -> None:
    """Arrays of at most one item are unique; longer ones are not known."""
    most = node.get("maxItems")
    if node.get("uniqueItems") is True and isinstance(most, int) and most <= 1:
        del node["uniqueItems"]


def _rewrite_condition(node: Node) -> None:
    if "if" not in node:
        return
    condition = node["if"]
    other = negated(condition)
    if other is None:
        return
    del node["if"]
    holds = _all_of(condition, node.pop("then", True))
    fails = _all_of(other, node.pop("else", True))
    ways = [holds if other is not True else False, fails]
    _add(node, any_of([way for way in ways if not _is_impossible(way)]))


def _is_impossible(schema: Schema) -> bool:
    parts = schema.get("allOf") if isinstance(schema, dict) else None
    return schema is False or (isinstance(parts, list) and False in [part for part in parts if part is False])


def _rewrite_not(node: Node) -> None:
    other = negated(node["not"]) if "not" in node else None
    if other is not None:
        del node["not"]
        _add(node, other)


def _rewrite_one_of(node: Node) -> None:
    branches = node.get("oneOf")
    if not isinstance(branches, list) or not 1 < len(branches) <= MAX_BRANCHES:
        return
    others = [negated(branch) for branch in branches]
    if None in others:
        return
    del node["oneOf"]
    ways = [
        _all_of(branch, *(other for at, other in enumerate(others) if at != index))
        for index, branch in enumerate(branches)
    ]
    _add(node, any_of([way for way in ways if not _is_impossible(way)]))


def _with_static_references(schema: object) -> object:
    """`$dynamicRef` as `$ref` where only one place can be meant."""
    anchors = [name for name in _values(schema, "$dynamicAnchor") if isinstance(name, str)]
    static = {name for name in _values(schema, "$anchor") if isinstance(name, str)}
    unique = {name for name in anchors if anchors.count(name) == 1 and name not in static}

    def walk(value: object) -> object:
        if isinstance(value, list):
            return [walk(each) for each in value]
        if not isinstance(value, dict):
            return value
        node = {key: walk(each) for key, each in value.items()}
        reference = node.get("$dynamicRef")
        if isinstance(reference, str) and (
            reference.startswith("#/") or reference[1:] in unique or reference[1:] not in anchors
        ):
            node["$ref"] = node.pop("$dynamicRef")
        if node.get("$dynamicAnchor") in unique:
            node["$anchor"] = node.pop("$dynamicAnchor")
        return node

    return walk(schema)


def _values(schema: object, keyword: str) -> Iterator[object]:
    if isinstance(schema, dict):
        if keyword in schema:
            yield schema[keyword]
        for each in schema.values():
            yield from _values(each, keyword)
    elif isinstance(schema, list):
        for each in schema:
            yield from _values(each, keyword)
