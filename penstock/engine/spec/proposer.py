"""Who guesses in the runner: what a draft model, or heads on the model's own hidden states, must offer.

The scheduler says how many guesses each sequence gets (`UNKNOWN_DRAFT` in the plan); the runner asks the
proposer to fill them in before the pass that verifies them, and tells it of all that moves blocks.
`draft_model` implements it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.plan import BlockCopy, NewSequence, Proposal, ScheduledSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Guesses:
    """A step's sequences with their guesses."""

    sequences: Sequence[ScheduledSequence]
    """As planned, with tokens in place of every `UNKNOWN_DRAFT`; fewer where fewer could be guessed."""
    proposals: list[Proposal]
    """The same guesses alone."""
    num_caught_up_tokens: int
    """Old tokens that had to be read first, beyond two a sequence."""


class RunnerProposer(Protocol):
    """See the module. Called by the runner alone, in the order of the plans."""

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside weights and KV."""
        ...

    def add(self, new_sequences: Iterable[NewSequence]) -> None:
        """Meet sequences."""
        ...

    def forget(self, seq_ids: Iterable[SequenceId]) -> None:
        """Drop sequences; ids that were never met are ignored."""
        ...

    def move_blocks(self, *, copies: Sequence[BlockCopy], zeroed: Sequence[int]) -> None:
        """What the step does to blocks before it computes."""
        ...

    def release(self) -> None:
        """Give memory back until `restore`; all KV is lost, and every sequence begins anew."""
        ...

    def restore(self) -> None:
        """Take it again."""
        ...

    def fill(self, sequences: Sequence[ScheduledSequence]) -> Guesses:
        """Guess for every sequence whose drafts are unknown; notes the tokens of all."""
        ...

    def warm_up(self, sequences: Sequence[ScheduledSequence]) -> None:
        """Run a pass like this one, so that no request meets a first time."""
        ...
