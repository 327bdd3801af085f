"""A dense layer over a prepared weight."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import LoraSite
from penstock.parallel.rank import Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear:
    """`x @ weight.T + bias`."""

    kernels: ops.KernelSet
    weight: ops.LinearWeight
    """[out_features, in_features], with its bias."""
    site: LoraSite | None = None
    """Where adapters act on the product; None if they do not."""
    summed_over: Rank | None = None
    """Set where each rank has some of the inputs: the product is the sum over the ranks."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, in_features] to [T, out_features]."""
        y = ops.linear(self.kernels, x, self.weight)
        if self.site is not None:
            y = ops.lora(self.kernels, x, y, self.site)
        return y if self.summed_over is None else self.summed_over.sum(y)
