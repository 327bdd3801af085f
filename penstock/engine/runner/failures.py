"""How a sequence's fault is told to the scheduler, and with it to the client."""

import logging
from collections.abc import Sequence

from penstock.core.ids import SequenceId
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.scheduler.plan import OUT_OF_MEMORY, ScheduledSequence, SequenceFailure

log = logging.getLogger("penstock.engine.runner")


def owners(seq: ScheduledSequence) -> Sequence[SequenceId]:
    """Who is answered if `seq` fails: all that draw from it, or itself."""
    return [spec.seq_id for spec in seq.samples] or [seq.seq_id]


def numerical_errors(seq: ScheduledSequence) -> list[SequenceFailure]:
    """NaN or infinity in its hidden states."""
    message = "the model's activations are not finite numbers"
    return [SequenceFailure(seq_id, "numerical_error", message) for seq_id in owners(seq)]


def short_of_memory(sequences: Sequence[ScheduledSequence]) -> list[SequenceFailure]:
    """No fault of theirs: the scheduler plans them again, in a smaller step."""
    return [_short_of_memory(seq_id) for seq in sequences for seq_id in owners(seq)]


def step_error(seq_id: SequenceId, *, error: Exception, place: str) -> SequenceFailure:
    """What was raised for a sequence alone.

    The client reads the kind of the error; its text, which may tell more, goes to the log.

    Args:
        seq_id: who fails.
        error: what was raised.
        place: "model" or "sampler".
    """
    if is_out_of_memory(error):
        return _short_of_memory(seq_id)
    log.error("the %s failed for sequence %d", place, seq_id, exc_info=error)
    message = f"the {place} failed for this sequence: {type(error).__name__}"
    return SequenceFailure(seq_id, "step_error", message)


def _short_of_memory(seq_id: SequenceId) -> SequenceFailure:
    return SequenceFailure(seq_id, OUT_OF_MEMORY, "there was not enough memory")
