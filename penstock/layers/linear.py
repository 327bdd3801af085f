"""A dense layer over a prepared weight."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`x @ weight.T + bias`."""

    kernels: ops.KernelSet
    weight: ops.LinearWeight
    """[out_features, in_features], with its bias."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        return ops.linear(self.kernels, x, self.weight)
