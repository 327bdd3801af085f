"""A layer of experts, of which each token uses a few."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops
from penstock.parallel.rank import ALONE, Rank


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseMoe:
    """Router and gated experts."""

    kernels: ops.KernelSet
    router: Tensor
    """[num_experts, hidden_size]"""
    experts: tuple[ops.ExpertWeights, ...]
    shape: ops.MoeShape
    rank: Rank = ALONE
    """Which has a part of every expert's inner size."""

    def __call__(self, x: Tensor) -> Tensor:
        """[T, hidden_size] to the same shape."""
        return self.rank.sum(ops.moe(self.kernels, x, self.router, self.experts, self.shape))
