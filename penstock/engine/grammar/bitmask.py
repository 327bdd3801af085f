"""The masks of a step, for the rows that have a grammar; the others cost nothing.

`core.step` begins a fill before the model runs and hands the masks on when the step is collected.
"""

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
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

    def __init__(
        self,
        buffer: npt.NDArray[np.int32],
        first_rows: Mapping[SequenceId, int],
        filled: "Future[None]",
    ) -> None:
        self._buffer = buffer
        self._first_rows = first_rows
        self._filled = filled

    def row(self, seq_id: SequenceId, *, depth: int = 0) -> Mask | None:
        """See `MaskSource`."""
        first = self._first_rows.get(seq_id)
        if first is None:
            return None
        self._filled.result()
        return self._buffer[first + depth]

    def wait(self) -> None:
        """Until every mask is filled: the matchers must not move before."""
        self._filled.result()


class MaskFiller:
    """Fills masks into one buffer, which grows to what a step needed at most."""

    def __init__(self, *, num_words: int) -> None:
        """Take no memory yet.

        Args:
            num_words: of a mask, 32 tokens each; at least what llguidance and the model need.
        """
        self._buffer = np.zeros((0, num_words), np.int32)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="penstock-masks")

    @property
    def num_bytes(self) -> int:
        """Bytes that stay between steps."""
        return self._buffer.nbytes

    def fill(self, plan: StepPlan, constraints: Mapping[SequenceId, Constraint]) -> StepMasks | None:
        """Begin to compute the masks of every row that a constrained sequence draws from; None without any.

        Args:
            plan: whose samples and drafts need masks.
            constraints: of the running sequences that have one.
        """
        if not constraints:
            return None
        needed = _rows_of(plan, constraints)
        num_rows = needed[-1].end if needed else 0
        if num_rows > len(self._buffer):
            self._buffer = np.zeros((2 ** (num_rows - 1).bit_length(), self._buffer.shape[1]), np.int32)
        filled = self._thread.submit(_fill, self._buffer, needed)
        return StepMasks(self._buffer, {rows.seq_id: rows.first for rows in needed}, filled)


def _fill(buffer: npt.NDArray[np.int32], needed: list[_Rows]) -> None:
    """In the filler's thread, while the model runs: llguidance releases the GIL, and so do the kernels."""
    for rows in needed:
        part = buffer[rows.first : rows.end]
        rows.constraint.fill(part, draft_token_ids=rows.draft_token_ids)


def _rows_of(plan: StepPlan, constraints: Mapping[SequenceId, Constraint]) -> list[_Rows]:
    needed: list[_Rows] = []
    for entry in plan.sequences:
        drafts = entry.token_ids[len(entry.token_ids) - entry.num_drafts :]
        for spec in entry.samples:
            constraint = constraints.get(spec.seq_id)
            if constraint is not None:
                first = needed[-1].end if needed else 0
                needed.append(_Rows(spec.seq_id, constraint, drafts, first))
    return needed
