"""Structural tags as Lark: free text in which tagged parts follow schemas.

Both forms that vLLM takes are known, the older one (`structures` and `triggers`) and the newer one (`format`,
a tree). Pure; called by `dialects`. Each node of the tree becomes one rule:

```
{"type": "triggered_tags", "triggers": ["<f="],        start: n0
 "tags": [{"begin": "<f=a>",                           n0: (n1)* TEXT
           "content": {"type": "json_schema", ...},    n1: n2 ("a>" n3 "</f>")
           "end": "</f>"}]}                            n2[lazy]: TEXT "<f="
                                                       n3: %json {...}
```
"""

import json
from collections.abc import Mapping
from typing import Final

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import any_to_lark

from penstock.engine.grammar.schema_rewrite import rewrite_schema

MAX_NODES: Final = 8192
"""Rules of one structural tag."""
TEXT_RULE: Final = "TEXT: /(.|\\n)*/"
Node = Mapping[str, object]


def structural_tag_to_lark(
    tag: object, *, form: Mapping[str, object], special_ids: Mapping[str, int], rewrites: bool = False
) -> str:
    """A grammar in llguidance's dialect of Lark.

    Args:
        tag: the decoded source of the spec.
        form: how JSON is written, llguidance's options.
        special_ids: special tokens by their text; they match as tokens and not as text.
        rewrites: say schemas in keywords that llguidance has.

    Raises:
        ValueError: it is malformed; says where.
        SchemaTooLargeError: a rewritten schema would be.
    """
    root = _root(_object(tag, where="the structural tag"))
    builder = _Builder(form=form, special_ids=special_ids, rewrites=rewrites)
    start = builder.rule(root, where="format")
    return "\n".join(["%llguidance {}", f"start: {start}", *builder.rules, TEXT_RULE]) + "\n"


def _root(node: Node) -> Node:
    """The tree of either form."""
    if "format" not in node:
        _only(node, "type", "structures", "triggers", where="the structural tag")
        return _from_structures(node)
    _only(node, "type", "format", where="the structural tag")
    return _object(node["format"], where="format")


def _from_structures(node: Node) -> Node:
    tags = []
    for index, entry in enumerate(_list(node, "structures", where="the structural tag")):
        where = f"structures.{index}"
        each = _object(entry, where=where)
        _only(each, "begin", "schema", "end", where=where)
        schema = each.get("schema")
        content = {"type": "json_schema", "json_schema": True if schema is None else schema}
        tags.append({"type": "tag", "begin": each.get("begin"), "content": content, "end": each.get("end")})
    return {"type": "triggered_tags", "triggers": node.get("triggers"), "tags": tags}


class MalformedTagError(ValueError):
    """A structural tag of a form that is not known; the message says where."""


