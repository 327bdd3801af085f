"""Weights of linear layers as plain tensors, for the homes in torch.

Quantized ones are rounded by the same rule as the native home's and kept as what they stand for: the values
are right, nothing is saved. `reference` and `eager` share it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.ops import LinearWeight
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.quantize import quantize_dequantize, round_inputs
from penstock.kernels.rounded import RoundedWeight


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlainLinear:
    """A weight as it is, or what its quantized form stands for."""

    weight: Tensor
    """[O, I]"""
    bias: Tensor | None
    """[O]"""
    quantization: Quantization

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight.shape[1]

    @property
    def num_bytes(self) -> int:
        """Of both tensors."""
        return self.weight.nbytes + (0 if self.bias is None else self.bias.nbytes)

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the product sees it: of x's dtype, or float32 where activations are rounded."""
        return round_inputs(x, self.quantization) if self.quantization.quantizes_activations else x


def prepare_plain(
    weight: Tensor, bias: Tensor | None, *, quantization: Quantization, dtype: torch.dtype | None
) -> PlainLinear:
    """Keep a weight, quantized and back if that is asked for.

    Args:
        weight: [O, I].
        bias: [O] or None.
        quantization: how to round it.
        dtype: of a rounded weight; None keeps float32.
    """
    if quantization.method != "none":
        weight = quantize_dequantize(weight, quantization)
        weight = weight if dtype is None else weight.to(dtype)
    return PlainLinear(weight=weight, bias=bias, quantization=quantization)


def prepare_plain_rounded(
    weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype | None
) -> PlainLinear:
    """Keep what a rounded weight stands for, in `dtype`; None keeps float32, which is exact."""
    values = weight.dequantized()
    values = values if dtype is None else values.to(dtype)
    return PlainLinear(weight=values, bias=bias, quantization=weight.quantization)


def plain(weight: LinearWeight) -> PlainLinear:
    """A weight that `prepare_plain` made."""
    assert isinstance(weight, PlainLinear), type(weight)
    return weight
