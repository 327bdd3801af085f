"""The passes of a step: one, unless somebody raises.

A fault stays with the sequence that causes it. An exception in the model is traced by repeating the work on
halves of the batch, which is safe: see `forward`, and blocks are zeroed and copied once, before the first
pass. Want of memory is no fault: caches are emptied and the halves are tried. What cannot be had even for one
sequence alone is told as `OUT_OF_MEMORY`, and the scheduler plans it again in a smaller step.
"""

from collections.abc import Sequence
from typing import NamedTuple

from penstock.core.errors import EngineDeadError
from penstock.engine.bisection import Culprit, isolate
from penstock.engine.runner.failures import owners, step_error
from penstock.engine.runner.forward import Forward
from penstock.engine.runner.forward_pass import ForwardPass
from penstock.engine.runner.memory_shortage import MemoryShortage
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.scheduler.plan import ScheduledSequence, SequenceFailure


class Computed(NamedTuple):
    """What came of a step's sequences."""

    passes: Sequence[ForwardPass]
    """In plan order."""
    failures: Sequence[SequenceFailure]


class StepPasses:
    """See the module."""

    def __init__(
        self, forward: Forward, *, canary: ScheduledSequence, shortage: MemoryShortage, is_alone: bool
    ) -> None:
        """Take who computes.

        Args:
            forward: one pass.
            canary: a sequence that cannot be at fault.
            shortage: told of want of memory.
            is_alone: False if other ranks compute every pass too: it is then never repeated, since they would
                not repeat it, and what raises in it is the end of the engine.
        """
        self._forward = forward
        self._canary = canary
        self._shortage = shortage
        self._is_alone = is_alone

    def compute(self, sequences: Sequence[ScheduledSequence]) -> Computed:
        """Compute a step's sequences, at least one.

        Raises:
            EngineDeadError: the model fails for every sequence, and so does the canary; or other ranks
                compute too.
        """
        if not self._is_alone:
            return Computed([self._compute_once(sequences)], [])

        def attempt(part: Sequence[ScheduledSequence]) -> ForwardPass:
            return self._forward.run(part, may_replay=part is sequences)

        done = isolate(sequences, attempt=attempt, on_error=self._shortage.relieve_if_short)
        self._refuse_engine_fault(done.culprits, num_sequences=len(sequences))
        failures = [
            step_error(seq_id, error=culprit.error, place="model")
            for culprit in done.culprits
            for seq_id in owners(culprit.member)
        ]
        return Computed(done.parts, failures)

    def _compute_once(self, sequences: Sequence[ScheduledSequence]) -> ForwardPass:
        try:
            return self._forward.run(sequences)
        except Exception as error:
            raise EngineDeadError(
                f"a pass over several ranks failed and cannot be repeated: {type(error).__name__}"
            ) from error

    def _refuse_engine_fault(
        self, culprits: Sequence[Culprit[ScheduledSequence]], *, num_sequences: int
    ) -> None:
        """Let single culprits pass; raise if nothing works any more.

        Who lacked memory is planned again. Of the others the canary alone decides. Steps without a survivor
        are not counted: a few bad requests, each the only one at its time, would end the engine for
        everybody, and a new process would fail for them as well.
        """
        if len(culprits) < num_sequences or any(is_out_of_memory(each.error) for each in culprits):
            return
        if not self._canary_lives():
            raise EngineDeadError(
                f"all {num_sequences} sequences of a step failed, and so did a sequence of our own"
            ) from culprits[0].error

    def _canary_lives(self) -> bool:
        return not isolate([self._canary], attempt=self._forward.run).culprits
