"""A dense layer over a prepared weight."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import LoraSite


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`x @ weight.T + bias`."""

    kernels: ops.KernelSet
    weight: ops.LinearWeight
    """[out_features, in_features], with its bias."""
    site: LoraSite | None = None
    """Where adapters act on the product; None if they do not."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        y = ops.linear(self.kernels, x, self.weight)
        return y if self.site is None else ops.lora(self.kernels, x, y, self.site)
