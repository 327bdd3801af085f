"""Decode steps as recorded launches: one call replays a whole pass, whatever the number of its kernels.

A recording holds addresses, grids and sizes, so it is made for a *rung*: a number of rows and a length up to
which contexts may go. A step of decodes takes the smallest rung that holds it; rows that are missing are
filled with one-token contexts on the scratch block. Its inputs lie in one buffer that belongs to the rung, so
that they arrive in one transfer. All rungs leave what they give in the same tensors, as large as the largest
step: to keep the logits of each apart would take gigabytes.

```
rows     1  2  4  8 16 24 32 .. 64  80 .. 256  288 ..  max_num_seqs
length   1024  4096  16384  65536  ..  max_model_len       bounds the grid of attention over long contexts
```

Where adapters are enabled there are two recordings of each such size, without them and with them: a plain
step pays nothing for those that others use. The recording with adapters reads from tables which rows use
which, and where their matrices lie; so adapters may come, go and be replaced between two replays.

A step runs launch by launch where its rung is not recorded, or where it computes more than one token of a
sequence. Recordings are made in warm-up for as long as `RECORD_AT_START_S`
lasts, the shortest contexts first, and the others when the engine has nothing to do: a request waits for one
of them at most. Of each length the one with the most rows is first: smaller ones find room in what it took,
where in the order of their rows each would take memory of its own.

The runner calls it. `Recorder` is the seam to CUDA; `CudaRecorder` has not run on a device yet.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, product
from typing import Final, NamedTuple, Protocol

import torch
from torch import Tensor

from penstock.engine.runner.device_batch import LastDrawn, tensors_of, with_tensors
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.scheduler.plan import ScheduledSequence
from penstock.kernels.adapters import AdapterTables
from penstock.kernels.batch import AttentionBatch, ForwardBatch
from penstock.kernels.ops import KernelSet, not_finite
from penstock.kernels.transfer import ALIGNMENT, fill, host_buffer, indices, views_like
from penstock.models.interface import CausalLM

FIRST_LENGTH: Final = 1024
LENGTH_FACTOR: Final = 4
RECORD_AT_START_S: Final = 5.0
"""Of the time until the engine is ready, for recordings."""
log = logging.getLogger("penstock.engine.runner")

PAD_LENGTH: Final = 1
"""Context of a row that nobody owns."""


class Rung(NamedTuple):
    """What a recording is made for."""

    length: int
    """Tokens that a context may have at most, the step's own included."""
    num_rows: int
    has_adapters: bool = False
    """Some rows may use one."""


def row_ladder(max_num_seqs: int) -> tuple[int, ...]:
    """Numbers of rows: close together where rows are many, since what is padded costs work."""
    steps = [1, 2, 4, *range(8, 65, 8), *range(80, 257, 16), *range(288, max_num_seqs + 32, 32)]
    return (*(rows for rows in steps if rows < max_num_seqs), max_num_seqs)


def length_ladder(max_model_len: int) -> tuple[int, ...]:
    """Context lengths, each `LENGTH_FACTOR` times the one before it."""
    lengths, length = [], FIRST_LENGTH
    while length < max_model_len:
        lengths.append(length)
        length *= LENGTH_FACTOR
    return (*lengths, max_model_len)


class Replayable(Protocol):
    """A recording."""

    def replay(self) -> None:
        """Queue everything that was recorded."""
        ...


class Recorder(Protocol):
    """Who makes recordings."""

    @property
    def num_bytes(self) -> int:
        """Memory that recordings hold."""
        ...

    def record(self, run: Callable[[], None]) -> Replayable:
        """Record what `run` launches, after a call of it that is not recorded."""
        ...


class CudaRecorder:
    """CUDA graphs over one pool of memory, all recorded on one stream; unverified on a device.

    A stream of its own, and always the same: cuBLAS keeps a workspace of 32 MiB for every stream that it has
    met, and recordings share memory only with those of their stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types here
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0

    def record(self, run: Callable[[], None]) -> Replayable:
        """As `Recorder.record`: once without recording, so that kernels are compiled and workspaces made."""
        aside, main = self._stream, torch.cuda.current_stream(self._device)
        aside.wait_stream(main)
        with torch.cuda.stream(aside):
            run()
        main.wait_stream(aside)
        torch.cuda.empty_cache()  # as the recording does: else what it frees would be subtracted
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=aside, capture_error_mode="thread_local"):
            run()
        self.num_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        return graph


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOutput:
    """What a pass leaves; views that the next pass writes over."""

    hidden: Tensor
    """[rows, hidden_size]"""
    logits: Tensor
    """[rows, scores] float32"""
    bad_rows: Tensor
    """[rows] bool"""

    @property
    def num_bytes(self) -> int:
        """Of all three."""
        return self.hidden.nbytes + self.logits.nbytes + self.bad_rows.nbytes

    def first(self, num_rows: int) -> "PassOutput":
        """Without the rows that nobody owns."""
        return PassOutput(
            hidden=self.hidden[:num_rows], logits=self.logits[:num_rows], bad_rows=self.bad_rows[:num_rows]
        )


@dataclass(slots=True, kw_only=True)
class _Recording:
    """One rung's inputs, launches and outputs."""

    offsets: Sequence[int]
    """Of the inputs in `buffer`, in the order of `tensors_of`."""
    buffer: Tensor
    batch: ForwardBatch
    """Over views of `buffer`."""
    launches: Replayable | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphLimits:
    """The largest step, and what pads a smaller one."""

    max_num_seqs: int
    max_model_len: int
    block_size: int
    scratch_block: int


