"""A sequence of our own: one token on the scratch block, which no request can reach.

If it fails too, a fault is no request's. It also stands for any step where only the shape of one counts.
"""

from typing import Final

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.plan import ScheduledSequence

CANARY: Final = SequenceId(-1)


def make_canary(*, scratch_block: int, num_groups: int) -> ScheduledSequence:
    """The sequence for a pool with so many cache groups."""
    return ScheduledSequence(CANARY, [0], 0, ([scratch_block],) * num_groups)
