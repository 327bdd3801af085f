"""Steps of plain decodes on the native kernels: one call between their inputs and their tokens.

The runner asks first here, and takes the general path where it gets None: a prefill, drafts, prompt logprobs
or pooling in the step, more than one draw from a row, a model that is not recorded, an open profile.

```
fill arrays, prepare draws --> [ layers | head | finite? | draws ] --> read tokens
```

The draws assume that no mask comes and that nobody's draw is void, which is known only after the launch;
where it is otherwise they are not read, and the sampler draws again from the same logits.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.engine.runner.bound_adapters import adapter_rows
from penstock.engine.runner.decode_arrays import DecodeArrays
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.plan import SampleSpec, ScheduledSequence
from penstock.kernels.adapters import AdapterWeights
from penstock.models.interface import LoadedModel

if TYPE_CHECKING:  # the extension is not there on every machine
    from torch import Tensor

    from penstock.models.decode_pass import DecodePass
    from penstock.models.recorded import RecordedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodedStep:
    """What one call left."""

    logits: "Tensor"
    """[rows, vocab] float32, until the next step."""
    bad_rows: list[int]
    """Rows whose hidden states are not finite, rising."""
    drawn: Sequence[SampleSpec] | None
    """Whose draws the sampler's `prepared_outcomes` tells; None if nothing was drawn."""


class DecodeSteps:
    """Runs such steps, on memory that is kept while their shape is the same."""

    def __init__(self, model: "RecordedModel", *, inputs: InputBatchBuilder, sampler: Sampler) -> None:
        self._model = model
        self._inputs = inputs
        self._sampler = sampler
        self._pass: tuple[DecodeArrays, DecodePass] | None = None
        """The latest, and what it lies over."""
        self.draws_ahead = True
        """False while masks come: the draws would be made twice."""

    def run(
        self, sequences: Sequence[ScheduledSequence], *, adapters: Sequence[AdapterWeights | None]
    ) -> DecodedStep | None:
        """Compute one step and draw from it; None, and nothing done, if it is not of this kind.

        Args:
            sequences: at least one.
            adapters: what the slots hold.

        Raises:
            Exception: whatever the programs raise.
        """
        if self._model.is_profiled or not all(map(_is_plain_decode, sequences)):
            return None
        decode = self._pass_for(sequences)
        specs = [seq.samples[0] for seq in sequences]
        draws = self._sampler.prepare(specs, vocab=decode.logits.shape[1]) if self.draws_ahead else None
        bad_rows = decode.run(adapters=adapter_rows(sequences, adapters=adapters), draws=draws)
        return DecodedStep(
            logits=decode.logits, bad_rows=bad_rows, drawn=specs if draws is not None else None
        )

    def _pass_for(self, sequences: Sequence[ScheduledSequence]) -> "DecodePass":
        arrays = self._inputs.fill_decodes(sequences)
        if self._pass is None or self._pass[0] is not arrays:
            self._pass = None  # gives its logits back before others are taken
            self._pass = arrays, self._model.decode_pass(self._inputs.build(sequences))
        return self._pass[1]


def decode_steps(loaded: LoadedModel, *, inputs: InputBatchBuilder, sampler: Sampler) -> DecodeSteps | None:
    """For a model that was recorded; None for others."""
    if not loaded.kernels.has_own_threads:
        return None
    # Imported here: it needs the extension module, which is there if such kernels are.
    from penstock.models.recorded import RecordedModel

    if not isinstance(loaded.model, RecordedModel):
        return None
    return DecodeSteps(loaded.model, inputs=inputs, sampler=sampler)


def _is_plain_decode(seq: ScheduledSequence) -> bool:
    return (
        len(seq.token_ids) == 1
        and len(seq.samples) == 1
        and not seq.num_drafts
        and not seq.prompt_targets
        and seq.pooling is None
    )
