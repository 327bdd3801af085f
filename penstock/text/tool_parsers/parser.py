"""What all tool-call parsers share: text in, content and calls out, whatever way the text is cut.

A parser is written for one model family's way to spell a call (`hermes`, `pythonic`, ...). The laws that hold
for each of them are kept here: only a tool of the request is ever called; text that looks like a call and is
none comes out as content, so nothing is lost; what is held back is bounded; nothing is raised. Once a call
has been announced its arguments stream as they come. If they then stop being JSON, the call ends there and
the rest is content.
"""

import json
import re
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import ClassVar, Final

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.grammar import GrammarSpec
from penstock.core.text import ToolCallDelta
from penstock.text.cursor import SPACE, Cursor, MalformedError, Reading
from penstock.text.json_scanner import JsonScanner
from penstock.text.reasoning import ReasoningStyle
from penstock.text.tool_parsers.closed_schema import closed
from penstock.text.tool_parsers.lark import LarkWriter

MAX_HELD_CHARS: Final = 16_384
"""Most that is held back: a call whose arguments come before its name, or a value that is converted whole."""
MAX_GAP_CHARS: Final = 64
"""Blanks before and between calls that are taken for the format, not for content."""
NAME_CHARS: Final = re.compile(r"[a-zA-Z0-9_-]*")
MAX_NAME_CHARS: Final = 64
"""Of a tool or an argument, as in `core.tools`."""
MAX_CALLS: Final = 128
"""Calls in one answer; what looks like more is content."""


class Parsed(msgspec.Struct, frozen=True):
    """What one piece of text has become; all text before the first call of the answer comes before it."""

    content: str = ""
    calls: tuple[ToolCallDelta, ...] = ()


