"""A weight that a checkpoint has already rounded, on a grid that the kernels keep as it is.

`models/quantized` and `models/gguf` make one where a format's grid is exactly that of `matrix.h`, or 8-bit
floats with a scale an output; a home that multiplies by these (`KernelSet.rounded_methods`) then takes the
very same numbers and scales, so that nothing is rounded twice. What has another grid is dequantized instead
and goes the way of every other weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.quantization import Quantization


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedWeight:
    """`values * scales`; letters: O outputs, I inputs, G groups of inputs."""

    values: Tensor
    """[O, I] contiguous; int8, in [-8, 7] for int4, or float8_e4m3fn without NaN."""
    scales: Tensor
    """int8, fp8: [O] float32; int4: [O, G] float16, G groups of inputs, the last may be shorter; finite."""
    quantization: Quantization
    """int8, fp8, or int4 and its groups, and whether the inputs of the product are rounded too."""

    def __post_init__(self) -> None:
        is_float, is_grouped = self.quantization.method == "fp8", self.quantization.method == "int4"
        dtype = torch.float8_e4m3fn if is_float else torch.int8
        assert self.values.dtype == dtype, (self.values.dtype, dtype)
        assert self.values.is_contiguous()
        rows, cols = self.values.shape
        shape = (rows, -(-cols // self.quantization.group_size)) if is_grouped else (rows,)
        assert self.scales.shape == shape, (self.scales.shape, shape)
        assert self.scales.dtype == (torch.float16 if is_grouped else torch.float32), self.scales.dtype
        assert self.scales.is_contiguous()

    def dequantized(self) -> Tensor:
        """[O, I] float32, each product rounded once; exact for int4, whose scales have few digits."""
        if self.quantization.method != "int4":
            return self.values.float() * self.scales[:, None]
        wide = self.scales.float().repeat_interleave(self.quantization.group_size, dim=1)
        return self.values.float() * wide[:, : self.values.shape[1]]
