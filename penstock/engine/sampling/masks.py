"""Who says which tokens a row may draw: filled by `engine/grammar`, read by the runner."""

from typing import Protocol

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.constraint import Mask


class MaskSource(Protocol):
    """The masks of one step; asked for while the step is collected."""

    def row(self, seq_id: SequenceId, *, depth: int = 0) -> Mask | None:
        """What `seq_id` may draw after `depth` of its drafts; None if it may draw anything.

        The array is valid until the step is applied.
        """
        ...


def joined(mask: Mask | None, allowed: Mask | None) -> Mask | None:
    """The tokens that both allow."""
    if mask is None or allowed is None:
        return allowed if mask is None else mask
    return mask[: len(allowed)] & allowed