class ToolParser(ABC):
    """One answer's parser; a subclass spells one format in `_parse`.

    Calls are announced (`_announce`), filled (`_argue`) and ended (`_end_call`), in that order.
    """

    name: ClassVar[str]
    """As in `--tool-call-parser`."""
    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that may be special tokens of the model; they are shown to the parser all the same."""
    trigger: ClassVar[str] = ""
    """What every call of a forced answer begins with; empty if a call may look like any text."""
    separators: ClassVar[re.Pattern[str]] = SPACE
    """Characters that may stand between two calls."""
    tail: ClassVar[re.Pattern[str]] = re.compile(r"[ \t\r\n}\]]*")
    """Characters that may stand between a call and what closes it: models write a bracket too many."""

    def __init__(self, schemas: Mapping[str, Mapping[str, object]], *, is_parallel: bool = True) -> None:
        """Begin an answer.

        Args:
            schemas: tool names to JSON schemas of their arguments.
            is_parallel: False ends the answer with its first call.
        """
        self.schemas = schemas
        self.num_calls = 0
        self.is_ended = False
        """No more is wanted of this answer: it has its only call."""
        self.is_whole = True
        """False once a call has ended before its arguments did: it cannot be made."""
        self.cursor = Cursor(max_held_chars=MAX_HELD_CHARS)
        self._is_parallel = is_parallel
        self._is_calling = False
        self._is_argued = False
        """The arguments of the call that is being read are there, whatever else of it is not."""
        self._is_at_gap = True
        self._content: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self._arguments: list[str] = []
        self._reading = self._parse()
        self._is_over = self._resume()

    @classmethod
    def grammar(
        cls,
        schemas: Mapping[str, Mapping[str, object]],
        *,
        is_parallel: bool,
        special_ids: Mapping[str, int],
        thought: ReasoningStyle | None = None,
        is_inside: bool = False,
    ) -> GrammarSpec:
        """What an answer looks like that calls tools and says nothing else.

        Args:
            schemas: of the tools that may be called; at least one.
            is_parallel: whether several calls may follow each other.
            special_ids: markers that are special tokens, with their ids.
            thought: how the model marks what it may think first; None if it does not.
            is_inside: whether the answer begins inside the thought.
        """
        lark = LarkWriter(special_ids)
        first = [] if thought is None else [lark.thought(thought, is_inside=is_inside)]
        lark.rule("start", " ".join([*first, cls.add_calls(lark, schemas, is_parallel=is_parallel)]))
        return lark.spec()

    @classmethod
    def add_calls(
        cls, lark: LarkWriter, schemas: Mapping[str, Mapping[str, object]], *, is_parallel: bool
    ) -> str:
        """Add the rule for calls of these tools; returns its name."""
        bodies = [cls.call_rule(lark, name, closed(schema)) for name, schema in schemas.items()]
        call = lark.one_of("call", bodies)
        # Where the marker of each call is taken by something before it, one follows.
        cls.calls_rule(lark, call, is_parallel=is_parallel and not lark.num_skipped)
        return "calls"

    @classmethod
    def strict_grammar(
        cls,
        schemas: Mapping[str, Mapping[str, object]],
        *,
        is_parallel: bool,
        special_ids: Mapping[str, int],
    ) -> GrammarSpec:
        """What an answer looks like that says what it likes, but calls tools only as their schemas allow.

        Args:
            schemas: of all tools; of those that are not strict `{"type": "object"}`.
            is_parallel: whether there may be several calls.
            special_ids: markers that are special tokens, with their ids.

        Raises:
            InvalidParameterError: calls of this format have no marker, so text cannot be told from them.
        """
        if not cls.trigger:
            raise InvalidParameterError(
                "tools holds strict: true, with this model's format of calls that needs tool_choice required "
                "or a named function",
                param="tools",
            )
        lark = LarkWriter(special_ids, skipped=cls.trigger)
        calls = cls.add_calls(lark, schemas, is_parallel=is_parallel)
        said = f"{lark.until('said', cls.trigger)} {calls}"
        last = lark.without("LAST", cls.trigger)
        lark.rule("start", f"({said})* {last}" if is_parallel else f"{said} | {last}")
        return lark.spec()

    @classmethod
    @abstractmethod
    def call_rule(cls, lark: LarkWriter, name: str, schema: Mapping[str, object]) -> str:
        """An expression for one call of the tool `name`; further rules may be added to `lark`."""

    @classmethod
    def calls_rule(cls, lark: LarkWriter, call: str, *, is_parallel: bool) -> None:
        """Add the rule `calls`: one call, or more of them on lines of their own."""
        more = lark.text("\n")
        lark.rule("calls", f"{call} ({more} {call})*" if is_parallel else call)

    def push(self, text: str) -> Parsed:
        """Take a piece of text; return what is certain now."""
        if not self._is_over:
            self.cursor.feed(text)
            self._is_over = self._resume()
        return self._parsed()

    def finish(self) -> Parsed:
        """The answer has ended; return what was held back."""
        self.cursor.close()
        if not self._is_over:
            self._is_over = self._resume()
            assert self._is_over, "a parser waits for text after the end"
        return self._parsed()

    @abstractmethod
    def _parse(self) -> Reading[None]:
        """Read the answer to its end."""

    def make_id(self) -> str:
        """A call's id: random, so that calls of different answers differ too."""
        return "call_" + secrets.token_hex(12)

    def _resume(self) -> bool:
        return next(self._reading, True) is True

    def _parsed(self) -> Parsed:
        self._flush_arguments()
        parsed = Parsed("".join(self._content), tuple(self._calls))
        self._content.clear()
        self._calls.clear()
        return parsed

    def _flush_arguments(self) -> None:
        if self._arguments:
            self._calls.append(ToolCallDelta(self.num_calls - 1, arguments="".join(self._arguments)))
            self._arguments.clear()

    def _say(self, text: str) -> None:
        """Give text out as content."""
        if text:
            self._content.append(text)
            self._is_at_gap = False

    def _announce(self, name: str) -> None:
        """A call of `name` begins.

        Raises:
            MalformedError: there is no such tool, or there were too many calls.
        """
        if name not in self.schemas:
            raise MalformedError("no tool of the request has this name")
        if self.num_calls == MAX_CALLS:
            raise MalformedError(f"more than {MAX_CALLS} calls")
        self.cursor.drop()
        self._flush_arguments()
        self._calls.append(ToolCallDelta(self.num_calls, id=self.make_id(), name=name))
        self.num_calls += 1
        self._is_calling = True
        self._is_argued = False

    def _argue(self, text: str) -> None:
        """A piece of the arguments of the call."""
        if text:
            self._arguments.append(text)

    def _end_call(self) -> None:
        """The call is over, complete or not."""
        self._is_calling = False
        self._is_at_gap = True
        self.is_ended = not self._is_parallel

    def _give_up(self) -> None:
        """What was being read is no call: what of it is still held back is content."""
        if self._is_calling:
            self.is_whole = self.is_whole and self._is_argued
            self._end_call()
        self._say(self.cursor.release())

    def _find_call(self, markers: tuple[str, ...], *, at_gap: tuple[str, ...] = ()) -> Reading[str]:
        """Give out content up to one of `markers`, and hold from there on; empty at the end of the text.

        Blanks before a marker are held too if nothing else stands between it and the last call or the
        beginning; there, `at_gap` are markers as well.
        """
        cursor = self.cursor
        if self._is_at_gap:
            cursor.hold()
            blanks = self.separators if self.num_calls else SPACE
            yield from cursor.take(blanks, num_chars_max=MAX_GAP_CHARS)
            marker = yield from cursor.match_any((*markers, *at_gap))
            if marker:
                return marker
            gap = cursor.release()
            is_end = not (yield from cursor.peek())
            self._say("" if is_end and self.num_calls and not gap.strip() else gap)
        self._is_at_gap = False
        marker = yield from cursor.find(markers, self._say)
        if marker:
            cursor.hold(marker)
        return marker

    def _try(self, call: Reading[None]) -> Reading[bool]:
        """Read a call; if it is none, what was held is content. True if one was announced."""
        num_before = self.num_calls
        try:
            yield from call
        except MalformedError:
            self._give_up()
        else:
            self.cursor.drop()
        return self.num_calls > num_before

    def _skip_close(self, closes: tuple[str, ...]) -> Reading[None]:
        """Behind a call: take one of `closes` if it comes next, with blanks and brackets before it.

        Models forget a bracket or write one too many.
        """
        if self.is_ended:
            return
        self.cursor.hold()
        yield from self.cursor.take(self.tail, num_chars_max=MAX_GAP_CHARS)
        if (yield from self.cursor.match_any(closes)):
            self.cursor.drop()
        else:
            self._give_up()

    def _take_name(self) -> Reading[str]:
        """Take a name that is not quoted; perhaps none."""
        return (yield from self.cursor.take(NAME_CHARS, num_chars_max=MAX_NAME_CHARS))

    def _read_call_of(self, name: str) -> Reading[None]:
        """Take the arguments of a call whose name came before, a JSON object.

        Raises:
            MalformedError: they are none, or there is no such tool.
        """
        if (yield from self.cursor.peek()) != "{":
            raise MalformedError("arguments are an object")
        self._announce(name)
        yield from self._copy_json(self._argue)
        self._end_call()

    def _read_string(self, *, num_chars_max: int = MAX_HELD_CHARS) -> Reading[str]:
        """Take a JSON string and decode it.

        Raises:
            MalformedError: it is none.
        """
        if (yield from self.cursor.peek()) != '"':
            raise MalformedError("a string is missing")
        text = yield from self._read_json()
        if len(text) > num_chars_max + 2:
            raise MalformedError(f"a string has more than {num_chars_max} characters")
        return _decoded(text)

    def _read_json(self) -> Reading[str]:
        """Take a JSON value; its text.

        Raises:
            MalformedError: it is none.
        """
        parts: list[str] = []
        yield from self._copy_json(parts.append)
        return "".join(parts)

    def _copy_json(self, emit: Callable[[str], None]) -> Reading[None]:
        """Take a JSON value and hand its text on as it comes.

        Raises:
            MalformedError: it is none; what was handed on is a part of one.
        """
        scanner = JsonScanner(emit)
        yield from self.cursor.copy(scanner.scan)
        if not scanner.is_done:
            scanner.finish()
        if scanner.is_bad:
            raise MalformedError("this is not JSON")


def _decoded(text: str) -> str:
    r"""The value of a JSON string; half of a surrogate pair, which is no text, becomes U+FFFD."""
    value: str = json.loads(text)
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
