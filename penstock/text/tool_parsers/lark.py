"""Writes the grammars that force a call: llguidance's dialect of Lark, with JSON schemas inside.

Each parser says how one call is spelled (`ToolParser.call_rule`) and how several are joined; here that
becomes one `GrammarSpec`. Markers that are special tokens of the model are written as tokens, since no text
spells them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.text.reasoning import ReasoningStyle

_JSON_FORM: Final = {
    "whitespace_flexible": False,
    "item_separator": ", ",
    "key_separator": ": ",
    "lenient": False,
}
"""As Python writes JSON, the form that models have seen; one form, so that keys are forced."""


class LarkWriter:
    """Rules of one grammar; knows which texts are single tokens."""

    def __init__(self, special_ids: Mapping[str, int], *, skipped: str = "") -> None:
        """Begin a grammar.

        Args:
            special_ids: markers that are special tokens, with their ids.
            skipped: a marker that texts leave out, because something before them takes it.
        """
        self._special_ids = special_ids
        self._split = re.compile("(" + "|".join(map(re.escape, special_ids)) + ")") if special_ids else None
        self._rules: list[str] = []
        self._skipped = skipped
        self.num_skipped = 0
        """How often `skipped` was left out."""

    def text(self, text: str) -> str:
        """An expression for exactly this text."""
        if self._skipped and text.startswith(self._skipped):
            self.num_skipped += 1
            text = text.removeprefix(self._skipped)
        parts = [text] if self._split is None else self._split.split(text)
        return " ".join(map(self._part, filter(None, parts))) or '""'

    def is_token(self, text: str) -> bool:
        """Whether `text` is a special token of the model."""
        return text in self._special_ids

    @property
    def num_rules(self) -> int:
        """Rules so far; for names that are not taken."""
        return len(self._rules)

    def until(self, name: str, end: str) -> str:
        """Add a rule for any text up to and including the first `end`; returns its name."""
        if self.is_token(end):
            return self.rule(name, f"/(?s:.*)/ {self._part(end)}")
        self.rule(f"{name}[suffix={json.dumps(end, ensure_ascii=False)}]", "/(?s:.*)/")
        return name

    def thought(self, style: ReasoningStyle, *, is_inside: bool) -> str:
        """An expression for what is thought first; it may be missing unless the answer begins inside it."""
        blanks = self.rule("blanks", r"/\n{0,2}/")
        rest = f"{self.until('thought', style.end)} {blanks}"
        return rest if is_inside else f"({self.text(style.start)} {rest})?"

    def without(self, name: str, marker: str) -> str:
        """Add a terminal for any text that does not hold `marker`; returns its name."""
        if self.is_token(marker):  # text never holds a special token
            return self.rule(name, "/(?s:.*)/")
        return self.rule(name, f"/(?s:.*)/ & ~/(?s:.*){re.escape(marker)}(?s:.*)/")

    def schema(self, schema: object) -> str:
        """An expression for JSON that a schema allows."""
        fields = schema if isinstance(schema, dict) else {} if schema is True else {"not": {}}
        return "%json " + msgspec.json.encode({**fields, "x-guidance": _JSON_FORM}).decode()

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
