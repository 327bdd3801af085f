"""A model whose passes were recorded and run as two native programs: the layers, and the head.

`loader` makes one where the kernels can; the engine sees a `CausalLM` like any other. A model that cannot be
recorded runs operation by operation on the same kernels.
"""

import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import numpy as np
import torch
from torch import Tensor

from penstock.kernels.batch import AttentionBatch, ForwardBatch, KvShape, KvSlab
from penstock.kernels.cpu import _native, passes
from penstock.kernels.cpu.adapters import adapter_runs
from penstock.kernels.cpu.emission import attention_inputs, emit
from penstock.kernels.cpu.kernel_set import NativeKernels
from penstock.kernels.cpu.recorder import TRACE_ROWS, Recorder, TorchCalls
from penstock.kernels.cpu.single_calls import has_whole_rows, layer_kv, padded_rows
from penstock.kernels.cpu.tape import Tape
from penstock.kernels.cpu.weights import NATIVE_DTYPES
from penstock.models.decode_pass import DecodePass, DecodePrograms
from penstock.models.interface import CausalLM, ModelConfig

FLOAT_BYTES: Final = 4

Rewrite = Callable[[Tape], Tape]


def _meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _trace_batch(recorder: Recorder, slabs: tuple[KvSlab, ...]) -> ForwardBatch:
    group = AttentionBatch(
        query_start_loc=_meta(2, dtype=torch.int32),
        seq_lens=_meta(1, dtype=torch.int32),
        block_tables=_meta(1, 1, dtype=torch.int32),
        slot_mapping=_meta(TRACE_ROWS, dtype=torch.int64),
        query_lens_host=(TRACE_ROWS,),
        seq_lens_host=(TRACE_ROWS,),
    )
    return ForwardBatch(
        token_ids=recorder.add_input(_meta(TRACE_ROWS, dtype=torch.int64)),
        positions=recorder.add_input(_meta(TRACE_ROWS, dtype=torch.int64)),
        groups=(group,),
        layer_groups=(0,) * len(slabs),
        layer_slabs=slabs,
    )


@contextmanager
def _traceable() -> Iterator[None]:
    """Without gradients, and not in inference mode, where views do not pass the recorder as such."""
    with torch.inference_mode(mode=False), torch.no_grad():
        yield


def record_forward(model: CausalLM, kernels: NativeKernels, *, kv: KvShape) -> Tape:
    """Run `model.forward` without data and write down what it does.

    Raises:
        NotRecordableError: it does something that no operation stands for.
        Exception: whatever the model raises over tensors without data.
    """
    nothing = _meta(1, dtype=torch.uint8)
    slabs = tuple(KvSlab(keys=nothing, values=nothing, shape=kv) for _ in model.layer_windows)
    recorder = Recorder(slabs=slabs)
    batch = _trace_batch(recorder, slabs)
    with _traceable(), kernels.recording(recorder), TorchCalls(recorder):
        hidden = model.forward(batch)
    return recorder.tape(hidden)


def record_logits(model: CausalLM, kernels: NativeKernels, *, dtype: torch.dtype) -> tuple[Tape, int]:
    """The same for `model.logits` over hidden states of `dtype`, and how many columns they have."""
    recorder = Recorder()
    hidden = recorder.add_input(_meta(TRACE_ROWS, model.config.shape.hidden_size, dtype=dtype))
    with _traceable(), kernels.recording(recorder), TorchCalls(recorder):
        logits = model.logits(hidden)
    return recorder.tape(logits), logits.shape[1]


def _place_of(hidden: Tensor) -> tuple[int, int]:
    """Address, and bytes from row to row."""
    return hidden.data_ptr(), hidden.stride(0) * hidden.itemsize


