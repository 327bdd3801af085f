"""Calls spelled as JSON objects: `{"name": "f", "arguments": {...}}`, whatever stands around them.

The keys may come in any order; arguments that come before the name are held back until it is known.
"""

from typing import ClassVar

from penstock.text.cursor import MalformedError, Reading
from penstock.text.json_scanner import JsonScanner
from penstock.text.tool_parsers.parser import ToolParser


class JsonToolParser(ToolParser):
    """Reads one call object at a time; subclasses find where it begins and what follows it."""

    name_keys: ClassVar[frozenset[str]] = frozenset({"name"})
    argument_keys: ClassVar[frozenset[str]] = frozenset({"arguments", "parameters"})
    other_keys: ClassVar[frozenset[str] | None] = None
    """Further keys that a call may have; None: any, since something else marks it as a call."""
    may_lack_arguments: ClassVar[bool] = True
    """Whether an object with a tool's name alone is a call; not where nothing else marks it as one."""

    def _read_call(self) -> Reading[None]:
        """Take one call object, from behind its opening brace on.

        Raises:
            MalformedError: it is none; or it is none any more, and the call has been announced.
        """
        call = _Call()
        yield from self._read_members(call)
        if not call.name or not (call.has_arguments or self.may_lack_arguments):
            raise MalformedError("this is not a call")
        if not call.has_arguments:
            self._announce(call.name)
            self._argue("{}")
        self._end_call()

    def _read_array(self) -> Reading[None]:
        """Take call objects, from behind their opening bracket; what follows a bad one is content.

        Raises:
            MalformedError: the first one is none.
        """
        cursor = self.cursor
        while True:
            yield from cursor.skip_space()
            yield from cursor.expect("{")
            yield from self._read_call()
            if self.is_ended:
                return
            cursor.hold()
            yield from cursor.skip_space()
            if (yield from cursor.match("]")):
                cursor.drop()
                return
            yield from cursor.expect(",")

    def _read_members(self, call: "_Call") -> Reading[None]:
        cursor = self.cursor
        yield from cursor.skip_space()
        is_first = True
        while not (yield from cursor.match("}")):
            if not is_first:
                yield from cursor.expect(",")
                yield from cursor.skip_space()
            is_first = False
            yield from self._read_member(call)
            yield from cursor.skip_space()

    def _read_member(self, call: "_Call") -> Reading[None]:
        cursor = self.cursor
        key = yield from self._read_string()
        yield from cursor.skip_space()
        yield from cursor.expect(":")
        yield from cursor.skip_space()
        if key in self.name_keys and not call.name:
            yield from self._read_name(call)
        elif key in self.argument_keys and not call.has_arguments:
            yield from self._read_arguments(call)
        elif self.other_keys is None or key in self.other_keys:
            yield from self._copy_json(_nowhere)
        else:
            raise MalformedError("a call has no such key")

    def _read_name(self, call: "_Call") -> Reading[None]:
        if not call.is_nested and (yield from self.cursor.match("{")):
            call.is_nested = (
                True  # once, as in OpenAI's form: nesting without end would be recursion without end
            )
            yield from self._read_members(call)
            return
        name = yield from self._read_string()
        if name not in self.schemas:
            raise MalformedError("no tool of the request has this name")
        call.name = name
        if call.has_arguments:
            self._announce(name)
            self._argue_all("".join(call.early))

    def _read_arguments(self, call: "_Call") -> Reading[None]:
        """An object streams; text that holds an object, or null for none, is converted."""
        first = yield from self.cursor.peek()
        call.has_arguments = True
        if first == "{":
            if call.name:
                self._announce(call.name)
            yield from self._copy_json(self._argue if call.name else call.early.append)
            self._is_argued = True
            return
        if first == '"':
            call.early.append(_object_in((yield from self._read_string())))
        elif (yield from self.cursor.match("null")):
            call.early.append("{}")
        else:
            raise MalformedError("arguments are an object")
        if call.name:
            self._announce(call.name)
            self._argue_all("".join(call.early))

    def _argue_all(self, text: str) -> None:
        self._argue(text)
        self._is_argued = True


class _Call:
    """What is known of the call that is being read."""

    __slots__ = ("early", "has_arguments", "is_nested", "name")

    def __init__(self) -> None:
        self.name = ""
        self.early: list[str] = []
        self.has_arguments = False
        self.is_nested = False


def _nowhere(_text: str) -> None:
    """Members that no client is told of."""


def _object_in(text: str) -> str:
    """`text` if it is a JSON object as a whole.

    Raises:
        MalformedError: it is none.
    """
    inner = text.strip(" \t\r\n") or "{}"
    parts: list[str] = []
    scanner = JsonScanner(parts.append)
    end = scanner.scan(inner, 0)
    if not inner.startswith("{") or not scanner.is_done or end < len(inner):
        raise MalformedError("arguments are an object")
    return "".join(parts)
