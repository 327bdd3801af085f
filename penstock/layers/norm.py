"""Normalisation layers."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm:
    """Root mean square norm, over a token's features or over each head."""

    kernels: ops.KernelSet
    weight: Tensor
    """[features]"""
    eps: float
    weight_offset: float = 0.0
    """1.0 where the checkpoint stores the weight minus one (Gemma)."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., features] to the same shape."""
        return ops.rms_norm(self.kernels, x, self.weight, eps=self.eps, weight_offset=self.weight_offset)

    def add(self, x: Tensor | None, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Norm of `x + residual`, and that sum; all [T, features]. None adds nothing."""
        if x is None:
            return self(residual), residual
        return ops.add_rms_norm(
            self.kernels, x, residual, self.weight, eps=self.eps, weight_offset=self.weight_offset
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm:
    """Mean and variance norm with bias."""

    kernels: ops.KernelSet
    weight: Tensor
    """[features]"""
    bias: Tensor
    """[features]"""
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        """[T, features] to the same shape."""
        return ops.layer_norm(self.kernels, x, self.weight, self.bias, eps=self.eps)