class LogitsBuffers:
    """Memory for logits, taken again once nobody holds the last result: fresh pages cost time."""

    def __init__(self) -> None:
        self._kept: list[np.ndarray[tuple[int, int], np.dtype[np.float32]]] = []
        """Each [rows, cols] as it was asked for last, over memory of its own."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are kept."""
        return sum(_memory_of(each).nbytes for each in self._kept)

    def take(self, rows: int, cols: int) -> Tensor:
        """Uninitialised [rows, cols] float32."""
        for each in self._kept:
            # Held by the list, the loop's name and the call's argument, and by no tensor.
            if each.shape == (rows, cols) and sys.getrefcount(each) == NOBODY_ELSE:
                return torch.from_numpy(each)
        shaped = self._free_memory(rows * cols)[: rows * cols].reshape(rows, cols)
        self._kept.append(shaped)
        return torch.from_numpy(shaped)

    def _free_memory(self, size: int) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
        """At least `size` values that nobody holds; they are on the list no more."""
        free = [each for each in self._kept if sys.getrefcount(each) == NOBODY_ELSE]
        fitting = next((each for each in free if _memory_of(each).size >= size), None)
        if fitting is None:
            self._kept = [each for each in self._kept if _memory_of(each).size >= size]
            return np.empty(size, dtype=np.float32)
        self._kept = [each for each in self._kept if each is not fitting]
        return _memory_of(fitting)


