"""Named places where a test can make a step fail; production passes None and nothing is called.

The runner calls it, tests implement it. There is no global and no switch: what is not injected cannot fire.
"""

from collections.abc import Sequence
from typing import Protocol

import torch

from penstock.core.ids import SequenceId


class FaultPoints(Protocol):
    """Each method may raise, as a kernel would, or change what it is given."""

    def before_forward(self, seq_ids: Sequence[SequenceId]) -> None:
        """Before every pass of the model, repeats while a culprit is looked for included.

        Args:
            seq_ids: the sequences in the pass; empty for the canary.
        """
        ...

    def after_logits(self, logits: torch.Tensor, seq_ids: Sequence[SequenceId]) -> None:
        """After every pass that samples.

        Args:
            logits: [rows, vocab] float32, may be written to.
            seq_ids: the sequence of each row.
        """
        ...

    def before_sample(self, seq_ids: Sequence[SequenceId]) -> None:
        """Before the sampler, repeats while a culprit is looked for included.

        Args:
            seq_ids: who draws.
        """
        ...
