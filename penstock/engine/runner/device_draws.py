"""Draws on a device: started when a step's logits are queued, read when the step is collected.

```
draw       sampler's kernels  >  tables and flags in one buffer  >  one copy to pinned memory  >  event
collect    wait for the event, once a step  >  outcomes
```

Between the two the host plans and launches the next step, which takes its tokens out of the tables. What the
device sampler does not serve is drawn on the host, and the step waits for its logits. The runner calls it
for steps without drafts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.core.ids import SequenceId
from penstock.engine.bisection import Culprit, Isolated, isolate
from penstock.engine.runner.device_batch import LastDrawn
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.sampling.ports import TOKEN, DeviceSampler, draws_of_table
from penstock.engine.sampling.sampler import Outcome, Sampler, outcomes_of
from penstock.engine.scheduler.constraint import Mask
from penstock.engine.scheduler.plan import SampledToken
from penstock.engine.spec.verify import Draw
from penstock.kernels.transfer import host_buffer, indices, on_host

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class QueuedPass:
    """What one pass of the model leaves on the device, and who draws from it."""

    logits: Tensor
    """[rows that draw, vocab] float32"""
    bad_rows: Tensor
    """[num_tokens] bool: rows whose hidden state holds NaN or infinity."""
    draws: Sequence[Draw]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPass:
    """The same once it is known."""

    bad_rows: list[int]
    """Rising."""
    outcomes: dict[SequenceId, Outcome]
    """Of those that draw; of sequences with bad rows too, where they mean nothing."""
    culprits: Sequence[Culprit[Draw]]
    """Draws that raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Part:
    """Draws that went well together."""

    queued: Sequence[Draw]
    table: Tensor | None
    """[queued, ...] on the device; None if all were drawn on the host."""
    told: Sequence[Outcome]
    """Those drawn on the host."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartedDraws:
    """Draws of a step on their way to the host."""

    passes: Sequence[tuple[QueuedPass, Sequence[_Part], Sequence[Culprit[Draw]]]]
    buffer: Tensor
    """uint8, on the host: every table and every pass's flags, in order."""
    arrived: torch.cuda.Event | None
    last: LastDrawn


