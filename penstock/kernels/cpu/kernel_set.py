"""The native home as the object that layers hold.

Every method describes one operation. While a recording runs it is written down; otherwise it becomes a
program of its own over the caller's tensors, made once for its shapes and kept.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.cpu import _native, weights
from penstock.kernels.cpu import tape as t
from penstock.kernels.cpu.adapters import pack_adapter
from penstock.kernels.cpu.emission import Machine, kv_format
from penstock.kernels.cpu.single_calls import Programs, SingleCall, TimedCalls, slots_only
from penstock.kernels.ops import AttentionShape, ExpertWeights, LinearWeight, MoeShape, Release
from penstock.kernels.quantization import INTEGER_METHODS, Quantization
from penstock.kernels.rounded import RoundedWeight


class Writer(Protocol):
    """Where operations are described: a recording, or one call."""

    def take(self, tensor: Tensor) -> t.Slice:
        """The place of an argument."""
        ...

    def make(self, *cols: int, dtype: torch.dtype) -> t.Slice:
        """The place of a result [rows, *cols]."""
        ...

    def layer(self, slab: KvSlab) -> int:
        """The number of a layer's keys and values."""
        ...

    def add(self, operation: t.Operation) -> None:
        """Append an operation."""
        ...

    def result(self, place: t.Slice) -> Tensor:
        """The tensor of a place from `make`, once all is described."""
        ...

    def run(self) -> None:
        """All is described, and there is no result."""
        ...


def _packed(weight: LinearWeight) -> weights.PackedLinear:
    assert isinstance(weight, weights.PackedLinear), type(weight)
    return weight


def _gelu(*, tanh: bool) -> t.Activation:
    return "gelu_tanh" if tanh else "gelu"


