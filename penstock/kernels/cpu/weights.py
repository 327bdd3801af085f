"""Weights of linear layers in the order in which the native kernels read them.

A weight is packed piece by piece straight from where it lies (mostly a mapped file), so that little of the
file is resident beside what is packed. `kernel_set` prepares them, `emission` hands them to operations.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from penstock.kernels.quantization import Quantization
from penstock.kernels.rounded import RoundedWeight

PIECE_VALUES: Final = 32 << 20
"""Of the source, that are packed at a time: what is resident twice while loading."""
PANEL_FEATURES: Final = 32
"""Outputs of a packed panel (`matrix.h`): a piece is a whole number of panels."""
NATIVE_DTYPES: Final = {
    torch.bfloat16: _native.DType.bf16,
    torch.float32: _native.DType.f32,
    torch.int8: _native.DType.i8,
    torch.int32: _native.DType.i32,
    torch.int64: _native.DType.i64,
}

Release = Callable[[Tensor], None]
"""Told which part of a weight has been packed and will not be read again."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Piece:
    """Output features [start, start + matrix.out_features) of a weight."""

    start: int
    matrix: _native.Matrix


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedLinear:
    """A packed weight [out_features, in_features] and its bias."""

    out_features: int
    in_features: int
    pieces: tuple[Piece, ...]
    bias: Tensor | None
    """[out_features] float32"""
    quantization: Quantization

    @property
    def num_bytes(self) -> int:
        """Of the packed values, scales and the bias."""
        bias_bytes = 0 if self.bias is None else self.bias.nbytes
        return bias_bytes + sum(piece.matrix.num_bytes for piece in self.pieces)

    @property
    def takes_int8(self) -> bool:
        """True if its input is quantized first."""
        return self.quantization.quantizes_activations

    def bias_address(self, start: int) -> int:
        """Where the bias of the outputs from `start` on stands; 0 without a bias."""
        return 0 if self.bias is None else self.bias.data_ptr() + start * self.bias.itemsize

    def part(self, start: int, out_features: int) -> "PackedLinear | None":
        """Some of the outputs as a weight of its own, if pieces begin and end there."""
        pieces = tuple(
            Piece(start=piece.start - start, matrix=piece.matrix)
            for piece in self.pieces
            if start <= piece.start and piece.start + piece.matrix.out_features <= start + out_features
        )
        if sum(piece.matrix.out_features for piece in pieces) != out_features:
            return None
        bias = None if self.bias is None else self.bias[start : start + out_features]
        return PackedLinear(
            out_features=out_features,
            in_features=self.in_features,
            pieces=pieces,
            bias=bias,
            quantization=self.quantization,
        )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertMatrices:
    """One expert's packed weights."""

    gate: PackedLinear
    up: PackedLinear
    down: PackedLinear

    @property
    def num_bytes(self) -> int:
        """Of the three."""
        return self.gate.num_bytes + self.up.num_bytes + self.down.num_bytes


def _sizes(num_rows: int, *, row_size: int) -> list[int]:
    """Rows of pieces of bounded size, the same for every dtype: gate and up are joined piece by piece."""
    step = max(1, PIECE_VALUES // (PANEL_FEATURES * row_size)) * PANEL_FEATURES
    return [min(step, num_rows - at) for at in range(0, num_rows, step)]


def pack_linear(
    pool: _native.Pool,
    weight: Tensor,
    bias: Tensor | None,
    *,
    quantization: Quantization,
    parts: Sequence[int],
    release: Release | None,
) -> PackedLinear:
    """Pack a weight.

    Args:
        pool: the threads that do it.
        weight: [O, I] bfloat16 or float32, any strides.
        bias: [O] or None.
        quantization: what to make of it.
        parts: rows of the pieces, adding up to O; none: as suits the memory.
        release: told of each piece that is done.
    """
    sizes = parts or _sizes(weight.shape[0], row_size=weight.shape[1])
    assert sum(sizes) == weight.shape[0], (sizes, weight.shape)
    pieces = []
    for source, end in zip(weight.split(list(sizes)), accumulate(sizes), strict=True):  # type: ignore[no-untyped-call]  # torch's own
        pieces.append(Piece(start=end - len(source), matrix=_pack(pool, source, quantization)))
        if release is not None:
            release(source)
    return PackedLinear(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        pieces=tuple(pieces),
        bias=None if bias is None else bias.float().contiguous(),
        quantization=quantization,
    )


def _pack(pool: _native.Pool, weight: Tensor, quantization: Quantization) -> _native.Matrix:
    return _native.pack(
        pool,
        data=weight.data_ptr(),
        dtype=NATIVE_DTYPES[weight.dtype],
        row_stride=weight.stride(0),
        col_stride=weight.stride(1),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        format="bf16" if quantization.method == "none" else quantization.method,
        group_size=quantization.group_size if quantization.method == "int4" else 0,
    )


def pack_rounded(
    pool: _native.Pool, weight: RoundedWeight, bias: Tensor | None, *, parts: Sequence[int]
) -> PackedLinear:
    """Lay a weight that is rounded already into panels; arguments as in `pack_linear`."""
    rows, cols = weight.values.shape
    sizes = list(parts or _sizes(rows, row_size=cols))
    assert sum(sizes) == rows, (sizes, weight.values.shape)
    starts = [0, *accumulate(sizes)]
    return PackedLinear(
        out_features=rows,
        in_features=cols,
        pieces=tuple(
            Piece(start=start, matrix=_pack_rounded(pool, weight, start=start, num_rows=size))
            for start, size in zip(starts, sizes, strict=False)
        ),
        bias=None if bias is None else bias.float().contiguous(),
        quantization=weight.quantization,
    )


def _pack_rounded(pool: _native.Pool, weight: RoundedWeight, *, start: int, num_rows: int) -> _native.Matrix:
    quantization = weight.quantization
    return _native.pack_rounded(
        pool,
        values=weight.values[start].data_ptr(),
        scales=weight.scales[start].data_ptr(),
        out_features=num_rows,
        in_features=weight.values.shape[1],
        format=quantization.method,
        group_size=quantization.group_size if quantization.method == "int4" else 0,
    )


def unpacked(weight: PackedLinear) -> Tensor:
    """What it stands for: [out_features, in_features] float32."""
    out = torch.empty(weight.out_features, weight.in_features, dtype=torch.float32)
    for piece in weight.pieces:
        piece.matrix.unpack(out[piece.start].data_ptr())
    return out