class RecordedModel:
    """Runs the recorded passes; a `CausalLM`."""

    def __init__(
        self,
        model: CausalLM,
        kernels: NativeKernels,
        *,
        kv: KvShape,
        dtype: torch.dtype,
        rewrite: Rewrite = passes.optimize,
    ) -> None:
        """Record both passes and make their programs.

        Args:
            model: built over its data; kept, since the programs point to its constants.
            kernels: those of the model's layers.
            kv: what a block of one layer holds.
            dtype: of hidden states.
            rewrite: makes of each tape what is run.

        Raises:
            NotRecordableError: as `record_forward`.
        """
        self._model = model
        recorded = record_forward(model, kernels, kv=kv)
        base = passes.without_adapters(recorded)
        head, self._num_scores = record_logits(model, kernels, dtype=dtype)
        tapes = [base, head]
        if len(base.operations) < len(recorded.operations):
            tapes.append(recorded)
        self._tapes = [rewrite(tape) for tape in tapes]  # kept: the programs point to their constants
        self._forward, self._logits, *adapted = (emit(tape, kernels.machine) for tape in self._tapes)
        self._adapted = adapted[0] if adapted else self._forward
        self._is_deterministic = kernels.machine.is_deterministic
        self._forward.set_next(self._logits)
        self._logits.set_next(self._forward)
        if adapted:
            self._adapted.set_next(self._logits)
        self._dtype = dtype
        self._buffers = LogitsBuffers()
        self._newest: weakref.ref[Tensor] | None = None
        """What `forward` gave last, and `_newest_place` where it lies."""
        self._newest_place = (0, 0)
        self.program_seconds = 0.0
        """Time inside the programs so far: the rest of a step is the host's."""
        self._op_seconds: tuple[list[float], list[float]] | None = None
        self._slabs: tuple[KvSlab, ...] = ()
        self.config: ModelConfig = model.config
        self.layer_windows = model.layer_windows
        self.num_kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.vocab_size = model.vocab_size

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept between steps."""
        adapted = 0 if self._adapted is self._forward else self._adapted.buffer_bytes
        return self._forward.buffer_bytes + adapted + self._logits.buffer_bytes + self._buffers.num_bytes

    @property
    def plain(self) -> CausalLM:
        """The model that was recorded, which runs operation by operation."""
        return self._model

    @property
    def programs(self) -> tuple[_native.Program, _native.Program]:
        """Of the layers and of the head, for profiles."""
        return self._forward, self._logits

    @contextmanager
    def profiling(self) -> Iterator[tuple[list[float], list[float]]]:
        """Sums up the seconds of each operation of both `programs` while it is open; a little slower.

        Steps with adapters run another program and are not counted.
        """
        layers, head = self.programs
        self._op_seconds = ([0.0] * len(layers.op_names), [0.0] * len(head.op_names))
        try:
            yield self._op_seconds
        finally:
            self._op_seconds = None

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.forward`."""
        if batch.layer_slabs is not self._slabs:
            self._bind(batch)
        rows = batch.token_ids.shape[0]
        hidden = padded_rows(rows, self.config.shape.hidden_size, self._dtype)
        externals = [
            (batch.token_ids.data_ptr(), batch.token_ids.itemsize),
            (batch.positions.data_ptr(), batch.positions.itemsize),
            _place_of(hidden),
        ]
        self._newest, self._newest_place = weakref.ref(hidden), externals[-1]
        # The base model's program joins more operations, which rounds less: a row's bits would depend on
        # whether a neighbour has an adapter.
        program = self._adapted if batch.adapters or self._is_deterministic else self._forward
        self._run(program, rows, externals, attention_inputs(batch.groups), adapter_runs(batch.adapters))
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """As `CausalLM.logits`; its memory is taken again once nobody holds the result."""
        rows, cols = hidden.shape
        if self._newest is not None and self._newest() is hidden:  # spares torch's answers, 10 us each
            place = self._newest_place
        else:
            if not has_whole_rows(hidden):
                hidden = padded_rows(rows, cols, hidden.dtype).copy_(hidden)
            place = _place_of(hidden)
        out = self._buffers.take(rows, self._num_scores)
        externals = [place, (out.data_ptr(), FLOAT_BYTES * self._num_scores)]
        if rows:
            self._run(self._logits, rows, externals, [], [])
        return out

    @property
    def is_profiled(self) -> bool:
        """True while operations are timed, which `decode_pass` knows nothing of."""
        return self._op_seconds is not None

    def decode_pass(self, batch: ForwardBatch) -> DecodePass:
        """Both programs as one call over the memory of `batch`, which the result keeps alive.

        What a run reads is what stands in the batch's tensors then; adapters are told at each run.
        """
        if batch.layer_slabs is not self._slabs:
            self._bind(batch)
        rows, hidden_size = batch.token_ids.shape[0], self.config.shape.hidden_size
        hidden = padded_rows(rows, hidden_size, self._dtype)
        logits = self._buffers.take(rows, self._num_scores)
        native = _native.DecodePass(
            num_rows=rows,
            token_ids=(batch.token_ids.data_ptr(), batch.token_ids.itemsize),
            positions=(batch.positions.data_ptr(), batch.positions.itemsize),
            hidden=_place_of(hidden),
            hidden_dtype=NATIVE_DTYPES[self._dtype],
            hidden_cols=hidden_size,
            logits=_place_of(logits),
            logits_cols=self._num_scores,
            groups=attention_inputs(batch.groups),
        )
        base = self._adapted if self._is_deterministic else self._forward  # as in `forward`
        programs = DecodePrograms(base=base, adapted=self._adapted, head=self._logits)
        return DecodePass(
            native, programs, logits=logits, kept=(batch, hidden), note_seconds=self._note_seconds
        )

    def _note_seconds(self, seconds: float) -> None:
        self.program_seconds += seconds

    def _run(
        self,
        program: _native.Program,
        rows: int,
        externals: list[tuple[int, int]],
        groups: list[_native.AttentionInputs],
        adapters: list[tuple[int, int, _native.Adapter]],
    ) -> None:
        began_s = time.perf_counter()
        if self._op_seconds is None or program not in self.programs:
            program.run(rows, externals, groups, adapters)
        else:
            totals = self._op_seconds[program is self._logits]
            spent = program.profile(rows, externals, groups, rounds=1, adapters=adapters)
            totals[:] = [total + seconds for total, seconds in zip(totals, spent, strict=True)]
        self.program_seconds += time.perf_counter() - began_s

    def _bind(self, batch: ForwardBatch) -> None:
        layers = [
            layer_kv(slab, group=group)
            for slab, group in zip(batch.layer_slabs, batch.layer_groups, strict=True)
        ]
        self._forward.set_layers(layers)
        self._adapted.set_layers(layers)
        self._slabs = batch.layer_slabs


def _memory_of(
    shaped: "np.ndarray[tuple[int, int], np.dtype[np.float32]]",
) -> "np.ndarray[tuple[int], np.dtype[np.float32]]":
    assert shaped.base is not None
    return shaped.base


def _count_of_nobody_else() -> int:
    """What `sys.getrefcount` says in `LogitsBuffers.take` of an array that only its list holds."""
    kept = [np.empty(1, dtype=np.float32)]
    return next(sys.getrefcount(each) for each in kept)


NOBODY_ELSE = _count_of_nobody_else()
