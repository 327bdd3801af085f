"""A weight that a checkpoint has already rounded, on a grid that the kernels keep as it is.

`models/quantized` and `models/gguf` make one where a format's grid is exactly that of `matrix.h`; a home then
takes the very same integers and scales, so that nothing is rounded twice. What has another grid is
dequantized instead and goes the way of every other weight.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penstock.kernels.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedWeight:
    """`values * scales`; letters: O outputs, I inputs, G groups of inputs."""

    values: Tensor
    """[O, I] int8, contiguous; in [-8, 7] for int4."""
    scales: Tensor
    """int8: [O] float32; int4: [O, G] float16, G the groups of I inputs, the last may be shorter; finite."""
    quantization: Quantization
    """int8 or int4 and its groups, and whether the inputs of the product are rounded too."""

    def __post_init__(self) -> None:
        assert self.values.dtype == torch.int8, self.values.dtype
        assert self.values.is_contiguous()
        rows, cols = self.values.shape
        is_int8 = self.quantization.method == "int8"
        shape = (rows,) if is_int8 else (rows, -(-cols // self.quantization.group_size))
        assert self.scales.shape == shape, (self.scales.shape, shape)
        assert self.scales.dtype == (torch.float32 if is_int8 else torch.float16), self.scales.dtype
        assert self.scales.is_contiguous()

    def to(self, device: torch.device) -> "RoundedWeight":
        """The same on a device; itself if it is there."""
        if self.values.device == device:
            return self
        return replace(self, values=self.values.to(device), scales=self.scales.to(device))

    def dequantized(self) -> Tensor:
        """[O, I] float32, exact: each product has fewer digits than a float32."""
        if self.quantization.method == "int8":
            return self.values.float() * self.scales[:, None]
        wide = self.scales.float().repeat_interleave(self.quantization.group_size, dim=1)
        return self.values.float() * wide[:, : self.values.shape[1]]
