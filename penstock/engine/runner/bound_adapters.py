"""Which adapter each slot holds now, and which rows of a step use it.

The scheduler decides both, in the plan; a pass reads them.
"""

from collections.abc import Callable, Sequence

from penstock.engine.lora.slots import NO_SLOT
from penstock.engine.scheduler.plan import AdapterBinding, ScheduledSequence
from penstock.kernels.adapters import AdapterRows, AdapterWeights


class BoundAdapters:
    """See the module."""

    def __init__(self, *, num_slots: int, weights_of: Callable[[str], AdapterWeights] | None) -> None:
        """Bind nothing.

        Args:
            num_slots: different adapters in one step, 0 without adapters.
            weights_of: of a version that a plan binds; None without adapters.
        """
        self._weights_of = weights_of
        self._slots: list[AdapterWeights | None] = [None] * num_slots

    @property
    def slots(self) -> Sequence[AdapterWeights | None]:
        """The weights in each slot."""
        return self._slots

    def bind(self, bindings: Sequence[AdapterBinding]) -> None:
        """Change slots, before the pass that uses them."""
        for binding in bindings:
            assert self._weights_of is not None, "a plan binds adapters only where they are enabled"
            self._slots[binding.slot] = self._weights_of(binding.revision) if binding.revision else None


def adapter_rows(
    sequences: Sequence[ScheduledSequence], *, adapters: Sequence[AdapterWeights | None]
) -> tuple[AdapterRows, ...]:
    """Runs of rows by adapter; neighbours that have the same one are one run.

    Example: sequences of 3, 1 and 2 tokens in the slots -1, 5 and 5 give one run, rows 3 to 5.
    """
    if not adapters:
        return ()
    runs: list[AdapterRows] = []
    row, last_slot = 0, NO_SLOT
    for seq in sequences:
        num_rows = len(seq.token_ids)
        if seq.adapter_slot != NO_SLOT:
            weights = adapters[seq.adapter_slot]
            assert weights is not None, "a sequence uses a slot that holds nothing"
            first = runs.pop().first_row if seq.adapter_slot == last_slot else row
            runs.append(AdapterRows(first_row=first, num_rows=row + num_rows - first, weights=weights))
        row, last_slot = row + num_rows, seq.adapter_slot
    return tuple(runs)
