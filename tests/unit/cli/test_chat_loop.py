"""`penstock chat`: commands, history, errors and an interrupted answer."""

import asyncio
import io
from collections.abc import AsyncGenerator, Iterator, Sequence

import pytest
from rich.console import Console

from penstock.cli.chat import AnswerClock, Chat, Conversation
from penstock.cli.talk import TalkError
from penstock.core.params import SamplingParams
from penstock.core.text import Message


class ScriptedPartner:
    """Says `pieces`; raises what is among them."""

    def __init__(self, *pieces: str | BaseException) -> None:
        self.pieces = pieces
        self.asked: list[list[Message]] = []
        self.closed = 0

    async def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        self.asked.append(list(messages))
        try:
            for piece in self.pieces:
                if isinstance(piece, BaseException):
                    raise piece
                yield piece
        finally:
            self.closed += 1

    async def close(self) -> None:
        pass


class TypingConsole(Console):
    """A console whose user types the given lines."""

    def __init__(self, *lines: str | BaseException) -> None:
        super().__init__(file=io.StringIO(), width=200)
        self._typed: Iterator[str | BaseException] = iter(lines)

    def input(self, *_: object, **__: object) -> str:
        line = next(self._typed, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    @property
    def shown(self) -> str:
        assert isinstance(self.file, io.StringIO)
        return self.file.getvalue()


def _talk(
    partner: ScriptedPartner, *lines: str | BaseException, system: str | None = None
) -> tuple[Conversation, str]:
    console = TypingConsole(*lines)
    conversation = Conversation(params=SamplingParams(), system=system)
    with asyncio.Runner() as runner:
        Chat(partner, conversation=conversation, console=console).run(runner)
    return conversation, console.shown


def test_the_answer_is_shown_and_kept_in_the_history() -> None:
    partner = ScriptedPartner("Hel", "lo")
    conversation, shown = _talk(partner, "Hi", "Again")
    assert "Hello" in shown
    assert [m.content for m in partner.asked[1]] == ["Hi", "Hello", "Again"]
    assert [m.role for m in conversation.messages] == ["user", "assistant"] * 2


def test_reset_keeps_only_the_system_turn() -> None:
    partner = ScriptedPartner("x")
    _talk(partner, "Hi", "/reset", "Again", system="Be brief")
    assert [m.content for m in partner.asked[1]] == ["Be brief", "Again"]


def test_exit_ends_at_once() -> None:
    partner = ScriptedPartner("x")
    _talk(partner, "/exit", "Hi")
    assert partner.asked == []


def test_a_command_that_is_none_is_not_sent() -> None:
    partner = ScriptedPartner("x")
    _, shown = _talk(partner, "/quti", "/help", "")
    assert partner.asked == []
    assert "/quti is not a command" in shown


def test_ctrl_c_stops_the_answer_and_keeps_what_came() -> None:
    partner = ScriptedPartner("Hel", KeyboardInterrupt(), "lo")
    conversation, shown = _talk(partner, "Hi")
    assert "stopped after 1 tokens" in shown
    assert conversation.messages[-1].content == "Hel"
    assert partner.closed == 1


def test_ctrl_c_at_the_prompt_does_not_end_the_program() -> None:
    partner = ScriptedPartner("x")
    _talk(partner, KeyboardInterrupt(), "Hi")
    assert len(partner.asked) == 1


def test_an_error_is_shown_and_the_question_forgotten() -> None:
    conversation, shown = _talk(ScriptedPartner(TalkError("the server answered 503: loading")), "Hi")
    assert "the server answered 503: loading" in shown
    assert conversation.messages == []


def test_an_answer_cannot_send_escape_sequences_to_the_terminal() -> None:
    _, shown = _talk(ScriptedPartner("a\x1b[31mb\x07\x9b1m\n"), "Hi")
    assert "\x1b" not in shown
    assert "\x9b" not in shown


def test_the_summary_counts_and_times() -> None:
    times = iter([10.0, 10.5, 12.5])
    clock = AnswerClock(now=lambda: next(times))
    clock.start()
    clock.piece()
    clock.num_pieces = 5
    assert clock.summary() == "5 tokens, 2.0 tokens/s, first after 500 ms"


def test_no_piece_is_no_answer() -> None:
    assert AnswerClock().summary() == "no answer"


@pytest.mark.parametrize("line", ["  Hi  "])
def test_ends_of_a_line_are_cut(line: str) -> None:
    partner = ScriptedPartner("x")
    _talk(partner, line)
    assert partner.asked[0][0].content == "Hi"