class _Builder:
    """Gathers the rules of one grammar."""

    def __init__(self, *, form: Mapping[str, object], special_ids: Mapping[str, int], rewrites: bool) -> None:
        self._form = form
        self._special_ids = special_ids
        self._rewrites = rewrites
        self.rules: list[str] = []

    def rule(self, node: Node, *, where: str) -> str:
        """Add a node and what is below it; returns the name of its rule."""
        kind = node.get("type")
        makers = {
            "json_schema": self._json_schema,
            "const_string": self._const_string,
            "regex": self._regex,
            "grammar": self._grammar,
            "any_text": self._any_text,
            "sequence": self._sequence,
            "or": self._or,
            "tag": self._tag,
            "triggered_tags": self._triggered_tags,
            "tags_with_separator": self._tags_with_separator,
            "structural_tag": self._structural_tag,
        }
        maker = makers.get(kind) if isinstance(kind, str) else None
        if maker is None:
            raise MalformedTagError(
                f"{where}.type is {str(kind)[:40]!r}, it must be one of {', '.join(makers)}"
            )
        return self._add(maker(node, where))

    def _add(self, body: str, *, attributes: str = "") -> str:
        if len(self.rules) >= MAX_NODES:
            raise MalformedTagError(f"the structural tag has more than {MAX_NODES} parts")
        name = f"n{len(self.rules)}"
        self.rules.append(f"{name}{attributes}: {body}")
        return name

    def _json_schema(self, node: Node, where: str) -> str:
        _only(node, "type", "json_schema", where=where)
        schema = node.get("json_schema", True)
        if self._rewrites:
            schema = rewrite_schema(schema)
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise MalformedTagError(f"{where}.json_schema must be an object")
        return "%json " + json.dumps({**schema, "x-guidance": self._form})

    def _const_string(self, node: Node, where: str) -> str:
        _only(node, "type", "value", where=where)
        return self._literal(_text(node, "value", where=where))

    def _regex(self, node: Node, where: str) -> str:
        _only(node, "type", "pattern", where=where)
        return f"/{regex_to_lark(_text(node, 'pattern', where=where))}/"

    def _grammar(self, node: Node, where: str) -> str:
        _only(node, "type", "grammar", where=where)
        try:
            lark = any_to_lark(_text(node, "grammar", where=where))
        except Exception as error:  # noqa: BLE001  the converter raises bare Exception
            raise MalformedTagError(f"{where}.grammar is neither Lark nor GBNF: {error}") from None
        return "%lark {\n" + lark.replace("%llguidance {}", "") + "\n}"

    def _any_text(self, node: Node, where: str) -> str:
        _only(node, "type", where=where)
        return "TEXT"

    def _sequence(self, node: Node, where: str) -> str:
        _only(node, "type", "elements", where=where)
        parts = list(_list(node, "elements", where=where))
        for part in parts[:-1]:
            if isinstance(part, dict) and part.get("type") == "any_text":
                raise MalformedTagError(
                    f"{where}: any_text must be the last element, or the content of a tag"
                )
        return " ".join(self._children(parts, where=f"{where}.elements"))

    def _or(self, node: Node, where: str) -> str:
        _only(node, "type", "elements", where=where)
        return " | ".join(self._children(_list(node, "elements", where=where), where=f"{where}.elements"))

    def _structural_tag(self, node: Node, where: str) -> str:
        return self.rule(_root(node), where=where)

    def _children(self, nodes: list[object], *, where: str) -> list[str]:
        return [
            self.rule(_object(node, where=f"{where}.{i}"), where=f"{where}.{i}")
            for i, node in enumerate(nodes)
        ]

    def _tag(self, node: Node, where: str) -> str:
        begin = self._literal(_text(node, "begin", where=where))
        return f"{begin} {self._after_begin(node, where)}"

    def _after_begin(self, node: Node, where: str) -> str:
        """Content and end of a tag."""
        _only(node, "type", "begin", "content", "end", where=where)
        content = _object(node.get("content"), where=f"{where}.content")
        end = _text(node, "end", where=where)
        if content.get("type") != "any_text" or not end:
            return f"{self.rule(content, where=f'{where}.content')} {self._literal(end)}"
        if self._parts(end)[0] in self._special_ids:
            return f"TEXT {self._literal(end)}"
        return self._add(f"TEXT {self._literal(end)}", attributes="[lazy]")

    def _triggered_tags(self, node: Node, where: str) -> str:
        _only(node, "type", "triggers", "tags", "at_least_one", "stop_after_first", where=where)
        triggers = [_string(each, where=f"{where}.triggers") for each in _list(node, "triggers", where=where)]
        by_trigger: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for index, entry in enumerate(_list(node, "tags", where=where)):
            path = f"{where}.tags.{index}"
            tag = _object(entry, where=path)
            begin = _text(tag, "begin", where=path)
            trigger = max((each for each in triggers if begin.startswith(each)), key=len, default="")
            if not trigger:
                raise MalformedTagError(f"{path}.begin must start with one of the triggers")
            rest = self._literal(begin.removeprefix(trigger))
            by_trigger[trigger].append(f"{rest} {self._after_begin(tag, path)}")
        groups = [
            f"{self._trigger(trigger, where=where)} ({' | '.join(ways)})"
            for trigger, ways in by_trigger.items()
            if ways
        ]
        tag_rule = self._add(" | ".join(groups))
        return _repeated(tag_rule, node, text=" TEXT", where=where)

    def _trigger(self, trigger: str, *, where: str) -> str:
        """Free text up to a trigger."""
        parts = self._parts(trigger)
        if len(parts) == 1 and parts[0] in self._special_ids:
            return f"TEXT {self._literal(trigger)}"
        if any(part in self._special_ids for part in parts):
            raise MalformedTagError(f"{where}: a trigger is a special token or text, not both")
        return self._add(f"TEXT {self._literal(trigger)}", attributes="[lazy]")

    def _tags_with_separator(self, node: Node, where: str) -> str:
        _only(node, "type", "tags", "separator", "at_least_one", "stop_after_first", where=where)
        separator = self._literal(_text(node, "separator", where=where))
        tags = self._add(" | ".join(self._children(_list(node, "tags", where=where), where=f"{where}.tags")))
        more = "" if _flag(node, "stop_after_first", where=where) else f" ({separator} {tags})*"
        return f"{tags}{more}" if _flag(node, "at_least_one", where=where) else f"({tags}{more})?"

    def _literal(self, text: str) -> str:
        """Text with the special tokens in it as tokens; nothing for empty text."""
        return " ".join(
            f"<[{self._special_ids[part]}]>" if part in self._special_ids else json.dumps(part)
            for part in self._parts(text)
        )

    def _parts(self, text: str) -> list[str]:
        """The text cut at its special tokens."""
        parts = [text] if text else []
        for special in self._special_ids:
            parts = [piece for part in parts for piece in _cut(part, special) if piece]
        return parts


def _cut(part: str, special: str) -> list[str]:
    if part == special or special not in part:
        return [part]
    pieces = part.split(special)
    return [each for piece in pieces[:-1] for each in (piece, special)] + [pieces[-1]]


def _repeated(tag: str, node: Node, *, text: str, where: str) -> str:
    """How often a triggered tag may come, and the text after the last."""
    at_least_one = _flag(node, "at_least_one", where=where)
    if _flag(node, "stop_after_first", where=where):
        return tag if at_least_one else f"{tag} |{text}"
    return f"{tag}{'+' if at_least_one else '*'}{text}"


def _flag(node: Node, name: str, *, where: str) -> bool:
    value = node.get(name, False)
    if not isinstance(value, bool):
        raise MalformedTagError(f"{where}.{name} must be true or false")
    return value


def _object(value: object, *, where: str) -> Node:
    if not isinstance(value, dict):
        raise MalformedTagError(f"{where} must be an object")
    return value


def _list(node: Node, name: str, *, where: str) -> list[object]:
    value = node.get(name)
    if not isinstance(value, list) or not value:
        raise MalformedTagError(f"{where}.{name} must be an array that is not empty")
    return value


def _string(value: object, *, where: str) -> str:
    if not isinstance(value, str) or not value:
        raise MalformedTagError(f"{where} must hold strings that are not empty")
    return value


def _text(node: Node, name: str, *, where: str) -> str:
    value = node.get(name)
    if not isinstance(value, str):
        raise MalformedTagError(f"{where}.{name} must be a string")
    return value


def _only(node: Node, *names: str, where: str) -> None:
    unknown = [name for name in node if name not in names]
    if unknown:
        raise MalformedTagError(f"{where} has {str(unknown[0])[:40]!r}, which is not known here")
