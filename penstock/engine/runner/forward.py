"""One pass of the model: inputs, hidden states, logits.

```
sequences --+-- decode_steps    one native call, draws and all        where all are plain decodes
            +-- recordings      one replay                            where the step was recorded
            +-- inputs > model > head                                 otherwise
```

A pass is repeatable: it reads the plan and the KV of earlier tokens, and writes the KV of the plan's own
tokens to the same slots with the same values, whoever else is in it. `step_passes` calls it.
"""

from collections.abc import Sequence
from itertools import accumulate

import torch

from penstock.engine.runner.bound_adapters import BoundAdapters
from penstock.engine.runner.canary import CANARY
from penstock.engine.runner.cuda_graphs import PassOutput
from penstock.engine.runner.decode_steps import DecodedStep, DecodeSteps
from penstock.engine.runner.device_batch import on_device
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.forward_pass import NO_LOGITS, ForwardPass, are_sound
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.inspection import Inspection
from penstock.engine.runner.last_tokens import LastTokens
from penstock.engine.runner.recordings import Recordings
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.batch import ForwardBatch
from penstock.kernels.transfer import indices
from penstock.models.interface import LoadedModel


class Forward:
    """See the module; keeps nothing between passes but what its parts do."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        inputs: InputBatchBuilder,
        adapters: BoundAdapters,
        last_tokens: LastTokens,
        decodes: DecodeSteps | None,
        recordings: Recordings,
        faults: FaultPoints | None,
    ) -> None:
        """Take the model and what goes into a pass.

        Args:
            loaded: the model.
            inputs: arranges the numbers of a step.
            adapters: the weights in the slots that sequences name.
            last_tokens: where pending tokens lie.
            decodes: steps of plain decodes as one call; None for models without.
            recordings: steps as one replay.
            faults: where tests make it fail; None in production.
        """
        self._model = loaded.model
        self._device = loaded.device
        self._is_queued = loaded.is_queued
        self._inputs = inputs
        self._adapters = adapters
        self._last_tokens = last_tokens
        self.decodes = decodes
        self._recordings = recordings
        self._faults = faults
        self._inspection = Inspection(loaded)

    def run(self, sequences: Sequence[ScheduledSequence], *, may_replay: bool = False) -> ForwardPass:
        """Compute.

        Args:
            sequences: what to compute.
            may_replay: it is the only pass of its step: outputs of a recording, or of a step of decodes as
                one call, last until the next.
        """
        if self._faults:
            self._faults.before_forward([seq.seq_id for seq in sequences if seq.seq_id != CANARY])
        elif self.decodes and may_replay:
            decoded = self.decodes.run(sequences, adapters=self._adapters.slots)
            if decoded is not None:
                return _decoded_pass(sequences, decoded)
        batch = self._inputs.build(sequences, adapters=self._adapters.slots)
        if may_replay:
            output = self._recordings.replay(batch, sequences=sequences, last=self._last_tokens.on_device)
            if output is not None:
                return self._replayed_pass(sequences, output)
        return self._launched_pass(sequences, batch)

    def _launched_pass(self, sequences: Sequence[ScheduledSequence], batch: ForwardBatch) -> ForwardPass:
        """Launch by launch."""
        if self._is_queued:
            last = self._last_tokens.on_device
            batch = on_device(batch, device=self._device, sequences=sequences, last=last)
        hidden = self._model.forward(batch)
        ends = list(accumulate(batch.groups[0].query_lens_host))
        logits = self._logits(hidden, rows=_drawing_rows(sequences, ends))
        self._hand_to_faults(sequences, logits)
        return self._inspection.look_at(sequences, hidden=hidden, ends=ends, logits=logits)

    def _logits(self, hidden: torch.Tensor, *, rows: Sequence[int]) -> torch.Tensor:
        """Scores of some rows, without a copy where they are all, as in a step of decodes."""
        if not rows:
            return NO_LOGITS
        is_all = len(rows) == len(hidden)
        taken = hidden if is_all else hidden.index_select(0, indices(rows, device=self._device))
        return self._model.logits(taken)

    def _replayed_pass(self, sequences: Sequence[ScheduledSequence], output: PassOutput) -> ForwardPass:
        """A recorded step of decodes, whose head has scored every row."""
        rows = [row for row, seq in enumerate(sequences) if seq.samples]
        is_all = len(rows) == len(sequences)
        logits = output.logits if is_all else output.logits[indices(rows, device=self._device)]
        self._hand_to_faults(sequences, logits)
        ends = list(range(1, len(sequences) + 1))
        return self._inspection.look_at(
            sequences, hidden=output.hidden, ends=ends, logits=logits, bad_rows=output.bad_rows
        )

    def _hand_to_faults(self, sequences: Sequence[ScheduledSequence], logits: torch.Tensor) -> None:
        if self._faults:
            owners = [seq.seq_id for seq in sequences if seq.samples for _ in range(1 + seq.num_drafts)]
            self._faults.after_logits(logits, owners)


def _drawing_rows(sequences: Sequence[ScheduledSequence], ends: Sequence[int]) -> list[int]:
    """The last row of every sequence that draws, and those of the drafts before it."""
    return [
        row
        for end, seq in zip(ends, sequences, strict=True)
        if seq.samples
        for row in range(end - 1 - seq.num_drafts, end)
    ]


def _decoded_pass(sequences: Sequence[ScheduledSequence], decoded: DecodedStep) -> ForwardPass:
    """A step of plain decodes, which has looked for bad rows and may have drawn already."""
    ends = range(1, len(sequences) + 1)
    return ForwardPass(
        sequences=sequences,
        ends=ends,
        is_sound=are_sound(decoded.bad_rows, ends),
        logits=decoded.logits,
        drawn=decoded.drawn,
    )
