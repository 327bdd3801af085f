"""A step of decodes as one native call, over memory that stays; `recorded` makes it, the runner runs it.

A pass over the weights leaves nothing else in the caches: Python and torch between two native calls cost 40
to 180 microseconds a piece. So a step writes its numbers into the arrays of the batch that this was made for,
brings its draws along, and reads tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.adapters import AdapterRows
from penstock.kernels.cpu import _native
from penstock.kernels.cpu.adapters import adapter_runs


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodePrograms:
    """What a step runs."""

    base: _native.Program
    """The layers of steps without adapters."""
    adapted: _native.Program
    head: _native.Program


class DecodePass:
    """Runs steps over the memory of one batch."""

    def __init__(
        self,
        native: _native.DecodePass,
        programs: DecodePrograms,
        *,
        logits: Tensor,
        kept: tuple[object, ...],
        note_seconds: Callable[[float], None],
    ) -> None:
        """Bind.

        Args:
            native: over the tensors of the batch.
            programs: what it runs.
            logits: [rows, vocab] float32, where each run writes them.
            kept: whatever else owns memory that `native` knows.
            note_seconds: told after each run how long the programs took.
        """
        self.logits = logits
        """Those of the last run."""
        self._native = native
        self._programs = programs
        self._kept = kept
        self._note_seconds = note_seconds

    def run(
        self, *, adapters: tuple[AdapterRows, ...] = (), draws: _native.PreparedDraws | None = None
    ) -> list[int]:
        """Layers, head, and the draws, whose arrays then hold what was drawn.

        Args:
            adapters: runs of rows that have one.
            draws: what is drawn; None draws nothing.

        Returns:
            The rows whose hidden states are not finite, rising.
        """
        programs = self._programs
        layers = programs.adapted if adapters else programs.base
        bad_rows = self._native.run(layers, programs.head, adapter_runs(adapters), draws)
        self._note_seconds(self._native.program_seconds)
        return bad_rows
