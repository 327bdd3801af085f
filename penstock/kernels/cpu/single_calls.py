"""One operation over the caller's tensors, as a program of its own.

Programs depend on columns, dtypes and constants, not on the number of rows; they are kept. Rows whose end is
not the end of a group of inputs are copied first, since products read the group to its end.
"""

import math
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterRows
from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.cpu import _native
from penstock.kernels.cpu.adapters import adapter_runs
from penstock.kernels.cpu.emission import Machine, attention_inputs, emit
from penstock.kernels.cpu.passes import lower
from penstock.kernels.cpu.tape import Buffer, Operation, Role, Slice, Tape

ROW_BYTES: Final = 128
"""What rows are padded to (`program.cpp`)."""
MAX_PROGRAMS: Final = 4096
"""Kept; beyond it all are forgotten. A model has some tens for each layer."""


class Programs:
    """The programs of single calls."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._programs: dict[Tape, _native.Program] = {}

    def program(self, tape: Tape) -> _native.Program:
        """The program of a tape, made at its first call."""
        program = self._programs.get(tape)
        if program is None:
            if len(self._programs) >= MAX_PROGRAMS:
                self._programs.clear()
            program = self._programs[tape] = emit(lower(tape), self.machine)
        return program


def padded_rows(rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """[rows, cols] whose rows lie `ROW_BYTES` apart or a multiple of it, zeros in between."""
    step = ROW_BYTES // dtype.itemsize
    width = -(-cols // step) * step
    if width == cols:
        return torch.empty(rows, cols, dtype=dtype)
    return torch.zeros(rows, width, dtype=dtype)[:, :cols]


def has_whole_rows(x: Tensor) -> bool:
    """True if the kernels may read [rows, cols] where it lies: nothing stands behind a row's last value."""
    row_bytes = x.shape[1] * x.itemsize
    is_rows = x.stride(1) == 1 or x.shape[1] == 1
    return is_rows and row_bytes % ROW_BYTES == 0 and x.data_ptr() % 64 == 0


class SingleCall:
    """Describes operations over given tensors and runs them when the first result is asked for."""

    def __init__(
        self,
        programs: Programs,
        *,
        rows: int,
        batch: AttentionBatch | None,
        adapters: tuple[AdapterRows, ...] = (),
    ) -> None:
        self._programs = programs
        self._adapters = adapters
        self._rows = rows
        self._batch = batch
        self._layers: list[_native.LayerKv] = []
        self._tensors: list[Tensor] = []
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._operations: list[Operation] = []
        self._is_done = False

    def _add(self, tensor: Tensor) -> Slice:
        self._tensors.append(tensor)
        return Slice(buffer=len(self._tensors) - 1, col=0, cols=tensor.shape[1])

    def take(self, tensor: Tensor) -> Slice:
        """The place of an argument [rows, ...]."""
        flat = tensor.reshape(self._rows, math.prod(tensor.shape[1:]))
        if not has_whole_rows(flat):
            padded = padded_rows(flat.shape[0], flat.shape[1], flat.dtype)
            flat = padded.copy_(flat)
        return self._add(flat)

    def make(self, *cols: int, dtype: torch.dtype) -> Slice:
        """The place of a result [rows, *cols]."""
        place = self._add(padded_rows(self._rows, math.prod(cols), dtype))
        self._shapes[place.buffer] = cols
        return place

    def layer(self, slab: KvSlab) -> int:
        """The number of a layer's keys and values."""
        self._layers.append(layer_kv(slab, group=0))
        return len(self._layers) - 1

    def add(self, operation: Operation) -> None:
        """Append an operation."""
        self._operations.append(operation)

    def result(self, place: Slice) -> Tensor:
        """Run what was described, at the first call; the result [rows, *cols]."""
        self.run()
        return self._tensors[place.buffer].reshape(self._rows, *self._shapes[place.buffer])

    def run(self) -> None:
        """Run what was described, once."""
        if self._is_done or not self._rows:
            return
        self._is_done = True
        program = self._programs.program(self._tape())
        program.set_layers(self._layers)
        program.run(self._rows, self._externals(), self._groups(), adapter_runs(self._adapters))
        if program.buffer_bytes:
            program.shrink()

    def _tape(self) -> Tape:
        return Tape(
            buffers=tuple(
                Buffer(dtype=each.dtype, cols=each.shape[1], role=Role.EXTERNAL) for each in self._tensors
            ),
            operations=tuple(self._operations),
            inputs=tuple(range(len(self._tensors))),
            outputs=(),
        )

    def _externals(self) -> list[tuple[int, int]]:
        return [(each.data_ptr(), each.stride(0) * each.itemsize) for each in self._tensors]

    def _groups(self) -> list[_native.AttentionInputs]:
        return attention_inputs([self._batch] if self._batch else [])


class TimedCalls(SingleCall):
    """Calls in a row as one program, whose operations are timed inside it: nothing around them counts.

    The results are there once `seconds` has run.
    """

    def run(self) -> None:
        """Nothing: they run when they are timed."""

    def seconds(self, num_calls: int, *, repeats: int) -> list[float]:
        """Of a call, by `repeats`: the mean of all but the first, which wakes the threads.

        Not of each call: where a thread must wait for its core, one call's time counts as its neighbour's.

        Args:
            num_calls: that were described, all alike.
            repeats: how often all of them run.
        """
        program = emit(lower(self._tape()), self._programs.machine)
        program.set_layers(self._layers)
        given, groups, adapters = self._externals(), self._groups(), adapter_runs(self._adapters)
        num_operations = len(program.op_names) // num_calls
        taken: list[float] = []
        for _ in range(repeats):
            spent = program.profile(self._rows, given, groups, 1, adapters)
            each = [sum(spent[i : i + num_operations]) for i in range(0, len(spent), num_operations)]
            taken.append(sum(each[1:]) / (num_calls - 1))
        return taken


def layer_kv(slab: KvSlab, *, group: int) -> _native.LayerKv:
    """Where a layer's blocks lie."""
    return _native.LayerKv(
        keys=slab.keys.data_ptr(),
        values=slab.values.data_ptr(),
        block_bytes=slab.keys.stride(0) * slab.keys.itemsize,
        group=group,
    )


def slots_only(slot_mapping: Tensor) -> AttentionBatch:
    """A batch for writing keys and values, which needs the slots alone."""
    nothing = torch.zeros(1, 1, dtype=torch.int32)
    return AttentionBatch(
        query_start_loc=nothing,
        seq_lens=nothing,
        block_tables=nothing,
        slot_mapping=slot_mapping,
        query_lens_host=(),
        seq_lens_host=(),
    )
