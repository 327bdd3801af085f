"""Writes the grammars that force a call: llguidance's dialect of Lark, with JSON schemas inside.

Each parser says how one call is spelled (`ToolParser.call_rule`) and how several are joined; here that
becomes one `GrammarSpec`. Markers that are special tokens of the model are written as tokens, since no text
spells them.
"""

import json
import re
from collections.abc import Mapping, Sequence

import msgspec

from penstock.core.grammar import GrammarKind, GrammarSpec


class LarkWriter:
    """Rules of one grammar; knows which texts are single tokens."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        """Begin a grammar; `special_ids` maps markers that are special tokens to their ids."""
        self._special_ids = special_ids
        self._split = re.compile("(" + "|".join(map(re.escape, special_ids)) + ")") if special_ids else None
        self._rules: list[str] = []

    def text(self, text: str) -> str:
        """An expression for exactly this text."""
        parts = [text] if self._split is None else self._split.split(text)
        return " ".join(map(self._part, filter(None, parts)))

    def schema(self, schema: object) -> str:
        """An expression for JSON that a schema allows."""
        return "%json " + msgspec.json.encode(schema).decode()

    def rule(self, name: str, body: str) -> str:
        """Add a rule; returns its name."""
        self._rules.append(f"{name}: {body}")
        return name

    def one_of(self, name: str, bodies: Sequence[str]) -> str:
        """Add a rule for each body, and one that is any of them; returns its name."""
        names = [self.rule(f"{name}_{index}", body) for index, body in enumerate(bodies)]
        return self.rule(name, " | ".join(names))

    def spec(self) -> GrammarSpec:
        """The grammar so far."""
        return GrammarSpec(kind=GrammarKind.GRAMMAR, source="\n".join(self._rules) + "\n")

    def _part(self, text: str) -> str:
        token_id = self._special_ids.get(text)
        return json.dumps(text, ensure_ascii=False) if token_id is None else f"<[{token_id}]>"
