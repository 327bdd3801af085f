"""Checks one JSON value as it comes and says where it ends; what it passes on is valid JSON so far.

Strict (RFC 8259) but for one mercy: a line end or other control character inside a string, which models
write, becomes its escape. Keys may repeat. Not a decoder: nothing is built, so memory is the nesting alone.
Used by `tool_parsers`.
"""

import re
from collections.abc import Callable
from typing import Final

MAX_DEPTH: Final = 64
"""Arrays and objects inside each other, as for request bodies."""

_PLAIN: Final = re.compile(r'[^"\\\x00-\x1f]*')
_ESCAPES: Final = frozenset('"\\/bfnrt')
_HEX: Final = frozenset("0123456789abcdefABCDEF")
_DIGITS: Final = frozenset("0123456789")
_WORDS: Final = {"t": "true", "f": "false", "n": "null"}
_CONTROLS: Final = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}

_NUMBER: Final[dict[str, tuple[tuple[frozenset[str], str], ...]]] = {
    "minus": ((frozenset("0"), "zero"), (frozenset("123456789"), "int")),
    "zero": ((frozenset("."), "dot"), (frozenset("eE"), "exp")),
    "int": ((_DIGITS, "int"), (frozenset("."), "dot"), (frozenset("eE"), "exp")),
    "dot": ((_DIGITS, "frac"),),
    "frac": ((_DIGITS, "frac"), (frozenset("eE"), "exp")),
    "exp": ((frozenset("+-"), "sign"), (_DIGITS, "power")),
    "sign": ((_DIGITS, "power"),),
    "power": ((_DIGITS, "power"),),
}
_NUMBER_BEGINS: Final = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "int")}
_NUMBER_ENDS: Final = frozenset({"zero", "int", "frac", "power"})


class JsonScanner:
    """The state after a part of one value.

    ```
    value --{--> first_key --"--> (string) --> colon --:--> value --> after --,--> key
    value --[--> first_item ...                               after --} or ]--> after, or done
    ```
    """

    __slots__ = ("_emit", "_is_key", "_num_hex", "_stack", "_state", "_word", "is_bad", "is_done")

    def __init__(self, emit: Callable[[str], None]) -> None:
        """Begin a value; `emit` gets its text, piece by piece."""
        self._emit = emit
        self._stack: list[str] = []
        self._state = "value"
        self._word = ""
        self._num_hex = 0
        self._is_key = False
        self.is_done = False
        self.is_bad = False

    def scan(self, text: str, begin: int) -> int:
        """Take `text` from `begin`, up to the end of the value or to what is not JSON; returns where."""
        pos, start = begin, begin
        while pos < len(text) and not (self.is_done or self.is_bad):
            if self._state == "string":
                found = _PLAIN.match(text, pos)
                assert found is not None
                pos = found.end()
                if pos == len(text):
                    break
            elif self._state in _NUMBER:
                if self._number(text[pos]):
                    pos += 1
                continue
            char = text[pos]
            if self._state == "string" and char < " ":
                self._emit(text[start:pos] + _CONTROLS.get(char, f"\\u{ord(char):04x}"))
                pos = start = pos + 1
            elif self._step(char):
                pos += 1
        if pos > start:
            self._emit(text[start:pos])
        return pos

    def finish(self) -> None:
        """The text has ended: a number may then be complete, anything else is not."""
        if self._state in _NUMBER_ENDS and not self._stack:
            self.is_done = True
        self.is_bad = not self.is_done

    def _step(self, char: str) -> bool:
        """One character outside of numbers; True if it is taken."""
        step: Callable[[str], str | None] = getattr(self, f"_at_{self._state}")
        if char in " \t\r\n" and self._state not in {"string", "escape", "hex", "word"}:
            return True
        state = step(char)
        if state is None:
            self.is_bad = True
            return False
        self._state = state
        return True

    def _at_value(self, char: str) -> str | None:
        if char == '"':
            self._is_key = False
            return "string"
        if char in "{[":
            if len(self._stack) == MAX_DEPTH:
                return None
            self._stack.append(char)
            return "first_key" if char == "{" else "first_item"
        if char in _WORDS:
            self._word = _WORDS[char][1:]
            return "word"
        return _NUMBER_BEGINS.get(char)

    def _at_first_item(self, char: str) -> str | None:
        return self._closed() if char == "]" else self._at_value(char)

    def _at_first_key(self, char: str) -> str | None:
        return self._closed() if char == "}" else self._at_key(char)

    def _at_key(self, char: str) -> str | None:
        self._is_key = True
        return "string" if char == '"' else None

    def _at_colon(self, char: str) -> str | None:
        return "value" if char == ":" else None

    def _at_after(self, char: str) -> str | None:
        top = self._stack[-1]
        if char == ",":
            return "key" if top == "{" else "value"
        return self._closed() if top + char in {"{}", "[]"} else None

    def _at_string(self, char: str) -> str | None:
        if char == "\\":
            return "escape"
        return "colon" if self._is_key else self._ended()

    def _at_escape(self, char: str) -> str | None:
        if char == "u":
            self._num_hex = 4
            return "hex"
        return "string" if char in _ESCAPES else None

    def _at_hex(self, char: str) -> str | None:
        if char not in _HEX:
            return None
        self._num_hex -= 1
        return "hex" if self._num_hex else "string"

    def _at_word(self, char: str) -> str | None:
        if char != self._word[0]:
            return None
        self._word = self._word[1:]
        return "word" if self._word else self._ended()

    def _number(self, char: str) -> bool:
        """One character in or behind a number; True if it belongs to it."""
        for chars, state in _NUMBER[self._state]:
            if char in chars:
                self._state = state
                return True
        if self._state in _NUMBER_ENDS:
            self._state = self._ended()
        else:
            self.is_bad = True
        return False

    def _closed(self) -> str:
        self._stack.pop()
        return self._ended()

    def _ended(self) -> str:
        self.is_done = not self._stack
        return "after"
