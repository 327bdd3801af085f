"""The tokens that the latest step drew: the next one computes them where the plan could not know them.

`step_draws` notes them, `forward` and the runner read them.
"""

from collections.abc import Iterable, Sequence
from typing import Final

from msgspec.structs import replace

from penstock.core.ids import SequenceId
from penstock.engine.runner.device_batch import LastDrawn
from penstock.engine.sampling.sampler import Outcome
from penstock.engine.scheduler.plan import PENDING_TOKEN, SampledToken, ScheduledSequence

ANY_TOKEN: Final = 0
"""Of a sequence whose outcome is discarded."""


class LastTokens:
    """Known to the host, or lying on the device whose queue still draws them: never both."""

    def __init__(self) -> None:
        self._known: dict[SequenceId, int] = {}
        self.on_device = LastDrawn()

    def note(self, outcomes: Iterable[Outcome]) -> None:
        """The host knows what was drawn."""
        self._known = {each.seq_id: each.token_id for each in outcomes if isinstance(each, SampledToken)}
        self.on_device = LastDrawn()

    def note_queued(self, drawn: LastDrawn) -> None:
        """The draws are under way on the device."""
        self._known, self.on_device = {}, drawn

    def clear(self) -> None:
        """Nothing was drawn."""
        self.note_queued(LastDrawn())

    def put_in_place(self, sequences: Sequence[ScheduledSequence]) -> Sequence[ScheduledSequence]:
        """The same with the tokens that the host knows in place of `PENDING_TOKEN`.

        A sequence for which the step before drew nothing has failed: whatever is computed for it is
        discarded. Tokens that lie on a device are put in place there.
        """
        if not any(seq.token_ids[0] == PENDING_TOKEN for seq in sequences):
            return sequences
        return [
            replace(seq, token_ids=[self._known.get(seq.seq_id, ANY_TOKEN)])
            if seq.token_ids[0] == PENDING_TOKEN and seq.seq_id not in self.on_device.rows
            else seq
            for seq in sequences
        ]
