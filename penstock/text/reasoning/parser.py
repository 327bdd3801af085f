"""Divides an answer into what the model thinks and what it says, whatever way the text is cut.

The thought stands between two tags, `<think>` and `</think>` for most models, before everything else. Many
chat templates write the opening tag into the prompt; then the answer begins inside the thought. A thought
that is never closed takes the whole answer. Used by `answer_reader`.
"""

import re
from collections.abc import Callable
from typing import Final

import msgspec

from penstock.text.cursor import Cursor, Reading

MAX_GAP_CHARS: Final = 64
"""Blanks before the opening tag, and line ends behind a tag, that belong to the tags."""
_SPACE: Final = re.compile(r"[ \t\r\n]*")
_LINE_ENDS: Final = re.compile(r"[\r\n]*")


class ReasoningStyle(msgspec.Struct, frozen=True, kw_only=True):
    """How a model family marks its thoughts."""

    start: str = "<think>"
    end: str = "</think>"
    begins_inside: bool = False
    """Whether every answer begins inside the thought, even where the prompt does not end with `start`."""

    def is_inside(self, prompt_tail: str) -> bool:
        """Whether an answer behind a prompt that ends so begins inside the thought."""
        tail = prompt_tail.rstrip()
        if tail.endswith(self.end):
            return False
        return self.begins_inside or tail.endswith(self.start)


class ReasoningParser:
    """One answer's parser: `push` gives what is thought and what is said."""

    __slots__ = ("_content", "_reading", "_reasoning", "_style", "cursor", "is_over")

    def __init__(self, style: ReasoningStyle, *, is_inside: bool) -> None:
        """Begin an answer, inside or before the thought."""
        self.cursor = Cursor(max_held_chars=2 * MAX_GAP_CHARS + len(style.start))
        self.is_over = False
        """The thought has ended, or there is none: all further text is said."""
        self._style = style
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._reading = self._parse(is_inside=is_inside)
        next(self._reading, None)

    def push(self, text: str) -> tuple[str, str]:
        """Take a piece of text; what of it is thought and what is said, as far as that is certain."""
        if self.is_over:
            return "", text
        self.cursor.feed(text)
        return self._resume()

    def finish(self) -> tuple[str, str]:
        """The answer has ended; what was held back."""
        self.cursor.close()
        return ("", "") if self.is_over else self._resume()

    def _resume(self) -> tuple[str, str]:
        if next(self._reading, True) is True:
            self.is_over = True
            self._content.append(self.cursor.rest())
        parts = "".join(self._reasoning), "".join(self._content)
        self._reasoning.clear()
        self._content.clear()
        return parts

    def _parse(self, *, is_inside: bool) -> Reading[None]:
        cursor, style = self.cursor, self._style
        cursor.hold()
        yield from cursor.take(_SPACE, num_chars_max=MAX_GAP_CHARS)
        is_open = yield from cursor.match(style.start)
        if not (is_open or is_inside):
            self._content.append(cursor.release())
            return
        gap = cursor.release()
        if not is_open:
            self._reasoning.append(gap.lstrip("\r\n"))
        yield from self._skip_line_ends()
        yield from self._read_thought(self._reasoning.append)
        yield from self._skip_line_ends()

    def _read_thought(self, emit: Callable[[str], None]) -> Reading[None]:
        end = self._style.end
        yield from self.cursor.find((f"\n{end}", end), emit)

    def _skip_line_ends(self) -> Reading[None]:
        yield from self.cursor.take(_LINE_ENDS, num_chars_max=MAX_GAP_CHARS)
