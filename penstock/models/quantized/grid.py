"""Integers with a scale for each output and group of inputs: AWQ, GPTQ and the integer tensors of others.

`w[o, i] = values[o, i] * scales[o, group of i]`, zero points already subtracted. Where the kernels have that
grid (`csrc/include/penstock/matrix.h`) the integers and scales become a `RoundedWeight` as they are.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.quantization import GROUP_SIZES, Activations, Method, Quantization
from penstock.kernels.rounded import RoundedWeight

PIECE_VALUES = 16 << 20
"""Values that are dequantized at a time in float32."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """Letters: O outputs, I inputs, G groups."""

    values: Tensor
    """[O, I] int8, or int16 where zero points make them greater."""
    scales: Tensor
    """[O, G] float32, finite"""
    group_size: int
    """Inputs of a group, at most I; the last may be shorter."""
    group_of: Tensor | None = None
    """[I] int64, the group of each input, where groups are not runs of inputs (act-order)."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[O, I] in `dtype`, each value rounded once."""
        rows, cols = self.values.shape
        out = torch.empty(rows, cols, dtype=dtype)
        step = max(1, PIECE_VALUES // cols)
        for start in range(0, rows, step):
            part = slice(start, start + step)
            out[part] = self.values[part].float() * self._spread(self.scales[part])
        return out

    def _spread(self, scales: Tensor) -> Tensor:
        # [rows, G] -> [rows, I]
        if self.group_of is not None:
            return scales[:, self.group_of]
        return scales.repeat_interleave(self.group_size, dim=1)[:, : self.values.shape[1]]

    def kept(
        self, dtype: torch.dtype, *, activations: Activations, methods: Collection[Method]
    ) -> RoundedWeight | Tensor:
        """As `StoredMatrix.kept`; `activations` are what the format does with the inputs of the product."""
        found = self.rounded(activations)
        return self.dequantized(dtype) if found is None or found.quantization.method not in methods else found

    def rounded(self, activations: Activations) -> RoundedWeight | None:
        """The same integers and scales in a form of the kernels, or None if none of them has this grid."""
        if self.group_of is not None:
            return None
        low, high = (int(bound) for bound in self.values.aminmax())
        found = self._int4(activations) if low >= -8 and high <= 7 else None
        is_int8 = low >= -128 and high <= 127 and self.scales.shape[1] == 1
        return self._int8(activations) if found is None and is_int8 else found

    def _int8(self, activations: Activations) -> RoundedWeight:
        return RoundedWeight(
            values=self.values.to(torch.int8).contiguous(),
            scales=self.scales[:, 0].contiguous(),
            quantization=Quantization(method="int8", activations=activations),
        )

    def _int4(self, activations: Activations) -> RoundedWeight | None:
        # A longer group is several of the kernels' with the same scale.
        cols = self.values.shape[1]
        sizes = [size for size in GROUP_SIZES if self.group_size % size == 0 or self.group_size == cols]
        scales = self.scales.to(torch.float16)
        if not sizes or not torch.equal(scales.float(), self.scales):
            return None
        size = sizes[-1]
        times, num_groups = -(-self.group_size // size), -(-cols // size)
        return RoundedWeight(
            values=self.values.to(torch.int8).contiguous(),
            scales=scales.repeat_interleave(times, dim=1)[:, :num_groups].contiguous(),
            quantization=Quantization(method="int4", group_size=size, activations=activations),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GridMatrix:
    """A stored matrix that is a grid; a `stored.StoredMatrix`."""

    load: Callable[[], Grid]
    """Reads the data."""
    num_bytes: int
    activations: Activations = "bf16"
    """What the format does with the inputs of the product."""

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`."""
        del fill
        return self.load().dequantized(dtype)

    def kept(self, dtype: torch.dtype, *, methods: Collection[Method]) -> RoundedWeight | Tensor:
        """As `StoredMatrix.kept`."""
        return self.load().kept(dtype, activations=self.activations, methods=methods)