class DeviceDraws:
    """Starts draws and reads them; keeps nothing between steps."""

    def __init__(
        self,
        sampler: Sampler,
        *,
        device_sampler: DeviceSampler,
        device: torch.device,
        before_sample: Callable[[Sequence[SequenceId]], None] | None = None,
        on_error: Callable[[Exception], None],
    ) -> None:
        """Take what draws.

        Args:
            sampler: knows the sequences; draws what `device_sampler` does not serve.
            device_sampler: draws the rest.
            device: where logits lie.
            before_sample: where tests make draws fail.
            on_error: told of draws that raised, before they are tried in halves.
        """
        self._sampler = sampler
        self._on_device = device_sampler
        self._device = device
        self._before_sample = before_sample
        self._on_error = on_error

    @property
    def num_bytes(self) -> int:
        """Bytes on the device that stay between steps."""
        return self._on_device.num_bytes

    def start(self, passes: Sequence[QueuedPass], *, masks: MaskSource | None) -> StartedDraws:
        """Queue the draws of a step's passes and the copy of what they give."""
        begun = []
        for each in passes:
            taken = self._isolate(each, masks=masks)
            begun.append((each, taken.parts if taken else [], taken.culprits if taken else []))
        sent = [piece for each, parts, _ in begun for piece in _pieces(each, parts)]
        buffer, arrived = self._send(sent)
        parts = [part for _, parts, _ in begun for part in parts]
        return StartedDraws(passes=begun, buffer=buffer, arrived=arrived, last=self._last(parts))

    def _isolate(self, queued: QueuedPass, *, masks: MaskSource | None) -> Isolated[Draw, _Part] | None:
        if not queued.draws:
            return None
        return isolate(queued.draws, attempt=self._attempt(queued, masks), on_error=self._on_error)

    def read(self, started: StartedDraws) -> list[ReadPass]:
        """Wait for a step's draws: what its passes gave, in order."""
        if started.arrived is not None:
            started.arrived.synchronize()
        raw, place = started.buffer.numpy(), 0
        read = []
        for each, parts, culprits in started.passes:
            sizes = [piece.nbytes for piece in _pieces(each, parts)]
            found = np.split(raw[place : place + sum(sizes)], list(accumulate(sizes))[:-1])
            read.append(self._read_pass(parts, culprits, found))
            place += sum(sizes)
        return read

    def _read_pass(
        self, parts: Sequence[_Part], culprits: Sequence[Culprit[Draw]], found: Sequence[Bytes]
    ) -> ReadPass:
        *tables, flags = found
        outcomes: list[Outcome] = []
        arrived = iter(tables)
        for part in parts:
            outcomes.extend(part.told)
            if part.table is not None:
                outcomes.extend(self._outcomes(part.queued, next(arrived)))
        return ReadPass(
            bad_rows=np.flatnonzero(flags).tolist(),
            outcomes={outcome.seq_id: outcome for outcome in outcomes},
            culprits=culprits,
        )

    def _outcomes(self, draws: Sequence[Draw], raw: Bytes) -> list[Outcome]:
        table = raw.view(np.float64).reshape(len(draws), -1)
        specs = [draw.spec for draw in draws]
        num_top = [self._sampler.state(spec.seq_id).params.logprobs for spec in specs]
        return outcomes_of(draws_of_table(table, num_top=num_top), specs=specs)

    def _attempt(self, queued: QueuedPass, masks: MaskSource | None) -> Callable[[Sequence[Draw]], _Part]:
        def attempt(draws: Sequence[Draw]) -> _Part:
            if self._before_sample:
                self._before_sample([draw.spec.seq_id for draw in draws])
            allowed = [None if masks is None else masks.row(draw.spec.seq_id) for draw in draws]
            return self._draw(queued.logits, draws, allowed)

        return attempt

    def _draw(self, logits: Tensor, draws: Sequence[Draw], masks: Sequence[Mask | None]) -> _Part:
        states = [self._sampler.state(draw.spec.seq_id) for draw in draws]
        is_served = [
            self._on_device.serves(state, output_idx=draw.spec.output_idx, mask=mask)
            for draw, state, mask in zip(draws, states, masks, strict=True)
        ]
        served = [i for i, each in enumerate(is_served) if each]
        rest = [i for i, each in enumerate(is_served) if not each]
        table = None
        if served:
            table = self._on_device.draw(
                logits,
                rows=[draws[i].row for i in served],
                states=[states[i] for i in served],
                output_idxs=[draws[i].spec.output_idx for i in served],
                masks=[masks[i] for i in served],
            )
        told = self._on_host(logits, [draws[i] for i in rest], [masks[i] for i in rest]) if rest else []
        return _Part(queued=[draws[i] for i in served], table=table, told=told)

    def _on_host(self, logits: Tensor, draws: Sequence[Draw], masks: Sequence[Mask | None]) -> list[Outcome]:
        """Wait for these rows' logits and draw now."""
        rows = on_host(logits.index_select(0, indices([draw.row for draw in draws], device=self._device)))
        return self._sampler.sample(rows, specs=[draw.spec for draw in draws], masks=masks)

    def _send(self, pieces: Sequence[Tensor]) -> tuple[Tensor, torch.cuda.Event | None]:
        """The bytes of tensors on their way to the host, and the event that says that they are there."""
        if not pieces:
            return torch.empty(0, dtype=torch.uint8), None
        joined = torch.cat([piece.reshape(-1).view(torch.uint8) for piece in pieces])
        if self._device.type != "cuda":
            return joined, None
        buffer = host_buffer(joined.nbytes, device=self._device).copy_(joined, non_blocking=True)
        arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here
        arrived.record()
        return buffer, arrived

    def _last(self, parts: Sequence[_Part]) -> LastDrawn:
        """Where the next step finds the tokens: first those drawn on the device, then those of the host."""
        tables = [part.table[:, TOKEN].long() for part in parts if part.table is not None]
        told = [
            outcome
            for outcome in chain.from_iterable(part.told for part in parts)
            if isinstance(outcome, SampledToken)
        ]
        if told:
            tables.append(indices([outcome.token_id for outcome in told], device=self._device))
        ids = [draw.spec.seq_id for part in parts for draw in part.queued] + [each.seq_id for each in told]
        return LastDrawn(
            rows={seq_id: row for row, seq_id in enumerate(ids)},
            tokens=torch.cat(tables) if tables else None,
        )


def _pieces(queued: QueuedPass, parts: Sequence[_Part]) -> list[Tensor]:
    """What a pass sends to the host: its tables, then its flags."""
    return [*(part.table for part in parts if part.table is not None), queued.bad_rows]
