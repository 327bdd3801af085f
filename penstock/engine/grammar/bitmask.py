"""The masks of a step, for the rows that have a grammar; the others cost nothing.

`core.step` fills once the step before is applied and hands the masks on to the step's draws.
"""

from collections.abc import Container, Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.constraint import Constraint, Mask
from penstock.engine.scheduler.plan import StepPlan


class _Rows(NamedTuple):
    """Where the masks of one sequence lie in the buffer."""

    seq_id: SequenceId
    constraint: Constraint
    draft_token_ids: list[int]
    first: int

    @property
    def end(self) -> int:
        """One past its last row."""
        return self.first + 1 + len(self.draft_token_ids)


class StepMasks:
    """`MaskSource` of one step."""

    def __init__(self, buffer: npt.NDArray[np.int32], first_rows: Mapping[SequenceId, int]) -> None:
        self._buffer = buffer
        self._first_rows = first_rows

    def row(self, seq_id: SequenceId, *, depth: int = 0) -> Mask | None:
        """See `MaskSource`."""
        first = self._first_rows.get(seq_id)
        if first is None:
            return None
        mask: Mask = self._buffer[first + depth]
        return mask


class MaskFiller:
    """Fills masks into one buffer, which grows to what a step needed at most."""

    def __init__(self, *, num_words: int) -> None:
        """Take no memory yet.

        Args:
            num_words: of a mask, 32 tokens each; at least what llguidance and the model need.
        """
        self._buffer = np.zeros((0, num_words), np.int32)

    @property
    def num_bytes(self) -> int:
        """Bytes that stay between steps."""
        return self._buffer.nbytes

    def fill(
        self,
        plan: StepPlan,
        constraints: Mapping[SequenceId, Constraint],
        *,
        void: Container[SequenceId] = (),
    ) -> StepMasks | None:
        """Compute the masks of every row that a constrained sequence draws from; None without any.

        With asynchrony the model runs meanwhile. On a CPU it takes every core: a thread that filled while it
        ran made a step of 32 guided rows 1 % longer on two cores.

        Args:
            plan: whose samples and drafts need masks.
            constraints: of the running sequences that have one.
            void: sequences that draw nothing after all.
        """
        if not constraints:
            return None
        needed = _rows_of(plan, constraints, void=void)
        num_rows = needed[-1].end if needed else 0
        if num_rows > len(self._buffer):
            self._buffer = np.zeros((2 ** (num_rows - 1).bit_length(), self._buffer.shape[1]), np.int32)
        for rows in needed:
            part = self._buffer[rows.first : rows.end]
            rows.constraint.fill(part, draft_token_ids=rows.draft_token_ids)
        return StepMasks(self._buffer, {rows.seq_id: rows.first for rows in needed})


def _rows_of(
    plan: StepPlan, constraints: Mapping[SequenceId, Constraint], *, void: Container[SequenceId]
) -> list[_Rows]:
    needed: list[_Rows] = []
    for entry in plan.sequences:
        drafts = entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
        for spec in entry.samples:
            constraint = constraints.get(spec.seq_id)
            if constraint is not None and spec.seq_id not in void:
                first = needed[-1].end if needed else 0
                needed.append(_Rows(spec.seq_id, constraint, drafts, first))
    return needed
