"""Which adapter each slot holds now. The scheduler decides it, in the plan; a pass reads it."""

from collections.abc import Callable, Sequence

from penstock.engine.scheduler.plan import AdapterBinding
from penstock.kernels.adapters import AdapterWeights


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
