"""Reads one answer's text for its parts: what is thought, what is said, which tools are called.

Joins a reasoning parser and a tool parser, either of which may be absent. Made by `reading` for requests
that want it; used by `answer`.
"""

import msgspec

from penstock.core.text import ToolCallDelta
from penstock.text.reasoning import ReasoningParser
from penstock.text.tool_parsers import Parsed, ToolParser

_NOTHING = Parsed()


class Shown(msgspec.Struct, frozen=True):
    """What a piece of text has become; false if it is nothing yet."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.text or self.reasoning or self.tool_calls)

    def __add__(self, other: "Shown") -> "Shown":
        if not self:
            return other
        return Shown(
            self.text + other.text, self.reasoning + other.reasoning, self.tool_calls + other.tool_calls
        )


class AnswerReader:
    """State of one answer; see the module."""

    __slots__ = ("_is_named", "_reasoning", "_shows_reasoning", "_tools")

    def __init__(
        self,
        *,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        shows_reasoning: bool = True,
        is_named: bool = False,
    ) -> None:
        """Join the parsers.

        Args:
            reasoning: of this answer, None if thoughts are not told from the rest.
            tools: of this answer, None if it cannot call any.
            shows_reasoning: False leaves thoughts out.
            is_named: the client has named the tool to call, so that a call is nothing to be told of.
        """
        self._reasoning = reasoning
        self._tools = tools
        self._shows_reasoning = shows_reasoning
        self._is_named = is_named

    @property
    def is_ended(self) -> bool:
        """Nothing more of the answer is wanted."""
        return self._tools is not None and self._tools.is_ended

    @property
    def ends_with_calls(self) -> bool:
        """Whether the end of the answer is that tools be called.

        Not if the client named it, as at OpenAI; nor if a call was cut, which cannot be made.
        """
        tools = self._tools
        return tools is not None and tools.num_calls > 0 and tools.is_whole and not self._is_named

    def push(self, text: str) -> Shown:
        """Take a piece of the answer's text; return what is certain now."""
        reasoning = ""
        if self._reasoning is not None:
            reasoning, text = self._reasoning.push(text)
        parsed = Parsed(text) if self._tools is None else self._tools.push(text) if text else _NOTHING
        return self._shown(reasoning, parsed)

    def finish(self) -> Shown:
        """The answer has ended; return what was held back."""
        reasoning, text = ("", "") if self._reasoning is None else self._reasoning.finish()
        if self._tools is None:
            return self._shown(reasoning, Parsed(text))
        first, last = self._tools.push(text), self._tools.finish()
        return self._shown(reasoning, Parsed(first.content + last.content, first.calls + last.calls))

    def _shown(self, reasoning: str, parsed: Parsed) -> Shown:
        return Shown(parsed.content, reasoning if self._shows_reasoning else "", parsed.calls)