class NativeKernels:
    """C++ kernels; every method is as the function of its name in `ops`."""

    name: Final = "native"
    copies_weights: Final = True
    rounded_methods: Final = INTEGER_METHODS
    has_own_threads: Final = True

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._programs = Programs(machine)
        self._recording: Writer | None = None
        self._are_finite = np.ones(0, np.uint8)
        """A flag a row, kept from call to call."""
        self._are_finite_address = 0

    @property
    def detail(self) -> str:
        """The instruction set and the number of threads."""
        num_threads = self.machine.pool.num_threads
        return f"{self.machine.isa}, {num_threads} thread{'s' if num_threads > 1 else ''}"

    @contextmanager
    def recording(self, writer: Writer) -> Iterator[None]:
        """Within, operations are described to `writer` and not computed."""
        self._recording = writer
        try:
            yield
        finally:
            self._recording = None

    def time_calls(
        self,
        calls: Sequence[Callable[[], object]],
        *,
        rows: int,
        batch: AttentionBatch | None,
        repeats: int,
    ) -> list[float]:
        """Seconds of some calls, run as a model runs them: recorded, one behind the other.

        Args:
            calls: two or more of one operation, alike but for the memory they read.
            rows: first dimension of what they are given.
            batch: of attention.
            repeats: how often all of them run.

        Returns:
            For each repeat the mean of all calls but the first.
        """
        timed = TimedCalls(self._programs, rows=rows, batch=batch)
        with self.recording(timed):
            for call in calls:
                call()
        return timed.seconds(len(calls), repeats=repeats)

    def _writer(self, rows: int, batch: AttentionBatch | None = None) -> Writer:
        return self._recording or SingleCall(self._programs, rows=rows, batch=batch)

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
        """As `ops.rms_norm`."""
        writer = self._writer(x.shape[0])
        out = writer.make(*x.shape[1:], dtype=x.dtype)
        operation = t.RmsNorm(
            x=writer.take(x),
            weight=t.Constant.of(weight),
            eps=eps,
            weight_offset=weight_offset,
            group=weight.shape[0],
            out=out,
        )
        writer.add(operation)
        return writer.result(out)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """As `ops.add_rms_norm`: two operations, which the passes join as it suits the neighbours."""
        writer = self._writer(x.shape[0])
        total = writer.make(*x.shape[1:], dtype=x.dtype)
        writer.add(t.Sum(a=writer.take(x), b=writer.take(residual), out=total))
        summed = writer.result(total)
        return self.rms_norm(summed, weight, eps=eps, weight_offset=weight_offset), summed

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        """As `ops.layer_norm`."""
        writer = self._writer(x.shape[0])
        out = writer.make(*x.shape[1:], dtype=x.dtype)
        operation = t.LayerNorm(
            x=writer.take(x), weight=t.Constant.of(weight), bias=t.Constant.of(bias), eps=eps, out=out
        )
        writer.add(operation)
        return writer.result(out)

    def rope_angles(self, positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
        """As `ops.rope_angles`."""
        writer = self._writer(positions.shape[0])
        out = writer.make(2 * frequencies.shape[0], dtype=torch.float32)
        operation = t.RopeAngles(
            positions=writer.take(positions),
            frequencies=t.Constant.of(frequencies),
            factor=factor,
            out=out,
        )
        writer.add(operation)
        return writer.result(out)

    def rope(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """As `ops.rope`: two operations, which the passes join with the write of the keys."""
        return self._rotated(query, angles), self._rotated(key, angles)

    def _rotated(self, x: Tensor, angles: Tensor) -> Tensor:
        writer = self._writer(x.shape[0])
        out = writer.make(*x.shape[1:], dtype=x.dtype)
        writer.add(t.Rope(x=writer.take(x), head_dim=x.shape[2], angles=writer.take(angles), out=out))
        return writer.result(out)

    def _gated(self, gate: Tensor, up: Tensor, activation: t.Activation) -> Tensor:
        writer = self._writer(gate.shape[0])
        out = writer.make(gate.shape[1], dtype=gate.dtype)
        writer.add(
            t.GatedActivation(gate=writer.take(gate), up=writer.take(up), activation=activation, out=out)
        )
        return writer.result(out)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return self._gated(gate, up, "silu")

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return self._gated(gate, up, _gelu(tanh=tanh))

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        writer = self._writer(x.shape[0])
        out = writer.make(x.shape[1], dtype=x.dtype)
        writer.add(t.Activate(x=writer.take(x), activation=_gelu(tanh=tanh), out=out))
        return writer.result(out)

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        quantization: Quantization,
        parts: Sequence[int],
        release: Release | None,
    ) -> LinearWeight:
        """As `ops.prepare_linear`: packed piece by piece."""
        return weights.pack_linear(
            self.machine.pool, weight, bias, quantization=quantization, parts=parts, release=release
        )

    def prepare_rounded(
        self, weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype, parts: Sequence[int]
    ) -> LinearWeight:
        """As `ops.prepare_rounded`: laid into panels as it is."""
        del dtype
        return weights.pack_rounded(self.machine.pool, weight, bias, parts=parts)

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        """As `ops.join_linears`: each is packed by itself, and a recording joins the operations."""
        del apart
        return None

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """As `ops.linear`."""
        writer = self._writer(x.shape[0])
        out = writer.make(weight.out_features, dtype=x.dtype)
        writer.add(t.Linear(x=writer.take(x), weights=(_packed(weight),), outs=(out,)))
        return writer.result(out)

    def prepare_adapter(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> AdapterWeights:
        """As `ops.prepare_adapter`: bfloat16 in one piece."""
        del dtype
        return pack_adapter(pairs, num_sites=num_sites)

    def lora(self, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
        """As `ops.lora`; in a recording in place, whichever adapters a step brings."""
        if self._recording is not None:
            source, out = self._recording.take(x), self._recording.take(y)
            self._recording.add(t.Lora(x=source, sites=(site.index,), outs=(out,)))
            return y
        writer = SingleCall(self._programs, rows=x.shape[0], batch=None, adapters=site.active.rows)
        out = writer.make(y.shape[1], dtype=y.dtype)
        writer.add(t.Convert(x=writer.take(y), out=out))
        writer.add(t.Lora(x=writer.take(x), sites=(site.index,), outs=(out,)))
        return writer.result(out)

    def embedding(self, token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """As `ops.embedding`; an id outside the table gives NaN."""
        writer = self._writer(token_ids.shape[0])
        out = writer.make(weight.shape[1], dtype=weight.dtype)
        writer.add(t.Embedding(ids=writer.take(token_ids), table=t.Constant.of(weight), scale=scale, out=out))
        return writer.result(out)

    def softcap(self, x: Tensor, *, cap: float) -> Tensor:
        """As `ops.softcap`."""
        writer = self._writer(x.shape[0])
        out = writer.make(x.shape[1], dtype=x.dtype)
        writer.add(t.Convert(x=writer.take(x), out=out))
        writer.add(t.Softcap(x=out, cap=cap))
        return writer.result(out)

    def kv_block(self, shape: KvShape) -> KvBlock:
        """As `ops.kv_block`: bytes, arranged as `attention.h` draws it."""
        num_bytes = _native.kv_block_bytes(
            kv_format=kv_format(shape),
            block_size=shape.block_size,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
        )
        return KvBlock(shape=(num_bytes,), dtype=torch.uint8)

    def write_kv(self, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
        """As `ops.write_kv`."""
        writer = self._writer(keys.shape[0], slots_only(slot_mapping))
        layer = writer.layer(slab)
        writer.add(t.WriteKv(keys=writer.take(keys), values=writer.take(values), layer=layer, kv=slab.shape))
        writer.run()

    def paged_attention(
        self, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
    ) -> Tensor:
        """As `ops.paged_attention`."""
        writer = self._writer(query.shape[0], batch)
        out = writer.make(*query.shape[1:], dtype=query.dtype)
        operation = t.Attention(
            query=writer.take(query),
            layer=writer.layer(slab),
            num_heads=query.shape[1],
            kv=slab.shape,
            scale=shape.scale,
            window=shape.window or 0,
            softcap=shape.softcap or 0.0,
            out=out,
        )
        writer.add(operation)
        return writer.result(out)

    def moe(self, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
        """As `ops.moe`."""
        writer = self._writer(x.shape[0])
        out = writer.make(x.shape[1], dtype=x.dtype)
        operation = t.Moe(
            x=writer.take(x),
            router=t.Constant.of(router),
            experts=tuple(
                weights.ExpertMatrices(
                    gate=_packed(expert.gate), up=_packed(expert.up), down=_packed(expert.down)
                )
                for expert in experts
            ),
            top_k=shape.top_k,
            renormalize=shape.renormalize,
            out=out,
        )
        writer.add(operation)
        return writer.result(out)

    def not_finite(self, x: Tensor) -> Tensor:
        """As `ops.not_finite`."""
        return torch.from_numpy(self._find_finite(x) == 0)

    def rows_not_finite(self, x: Tensor) -> list[int]:
        """As `ops.rows_not_finite`."""
        # As bytes: the code of numpy's operations would have to be read from memory again, at 50 us a step.
        flags = bytes(self._find_finite(x))
        return [] if 0 not in flags else [row for row, is_finite in enumerate(flags) if not is_finite]

    def _find_finite(self, x: Tensor) -> npt.NDArray[np.uint8]:
        """[T], 0 for a row that holds NaN or infinity; until the next call."""
        num_rows = x.shape[0]
        if num_rows > len(self._are_finite):
            self._are_finite = np.ones(num_rows, np.uint8)
            self._are_finite_address = self._are_finite.ctypes.data
        if num_rows:
            _native.rows_are_finite(
                self.machine.pool,
                isa=self.machine.isa,
                data=x.data_ptr(),
                dtype=weights.NATIVE_DTYPES[x.dtype],
                num_rows=num_rows,
                cols=x.shape[1],
                row_bytes=x.stride(0) * x.itemsize,
                out=self._are_finite_address,
            )
        return self._are_finite[:num_rows]

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        pool.index_copy_(0, dst, pool.index_select(0, src))

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        pool.index_fill_(0, block_ids, 0)
