"""Mixtures of experts: tokens sorted by expert, one product for each expert that has any."""

from collections.abc import Sequence

from torch import Tensor

from penstock.kernels.eager import dense
from penstock.kernels.ops import ExpertWeights, MoeShape


def moe(x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
    """As `ops.moe`."""
    return dense.moe(x, router, experts, shape)