@dataclass(slots=True, kw_only=True)
class DecodeGraphs:
    """The ladder of recordings of one model; see the module."""

    model: CausalLM
    kernels: KernelSet
    limits: GraphLimits
    device: torch.device
    recorder: Recorder
    adapters: AdapterTables | None = None
    """Of the steps in which adapters act; None records none of them."""
    max_bytes: int | None = None
    """No recording is begun beyond it."""
    _output: PassOutput | None = None
    """[max_num_seqs, ...]: of every rung; None before the first recording."""
    _made: dict[Rung, _Recording] = field(default_factory=dict)
    _failed: set[Rung] = field(default_factory=set)
    """Those that could not be recorded, for want of memory."""
    _missed: dict[Rung, int] = field(default_factory=dict)
    """Steps that ran launch by launch for want of a rung."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the recordings' memory and of their inputs."""
        inputs = sum(each.buffer.nbytes for each in self._made.values())
        inputs += self.adapters.num_bytes if self.adapters else 0
        return self.recorder.num_bytes + inputs + (self._output.num_bytes if self._output else 0)

    @property
    def rungs(self) -> list[Rung]:
        """Those that are recorded."""
        return sorted(self._made)

    def clear(self) -> None:
        """Forget all recordings, because weights or KV have moved."""
        self._made.clear()

    def replay(
        self, batch: ForwardBatch, *, sequences: Sequence[ScheduledSequence], last: LastDrawn
    ) -> PassOutput | None:
        """Queue a step of decodes by its recording.

        Args:
            batch: on the host.
            sequences: what it was built from; some token may be `PENDING_TOKEN`.
            last: where those tokens lie.

        Returns:
            Its outputs, or None if the step must run launch by launch.
        """
        rung = self._rung_of(batch)
        if rung is None:
            return None
        made = self._made.get(rung)
        if made is None or made.launches is None or self._output is None:
            self._missed[rung] = self._missed.get(rung, 0) + 1
            return None
        self._send(made, padded(batch, rung=rung, limits=self.limits))
        if self.adapters and rung.has_adapters:
            self.adapters.fill(batch.adapters, num_rows=rung.num_rows)
        targets, origins = last.sources(sequences)
        if targets and last.tokens is not None:
            places = indices([*targets, *origins], device=self.device)
            drawn = last.tokens.index_select(0, places[len(targets) :])
            made.batch.token_ids.index_copy_(0, places[: len(targets)], drawn)
        made.launches.replay()
        return self._output.first(len(sequences))

    def record_next(self, example: ForwardBatch) -> bool:
        """Make the recording that was missed most often, else the next of the ladder; False if all are there.

        The very first is the ladder's, whatever was missed: it takes the memory that the others share.

        Args:
            example: any step on the host, for the slabs and the layers' groups.
        """
        known = self._made.keys() | self._failed
        missing = [rung for rung in self._ladder() if rung not in known]
        if not missing or (self.max_bytes is not None and self.num_bytes >= self.max_bytes):
            return False
        rung = max(missing, key=lambda each: self._missed.get(each, 0)) if self._made else missing[0]
        try:
            self._record(rung, example)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            log.warning(
                "no memory to record decode steps of %d rows: they run launch by launch", rung.num_rows
            )
            self._failed.add(rung)
        return True

    def record_at_start(self, example: ForwardBatch, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Record from the shortest contexts up until `RECORD_AT_START_S` is over."""
        end_s = clock() + RECORD_AT_START_S
        while clock() < end_s and self.record_next(example):
            pass

    def _ladder(self) -> list[Rung]:
        """All rungs, those with adapters last: a step without them is the usual one."""
        *fewer, most = row_ladder(self.limits.max_num_seqs)
        lengths, rows = length_ladder(self.limits.max_model_len), (most, *fewer)
        kinds = (False, True) if self.adapters else (False,)
        return [Rung(length, num, kind) for kind, length, num in product(kinds, lengths, rows)]

    def _rung_of(self, batch: ForwardBatch) -> Rung | None:
        lens = batch.groups[0].query_lens_host
        has_adapters = bool(batch.adapters)
        if max(lens) > 1 or len(lens) > self.limits.max_num_seqs or (has_adapters and not self.adapters):
            return None
        longest = max(batch.groups[0].seq_lens_host)
        length = next(each for each in length_ladder(self.limits.max_model_len) if each >= longest)
        num_rows = next(n for n in row_ladder(self.limits.max_num_seqs) if n >= len(lens))
        return Rung(length, num_rows, has_adapters)

    def _record(self, rung: Rung, example: ForwardBatch) -> None:
        host = padded(_first_rows(example), rung=rung, limits=self.limits)
        if self.adapters and rung.has_adapters:
            host = replace(host, adapter_tables=self.adapters)
            self.adapters.fill((), num_rows=rung.num_rows)
        tensors = tensors_of(host)
        offsets = [0, *accumulate(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors)]
        buffer = torch.zeros(offsets[-1], dtype=torch.uint8, device=self.device)
        views = views_like(buffer, tensors, offsets)
        made = _Recording(offsets=offsets, buffer=buffer, batch=with_tensors(host, views))
        self._send(made, host)

        def run() -> None:
            # A batch of its own each time: what kernels work out for one must be part of the recording.
            hidden = self.model.forward(with_tensors(made.batch, views))
            logits = self.model.logits(hidden)
            output = self._output_like(hidden, logits).first(rung.num_rows)
            output.hidden.copy_(hidden)
            output.logits.copy_(logits)
            output.bad_rows.copy_(not_finite(self.kernels, hidden))

        if self._output is None:
            run()  # here, for it is not the recorder's: that would count its memory
        made.launches = self.recorder.record(run)
        self._made[rung] = made

    def _output_like(self, hidden: Tensor, logits: Tensor) -> PassOutput:
        """What all rungs write to; made by the first run, before anything is recorded."""
        if self._output is None:
            rows = self.limits.max_num_seqs
            self._output = PassOutput(
                hidden=hidden.new_zeros(rows, hidden.shape[1]),
                logits=logits.new_zeros(rows, logits.shape[1]),
                bad_rows=torch.zeros(rows, dtype=torch.bool, device=hidden.device),
            )
        return self._output

    def _send(self, made: _Recording, batch: ForwardBatch) -> None:
        staged = host_buffer(made.buffer.nbytes, device=self.device)
        fill(staged, tensors_of(batch), made.offsets)
        made.buffer.copy_(staged, non_blocking=True)


def _first_rows(batch: ForwardBatch) -> ForwardBatch:
    """The step without a row: the slabs and groups alone count."""
    groups = tuple(
        AttentionBatch(
            query_start_loc=group.query_start_loc[:1],
            seq_lens=group.seq_lens[:0],
            block_tables=group.block_tables[:0],
            slot_mapping=group.slot_mapping[:0],
            query_lens_host=(),
            seq_lens_host=(),
        )
        for group in batch.groups
    )
    return ForwardBatch(
        token_ids=batch.token_ids[:0],
        positions=batch.positions[:0],
        groups=groups,
        layer_groups=batch.layer_groups,
        layer_slabs=batch.layer_slabs,
    )


def padded(batch: ForwardBatch, *, rung: Rung, limits: GraphLimits) -> ForwardBatch:
    """A step of decodes on the host with the shapes of a rung.

    Its lengths on the host are the rung's: what a launch needs to know must hold for every step of the rung.
    """
    missing = rung.num_rows - len(batch.token_ids)
    groups = tuple(_padded_group(group, rung=rung, limits=limits) for group in batch.groups)
    return ForwardBatch(
        token_ids=_extended(batch.token_ids, missing, 0),
        positions=_extended(batch.positions, missing, PAD_LENGTH - 1),
        groups=groups,
        layer_groups=batch.layer_groups,
        layer_slabs=batch.layer_slabs,
    )


def _padded_group(group: AttentionBatch, *, rung: Rung, limits: GraphLimits) -> AttentionBatch:
    num, width = len(group.seq_lens), -(-rung.length // limits.block_size)
    tables = torch.full((rung.num_rows, width), limits.scratch_block, dtype=torch.int32)
    known = min(width, group.block_tables.shape[1])  # tables have room for more than the step needs
    tables[:num, :known] = group.block_tables[:, :known]
    missing = rung.num_rows - num
    return AttentionBatch(
        query_start_loc=torch.arange(rung.num_rows + 1, dtype=torch.int32),
        seq_lens=_extended(group.seq_lens, missing, PAD_LENGTH),
        block_tables=tables,
        slot_mapping=_extended(group.slot_mapping, missing, limits.scratch_block * limits.block_size),
        query_lens_host=(1,) * rung.num_rows,
        seq_lens_host=(rung.length,) * rung.num_rows,
    )


def _extended(values: Tensor, num: int, value: int) -> Tensor:
    return torch.cat([values, values.new_full((num,), value)])
