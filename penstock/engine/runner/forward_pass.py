"""What one pass of the model leaves for the draws.

`forward` computes it and `inspection` looks it through; `host_draws` and `step_draws` read it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch

from penstock.engine.runner.pooling import PoolPart
from penstock.engine.scheduler.plan import PromptLogprobs, SampleSpec, ScheduledSequence

NO_LOGITS: Final = torch.empty(0, 0)
"""Of a pass that samples nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """See the module."""

    sequences: Sequence[ScheduledSequence]
    ends: Sequence[int]
    """For each sequence one past its last row."""
    is_sound: Sequence[bool] | None
    """[len(sequences)]: False if a hidden state of the sequence is NaN or infinite; None where
    `bad_rows` alone tells, on a device that nobody has waited for."""
    bad_rows: torch.Tensor | None = None
    """[rows] bool on the device, True where a row is not finite; None without a queue."""
    logits: torch.Tensor
    """[sequences with samples and their drafts, vocab] float32"""
    prompt_logprobs: Sequence[PromptLogprobs] = ()
    """Of sound sequences."""
    pools: Sequence[PoolPart] = ()
    """Of sound sequences."""
    drawn: Sequence[SampleSpec] | None = None
    """Whose tokens were drawn with the pass, without masks; None if nothing was."""

    def soundness(self) -> Sequence[bool]:
        """`is_sound`, waited for where a device has not told yet."""
        if self.is_sound is not None:
            return self.is_sound
        assert self.bad_rows is not None, "one of the two tells"
        return are_sound(self.bad_rows.nonzero().flatten().tolist(), self.ends)


def are_sound(bad_rows: Sequence[int], ends: Sequence[int]) -> list[bool]:
    """For each sequence: True where no number of its rows is NaN or infinite.

    Every row counts, not only the sampled ones: a prefill chunk's blocks must not reach the prefix tree.

    Args:
        bad_rows: those that hold such a number, rising.
        ends: for each sequence one past its last row, rising.
    """
    verdicts = [True] * len(ends)
    for row in bad_rows:
        verdicts[bisect_right(ends, row)] = False
    return verdicts
