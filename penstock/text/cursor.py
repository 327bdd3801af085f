"""Reads a text that comes in pieces, for parsers written as if it were there as a whole.

A parser is a generator that asks a `Cursor` for characters with `yield from` and is suspended where the text
ends for now. No reading method lets a parser see where a piece ends, so the way in which a text is cut cannot
change what a parser makes of it. Time is linear in the text: no character is looked at again once it has been
taken, and a marker is compared only where its first character stands. Used by `tool_parsers` and `reasoning`.
"""

import re
from collections.abc import Callable, Generator, Sequence
from typing import Final, TypeVar

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A step of a parser: yields where more text is needed, returns its result."""

SPACE: Final = re.compile(r"[ \t\r\n]*")


class MalformedError(Exception):
    """The text, or its end, is not what the grammar of a parser says; never leaves a parser."""


class Cursor:
    """A place in a text, of which only what is not taken yet is kept, and what is held back.

    While text is held (`hold`) at most `max_held_chars` are taken; one more raises `MalformedError`.
    """

    __slots__ = ("_held", "_is_closed", "_max_held", "_num_held", "_pos", "_text", "num_scanned")

    def __init__(self, *, max_held_chars: int) -> None:
        self._text = ""
        self._pos = 0
        self._is_closed = False
        self._held: list[str] | None = None
        self._num_held = 0
        self._max_held = max_held_chars
        self.num_scanned = 0
        """Characters looked at so far, those looked at twice counted twice: the measure of work."""

    def feed(self, text: str) -> None:
        """Append a piece; called while the parser is suspended, which has then taken nearly all there was."""
        self._text = self._text[self._pos :] + text
        self._pos = 0

    def close(self) -> None:
        """No more text will come."""
        self._is_closed = True

    def hold(self, before: str = "") -> None:
        """Remember what is taken from here on, `before` first; what was held until now is forgotten."""
        self._held = [before]
        self._num_held = len(before)

    def drop(self) -> None:
        """Forget what was held; it has become something else."""
        self._held = None

    def release(self) -> str:
        """What was taken since `hold`, or nothing if that is over; holding ends."""
        held, self._held = self._held, None
        return "".join(held or ())

    def rest(self) -> str:
        """Take all there is; for a parser that wants no more."""
        text, self._text, self._pos = self._text[self._pos :], "", 0
        return text

    def peek(self) -> Reading[str]:
        """The next character, not taken; empty at the end of the text."""
        while self._pos == len(self._text):
            if self._is_closed:
                return ""
            yield
        return self._text[self._pos]

    def next(self) -> Reading[str]:
        """Take one character.

        Raises:
            MalformedError: at the end of the text.
        """
        char = yield from self.peek()
        if not char:
            raise MalformedError("the text ends")
        self._take(1)
        return char

    def match(self, literal: str) -> Reading[bool]:
        """Take `literal` if it comes next; True if so."""
        while True:
            if self._starts_with(literal):
                self._take(len(literal))
                return True
            if not self._may_become(literal):
                return False
            yield

    def match_any(self, literals: Sequence[str]) -> Reading[str]:
        """Take the first of `literals` that comes next and return it; empty if none does."""
        for literal in literals:
            if (yield from self.match(literal)):
                return literal
        return ""

    def expect(self, literal: str) -> Reading[None]:
        """Take `literal`.

        Raises:
            MalformedError: something else comes.
        """
        if not (yield from self.match(literal)):
            raise MalformedError(f"{literal!r} is missing")

    def take(self, pattern: re.Pattern[str], *, num_chars_max: int) -> Reading[str]:
        """Take characters while they match, at most so many.

        Args:
            pattern: a repeated class of characters, so that it matches in every piece what it would in the
                whole.
            num_chars_max: where to stop.
        """
        parts: list[str] = []
        room = num_chars_max
        while room and (yield from self.peek()):
            found = pattern.match(self._text, self._pos, self._pos + room)
            taken = "" if found is None else found.group()
            parts.append(taken)
            room -= len(taken)
            self._take(len(taken))
            if self._pos < len(self._text):
                break
        return "".join(parts)

    def skip_space(self) -> Reading[None]:
        """Take blanks and line ends, as JSON knows them."""
        while (yield from self.take(SPACE, num_chars_max=1024)):
            pass

    def find(self, markers: Sequence[str], emit: Callable[[str], None]) -> Reading[str]:
        """Take text up to and including the first of `markers`; empty at the end of the text.

        Of markers that begin at one place the first in order wins.

        Args:
            markers: at least one, none empty.
            emit: gets all text that belongs to no marker, as soon as that is certain.
        """
        starts = re.compile("[" + "".join(re.escape(marker[0]) for marker in markers) + "]")
        while True:
            found = starts.search(self._text, self._pos)
            self._give((len(self._text) if found is None else found.start()) - self._pos, emit)
            if found is None:
                if self._is_closed:
                    return ""
                yield
                continue
            marker = yield from self.match_any(markers)
            if marker:
                return marker
            self._give(1, emit)

    def copy(self, scan: Callable[[str, int], int]) -> Reading[None]:
        """Hand the text to `scan` until it takes less than all of it.

        Args:
            scan: gets a text and where to begin; returns where it ended, before the text's end when done.
        """
        while True:
            end = scan(self._text, self._pos)
            is_done = end < len(self._text)
            self._take(end - self._pos)
            if is_done or self._is_closed:
                return
            yield

    def _give(self, num_chars: int, emit: Callable[[str], None]) -> None:
        if num_chars:
            text = self._text[self._pos : self._pos + num_chars]
            self._take(num_chars)
            emit(text)

    def _take(self, num_chars: int) -> None:
        """Step over text; every way forward goes through here."""
        self.num_scanned += num_chars
        begin = self._pos
        if self._held is None:
            self._pos = begin + num_chars
            return
        allowed = min(num_chars, self._max_held - self._num_held)
        self._pos = begin + allowed
        self._held.append(self._text[begin : self._pos])
        self._num_held += allowed
        if allowed < num_chars:
            raise MalformedError(f"more than {self._max_held} characters are held back")

    def _starts_with(self, literal: str) -> bool:
        self.num_scanned += min(len(literal), len(self._text) - self._pos)
        return self._text.startswith(literal, self._pos)

    def _may_become(self, literal: str) -> bool:
        """Whether the text so far is a beginning of `literal`, and more may come."""
        num_left = len(self._text) - self._pos
        if self._is_closed or num_left >= len(literal):
            return False
        return literal.startswith(self._text[self._pos :])
