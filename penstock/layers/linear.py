"""Dense layers over prepared weights, alone and several of one input."""

from dataclasses import dataclass
from typing import TypeAlias

import torch
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


@dataclass(frozen=True, slots=True, kw_only=True)
class SeparateLinears:
    """Several products of one input, one by one."""

    linears: tuple[Linear, ...]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in_features] to [T, out_features] of each."""
        return tuple(linear(x) for linear in self.linears)


@dataclass(frozen=True, slots=True, kw_only=True)
class JoinedLinears:
    """Several products of one input as one: where the kernels gain by it, or as the checkpoint has it."""

    product: Linear
    sizes: list[int]
    """Of each, in the order of the product's outputs."""
    sites: tuple[LoraSite | None, ...]
    """Where adapters act on each; those of a checkpoint that has it joined act on the product."""

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """[T, in_features] to [T, size] of each, columns of one tensor: from row to row lie all of them."""
        parts = torch.split(self.product(x), self.sizes, dim=1)
        return tuple(self._adapted(x, *each) for each in zip(parts, self.sites, strict=True))

    def _adapted(self, x: Tensor, part: Tensor, site: LoraSite | None) -> Tensor:
        return part if site is None else ops.lora(self.product.kernels, x, part, site)


Linears: TypeAlias = SeparateLinears | JoinedLinears
