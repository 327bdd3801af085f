"""What may follow in one answer, as the scheduler and the mask filler see it.

`engine/grammar` implements it; tests may with a table. One object follows one answer: it has accepted exactly
the answer's tokens, whatever happened to the answer's blocks, so that a preemption costs it nothing.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Mask = npt.NDArray[np.int32]
"""[ceil(vocab / 32)] int32: bit `id % 32` (lowest first) of word `id // 32` is set if the token may come."""


class Constraint(Protocol):
    """See the module. The step loop alone calls it."""

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow but the end: the answer is whole."""
        ...

    @property
    def may_end(self) -> bool:
        """True if the answer would be whole if it ended here."""
        ...

    @property
    def failure(self) -> str | None:
        """Why it cannot go on: a limit of the matcher, or a token that it had not allowed; None if it can."""
        ...

    def accept(self, token_id: int) -> None:
        """Go one token forward. Called by `apply` for every token that the answer keeps, in order."""
        ...

    def forced(self) -> tuple[int, ...]:
        """The tokens that must follow, as far as there is no choice; changes nothing."""
        ...

    def num_valid(self, draft_token_ids: Sequence[int]) -> int:
        """How many of these tokens, from the first, may follow here; changes nothing."""
        ...

    def fill(self, rows: npt.NDArray[np.int32], *, draft_token_ids: Sequence[int] = ()) -> None:
        """Write what may follow here, and after each of the drafts.

        Args:
            rows: [1 + drafts, ceil(vocab / 32)] int32, C-contiguous, overwritten; see `Mask`.
            draft_token_ids: as many as `num_valid` has let pass; the state is the same afterwards.
        """
        ...

    def fork(self) -> "Constraint":
        """A second one in the same state, for another answer."""
        ...
