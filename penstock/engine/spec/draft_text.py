"""What a draft model knows of one sequence: its tokens, how far it has read them, and where.

A *mark* stands for the text up to the end of a block; equal texts have equal marks. `draft_model` has one
of these for each sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MARK_MASK: Final = (1 << 62) - 1


@dataclass(slots=True, kw_only=True)
class DraftText:
    """See the module."""

    prompt: list[int]
    """The request's own list; only read."""
    outputs: list[int] = field(default_factory=list)
    """The answer so far; the last few may be guesses that did not stand, until the next step says so."""
    num_read: int = 0
    """Tokens whose KV the draft has written."""
    blocks: list[int] = field(default_factory=list)
    """Where: the model's block ids at that time."""
    marks: list[int] = field(default_factory=list)
    """Mark of the text up to the end of each full block."""
    has_failed: bool = False
    """The draft cannot compute it: nothing more is guessed."""

    def __len__(self) -> int:
        return len(self.prompt) + len(self.outputs)

    def slice(self, start: int, end: int) -> list[int]:
        """Tokens at positions [start, end)."""
        num_prompt = len(self.prompt)
        if start >= num_prompt:
            return self.outputs[start - num_prompt : end - num_prompt]
        return self.prompt[start:end] + self.outputs[: max(0, end - num_prompt)]

    def note(self, token_ids: Sequence[int], *, start: int) -> None:
        """The tokens from `start` on are these, and nothing is known behind them."""
        skipped = max(0, len(self.prompt) - start)
        first = max(0, start - len(self.prompt))
        del self.outputs[first:]
        self.outputs.extend(token_ids[skipped:])

    def mark(self, block_idx: int, *, block_size: int) -> int:
        """Mark of the text up to the end of a full block; computed once."""
        while len(self.marks) <= block_idx:
            idx = len(self.marks)
            before = self.marks[-1] if idx else 1
            tokens = self.slice(idx * block_size, (idx + 1) * block_size)
            self.marks.append(hash((before, *tokens)) & MARK_MASK | 1)
        return self.marks[block_idx]
