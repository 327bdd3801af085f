"""A dense layer over a checkpoint's weight, without a copy of it."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`x @ weight.T + bias`."""

    kernels: ops.KernelSet
    weight: Tensor
    """[out_features, in_features]"""
    bias: Tensor | None = None
    """[out_features]"""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        return ops.linear(self.kernels, x, self.weight, self.bias)
