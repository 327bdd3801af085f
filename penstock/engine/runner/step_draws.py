"""The draws of a step: begun between its launch and the next, read when it is collected.

On the host both happen at once. Where passes run behind a queue the draws are put into it too, unless some
sequence has drafts: what is drawn behind a draft depends on whether the draft stands.
"""

import time
from collections.abc import Collection, Sequence

from penstock.core.ids import SequenceId
from penstock.engine.runner.device_draws import DeviceDraws, QueuedPass, ReadPass
from penstock.engine.runner.failures import numerical_errors, short_of_memory, step_error
from penstock.engine.runner.forward_pass import ForwardPass, are_sound
from penstock.engine.runner.host_draws import HostDraws
from penstock.engine.runner.last_tokens import LastTokens
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.sampling.sampler import Outcome, Sampler
from penstock.engine.scheduler.plan import SampledToken
from penstock.engine.spec.verify import Draw


class StepDraws:
    """See the module."""

    def __init__(
        self, sampler: Sampler, *, host: HostDraws, queue: DeviceDraws | None, last_tokens: LastTokens
    ) -> None:
        """Take who draws.

        Args:
            sampler: counts the tokens that a device drew.
            host: draws at once.
            queue: draws on a device; None if passes return with their results.
            last_tokens: told of every step's draws.
        """
        self._sampler = sampler
        self._host = host
        self._queue = queue
        self._last_tokens = last_tokens

    def start(self, handle: StepHandle, *, masks: MaskSource | None, void: Collection[SequenceId]) -> None:
        """Draw, on a device only as far as it can be queued.

        Args:
            handle: takes the outcomes, or what was started.
            masks: what the sequences may draw; None allows all of them everything.
            void: sequences for which nothing is drawn.
        """
        if self._queue and not any(seq.num_drafts for done in handle.passes for seq in done.sequences):
            queued = [_queued(done, void=void) for done in handle.passes]
            handle.started = self._queue.start(queued, masks=masks)
            self._last_tokens.note_queued(handle.started.last)
            return
        outcomes: list[Outcome] = list(handle.failures)
        for done in handle.passes:
            outcomes.extend(self._host.draw(done, masks=masks, void=void))
        handle.outcomes = outcomes
        self._last_tokens.note(outcomes)

    def give_up(self, handle: StepHandle) -> None:
        """There was no memory for the draws: all that were computed are computed once more."""
        sequences = [seq for done in handle.passes for seq in done.sequences]
        handle.outcomes = [*handle.failures, *short_of_memory(sequences)]
        handle.passes, handle.started = [], None
        self._last_tokens.clear()

    def read(self, handle: StepHandle) -> Sequence[Outcome]:
        """What was drawn; waits for a device, whose tokens are counted here."""
        if handle.outcomes is not None or self._queue is None or handle.started is None:
            return handle.outcomes or ()
        outcomes: list[Outcome] = list(handle.failures)
        for done, read in zip(handle.passes, self._queue.read(handle.started), strict=True):
            outcomes.extend(_outcomes_in_order(done, read))
        handle.ended_s = time.perf_counter()
        self._sampler.commit(each for each in outcomes if isinstance(each, SampledToken))
        handle.outcomes = outcomes
        return outcomes


def _queued(done: ForwardPass, *, void: Collection[SequenceId]) -> QueuedPass:
    """A pass for `DeviceDraws`."""
    assert done.bad_rows is not None, "a queue finds them with every pass"
    drawing = [seq for seq in done.sequences if seq.samples]
    draws = [
        Draw(spec, row) for row, seq in enumerate(drawing) for spec in seq.samples if spec.seq_id not in void
    ]
    return QueuedPass(logits=done.logits, bad_rows=done.bad_rows, draws=draws)


def _outcomes_in_order(done: ForwardPass, read: ReadPass) -> list[Outcome]:
    """Tokens and failures of a pass's sequences, once they are there."""
    errors = {culprit.member.spec.seq_id: culprit.error for culprit in read.culprits}
    outcomes: list[Outcome] = []
    sound = are_sound(read.bad_rows, done.ends)
    for seq, is_sound, was_sound in zip(done.sequences, sound, done.is_sound or sound, strict=True):
        if not (is_sound and was_sound):
            outcomes += numerical_errors(seq)
            continue
        for spec in seq.samples:
            if spec.seq_id in errors:
                outcomes.append(step_error(spec.seq_id, error=errors[spec.seq_id], place="sampler"))
            elif spec.seq_id in read.outcomes:
                outcomes.append(read.outcomes[spec.seq_id])
    return outcomes
