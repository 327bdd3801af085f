"""Llama 3.2 and 4: a Python list of calls with literals, `[f(city="Paris", days=3), g()]`.

The literals become JSON as they come. What Python has and JSON has not (sets, names, sums) is no call.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Final

from penstock.text.cursor import MalformedError, Reading
from penstock.text.tool_parsers.lark import LarkWriter
from penstock.text.tool_parsers.members import Member, members_of
from penstock.text.tool_parsers.parser import ToolParser

START: Final = "<|python_start|>"
END: Final = "<|python_end|>"
MAX_DEPTH: Final = 32
_NUMBER: Final = re.compile(r"[0-9a-zA-Z+\-._]*")
_WORDS: Final = {
    "True": "true",
    "False": "false",
    "None": "null",
    "true": "true",
    "false": "false",
    "null": "null",
}
_PLAIN: Final = {"'": re.compile(r"[^'\\\n]*"), '"': re.compile(r'[^"\\\n]*')}
_ESCAPES: Final = {"n": "\\n", "t": "\\t", "r": "\\r", "b": "\\b", "f": "\\f", '"': '\\"', "\\": "\\\\"}
_HEX_DIGITS: Final = {"x": 2, "u": 4, "U": 8}


class PythonicParser(ToolParser):
    """A list at the beginning of the answer, or behind `<|python_start|>`."""

    name = "pythonic"
    markers = (START, END)

    @classmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """See `ToolParser`; arguments come in the order of the schema, as JSON, which is read too."""
        first = _chain(lark, members_of(schema), num_rules=lark.num_rules)
        return " ".join((lark.text(f"{name}("), first, lark.text(")")))

    @classmethod
    def calls_rule(cls, lark: LarkWriter, call: str, *, is_parallel: bool) -> None:
        """See `ToolParser`."""
        more = f" ({lark.text(', ')} {call})*" if is_parallel else ""
        lark.rule("calls", f"{lark.text('[')} {call}{more} {lark.text(']')}")

    def _parse(self) -> Reading[None]:
        while not self.is_ended:
            marker = yield from self._find_call((START,), at_gap=("[",))
            if not marker:
                return
            if (yield from self._try(self._list(marker))):
                yield from self._skip_close((END,))

    def _list(self, marker: str) -> Reading[None]:
        cursor = self.cursor
        if marker == START:
            yield from cursor.skip_space()
            yield from cursor.expect("[")
        while True:
            yield from cursor.skip_space()
            yield from self._call()
            if self.is_ended:
                return
            cursor.hold()
            yield from cursor.skip_space()
            if (yield from cursor.match("]")):
                return
            yield from cursor.expect(",")

    def _call(self) -> Reading[None]:
        """Announced behind the first `name=`, so that other Python is told from a call."""
        cursor = self.cursor
        name = yield from self._take_name()
        if name not in self.schemas:
            raise MalformedError("no tool of the request has this name")
        yield from cursor.expect("(")
        is_first = True
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.match(")")):
                break
            key = yield from self._key()
            if is_first:
                self._announce(name)
            self._argue(("{" if is_first else ", ") + json.dumps(key) + ": ")
            is_first = False
            yield from self._value(0)
            yield from self._comma(")")
        if is_first:
            self._announce(name)
        self._argue("{}" if is_first else "}")
        self._end_call()

    def _key(self) -> Reading[str]:
        key = yield from self._take_name()
        yield from self.cursor.skip_space()
        yield from self.cursor.expect("=")
        if not key:
            raise MalformedError("an argument has no name")
        return key

    def _comma(self, close: str) -> Reading[None]:
        """Behind an item: a comma, or the end, which is not taken."""
        yield from self.cursor.skip_space()
        if (yield from self.cursor.peek()) != close:
            yield from self.cursor.expect(",")

    def _value(self, depth: int) -> Reading[None]:
        cursor = self.cursor
        yield from cursor.skip_space()
        first = yield from cursor.peek()
        if depth > MAX_DEPTH:
            raise MalformedError("literals are nested too deeply")
        if first in _PLAIN:
            yield from self._string(self._argue)
        elif first == "[":
            yield from self._items("]", depth)
        elif first == "(":
            yield from self._items(")", depth)
        elif first == "{":
            yield from self._dict(depth)
        else:
            self._argue(_scalar((yield from cursor.take(_NUMBER, num_chars_max=64))))

    def _items(self, close: str, depth: int) -> Reading[None]:
        cursor = self.cursor
        yield from cursor.next()
        separator = "["
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.match(close)):
                break
            self._argue(separator)
            separator = ", "
            yield from self._value(depth + 1)
            yield from self._comma(close)
        self._argue("[]" if separator == "[" else "]")

    def _dict(self, depth: int) -> Reading[None]:
        cursor = self.cursor
        yield from cursor.next()
        separator = "{"
        while True:
            yield from cursor.skip_space()
            if (yield from cursor.match("}")):
                break
            if (yield from cursor.peek()) not in _PLAIN:
                raise MalformedError("a key is a string")
            self._argue(separator)
            separator = ", "
            yield from self._string(self._argue)
            yield from cursor.skip_space()
            yield from cursor.expect(":")
            self._argue(": ")
            yield from self._value(depth + 1)
            yield from self._comma("}")
        self._argue("{}" if separator == "{" else "}")

    def _string(self, emit: Callable[[str], None]) -> Reading[None]:
        """A Python string without prefix, as a JSON string."""
        quote = yield from self.cursor.next()
        emit('"')
        scanner = _StringScanner(quote, emit)
        yield from self.cursor.copy(scanner.scan)
        yield from self.cursor.expect(quote)
        emit('"')


class _StringScanner:
    """Passes on the inside of a Python string as JSON; ends before the quote, or before what is wrong."""

    __slots__ = ("_digits", "_emit", "_is_escape", "_num_digits", "_plain")

    def __init__(self, quote: str, emit: Callable[[str], None]) -> None:
        self._plain = _PLAIN[quote]
        self._emit = emit
        self._is_escape = False
        self._digits = ""
        self._num_digits = 0

    def scan(self, text: str, begin: int) -> int:
        pos = begin
        while pos < len(text):
            if self._num_digits:
                if not self._digit(text[pos]):
                    return pos
            elif self._is_escape:
                self._escape(text[pos])
            else:
                found = self._plain.match(text, pos)
                assert found is not None
                self._emit(json.dumps(found.group(), ensure_ascii=False)[1:-1])
                pos = found.end()
                if pos == len(text) or text[pos] != "\\":
                    return pos
                self._is_escape = True
            pos += 1
        return pos

    def _escape(self, char: str) -> None:
        self._is_escape = False
        if char in _HEX_DIGITS:
            self._num_digits = _HEX_DIGITS[char]
        elif char != "\n":  # a backslash before the end of a line joins the lines
            self._emit(_ESCAPES.get(char, char if char in "'/" else f"\\\\{json.dumps(char)[1:-1]}"))

    def _digit(self, char: str) -> bool:
        if char not in "0123456789abcdefABCDEF":
            return False
        self._digits += char
        if len(self._digits) == self._num_digits:
            code = min(int(self._digits, 16), 0x10FFFF)
            self._emit(json.dumps(chr(code))[1:-1])
            self._digits, self._num_digits = "", 0
        return True


def _scalar(text: str) -> str:
    """A number or a constant as JSON.

    Raises:
        MalformedError: it is neither.
    """
    if text in _WORDS:
        return _WORDS[text]
    try:
        return str(int(text))
    except ValueError:
        pass
    try:
        value = float(text)
    except ValueError:
        raise MalformedError("this is not a literal") from None
    if not math.isfinite(value):
        raise MalformedError("JSON has no such number")
    return repr(value)


def _chain(lark: LarkWriter, members: list[Member], *, num_rules: int) -> str:
    """Rules for `a=1, c=3`: members in order, those that are not required may be missing; returns the first.

    Each place has two rules, for whether something stands before it.
    """
    first, later = '""', '""'
    for index in reversed(range(len(members))):
        member = members[index]
        value = lark.rule(f"value_{num_rules}_{index}", lark.schema(member.schema))
        key = lark.text(f"{member.name}=")
        begin = f"{key} {value} {later}"
        follow = f"{lark.text(', ')} {begin}"
        if not member.is_required:
            begin, follow = f"{begin} | {first}", f"{follow} | {later}"
        first = lark.rule(f"first_{num_rules}_{index}", begin)
        later = lark.rule(f"later_{num_rules}_{index}", follow)
    return first
