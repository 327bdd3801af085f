"""The recordings of decode steps that a runner has while it is awake. `cuda_graphs` says what they are."""

from collections.abc import Callable, Sequence

from penstock.engine.runner.cuda_graphs import DecodeGraphs, PassOutput
from penstock.engine.runner.device_batch import LastDrawn
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.batch import ForwardBatch


class Recordings:
    """One ladder from `renew` to `drop`; where steps are not recorded, all of it does nothing."""

    def __init__(self, make: Callable[[], DecodeGraphs] | None) -> None:
        """Begin a ladder.

        Args:
            make: makes an empty one over the memory as it lies now; None where steps are not recorded.
        """
        self._make = make
        self.graphs: DecodeGraphs | None = None
        self.renew()

    def renew(self) -> None:
        """Begin anew: steps are recorded again as the engine finds time."""
        self.graphs = None if self._make is None else self._make()

    def drop(self) -> None:
        """Forget them: they hold addresses of memory that is given back."""
        self.graphs = None

    @property
    def num_bytes(self) -> int:
        """Bytes that they hold."""
        return self.graphs.num_bytes if self.graphs else 0

    def replay(
        self, batch: ForwardBatch, *, sequences: Sequence[ScheduledSequence], last: LastDrawn
    ) -> PassOutput | None:
        """See `DecodeGraphs.replay`; None too where there are no recordings."""
        return self.graphs.replay(batch, sequences=sequences, last=last) if self.graphs else None

    def record_next(self, example: Callable[[], ForwardBatch]) -> bool:
        """See `DecodeGraphs.record_next`; the example is made only if it is used."""
        return self.graphs.record_next(example()) if self.graphs else False

    def record_at_start(self, example: Callable[[], ForwardBatch]) -> None:
        """See `DecodeGraphs.record_at_start`."""
        if self.graphs:
            self.graphs.record_at_start(example())
