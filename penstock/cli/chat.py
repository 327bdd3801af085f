"""`penstock chat`: talk in the terminal. Ctrl-C stops the answer, not the program; /help lists commands."""

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console

from penstock.cli.talk import Partner, Thought
from penstock.core.errors import PenstockError
from penstock.core.params import SamplingParams
from penstock.core.text import Message

HELP: Final = "/reset forgets the conversation, /exit (or Ctrl-D) ends, Ctrl-C stops an answer"
_CONTROLS: Final = {code: None for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
"""An answer must not move the cursor or colour the terminal."""


@dataclass(slots=True, kw_only=True)
class AnswerClock:
    """Times one answer; pieces stand for tokens, which a server sends one by one."""

    now: Callable[[], float] = time.perf_counter
    start_s: float = 0.0
    first_s: float | None = None
    num_pieces: int = 0

    def start(self) -> None:
        """The question goes out."""
        self.start_s = self.now()

    def piece(self) -> None:
        """A non-empty piece came."""
        self.num_pieces += 1
        if self.first_s is None:
            self.first_s = self.now()

    def summary(self) -> str:
        """One line: pieces, speed after the first, time to the first."""
        if self.first_s is None:
            return "no answer"
        span_s = self.now() - self.first_s
        speed = (
            f"{(self.num_pieces - 1) / span_s:.1f} tokens/s, " if span_s > 0 and self.num_pieces > 1 else ""
        )
        return f"{self.num_pieces} tokens, {speed}first after {(self.first_s - self.start_s) * 1e3:.0f} ms"


@dataclass(slots=True, kw_only=True)
class Conversation:
    """The turns so far and how the next one is sampled. Mutated by `Chat`."""

    params: SamplingParams
    system: str | None = None
    messages: list[Message] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system turn."""
        self.messages = [Message(role="system", content=self.system)] if self.system else []


class Chat:
    """The loop: read a line, obey it or answer it."""

    def __init__(self, partner: Partner, *, conversation: Conversation, console: Console) -> None:
        self._partner = partner
        self._conversation = conversation
        self._console = console
        conversation.reset()

    def run(self, runner: asyncio.Runner) -> None:
        """Until /exit or the end of the input.

        Args:
            runner: its loop carries every answer; a Ctrl-C during one cancels that alone.
        """
        self._console.print(HELP, style="dim")
        while (line := self._read()) is not None:
            if line == "/exit":
                return
            if line == "/help":
                self._console.print(HELP, style="dim")
            elif line == "/reset":
                self._conversation.reset()
                self._console.print("forgotten", style="dim")
            elif line.startswith("/"):
                self._console.print(f"{line.split()[0]} is not a command: {HELP}", style="dim", markup=False)
            elif line:
                self._answer(line, runner)

    def _read(self) -> str | None:
        """A line without its ends, "" after Ctrl-C, None at the end of the input."""
        try:
            return self._console.input("[bold]> [/]").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            self._console.print("\n/exit ends", style="dim")
            return ""

    def _answer(self, line: str, runner: asyncio.Runner) -> None:
        messages = self._conversation.messages
        messages.append(Message(role="user", content=line))
        pieces: list[str] = []
        clock = AnswerClock()
        try:
            runner.run(self._stream(pieces, clock))
            note = clock.summary()
        except KeyboardInterrupt:
            note = f"stopped after {clock.num_pieces} tokens"
        except PenstockError as error:
            messages.pop()
            self._console.print(f"\n{error.message}", style="red", markup=False)
            return
        messages.append(Message(role="assistant", content="".join(pieces)))
        self._console.print(f"\n{note}", style="dim", highlight=False)

    async def _stream(self, pieces: list[str], clock: AnswerClock) -> None:
        clock.start()
        answer = self._partner.answer(self._conversation.messages, self._conversation.params)
        is_thought = False
        async with aclosing(answer) as stream:
            async for piece in stream:
                if not piece:
                    continue
                clock.piece()
                self._show(piece, follows_thought=is_thought and not isinstance(piece, Thought))
                is_thought = isinstance(piece, Thought)
                if not is_thought:
                    pieces.append(piece)

    def _show(self, piece: str, *, follows_thought: bool) -> None:
        style = "dim" if isinstance(piece, Thought) else None
        shown = ("\n" if follows_thought else "") + piece.translate(_CONTROLS)
        self._console.print(shown, end="", style=style, markup=False, highlight=False, soft_wrap=True)
