"""Token embedding and the head that maps hidden states to logits; they may share one weight."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding:
    """Rows of a table, by token id or by position."""

    kernels: ops.KernelSet
    weight: Tensor
    """[num_rows, hidden_size]"""

    def __call__(self, indices: Tensor) -> Tensor:
        """[T] int64 to [T, hidden_size]."""
        return ops.embedding(self.kernels, indices, self.weight)

    def scaled(self, indices: Tensor, scale: float) -> Tensor:
        """The same times `scale`, which is rounded to the weight's dtype first, as in training."""
        return ops.embedding(self.kernels, indices, self.weight, scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """Hidden states to logits."""

    kernels: ops.KernelSet
    weight: ops.LinearWeight
    """[vocab_size, hidden_size]"""
    softcap: float | None = None
    """Logits become `softcap * tanh(logit / softcap)`; None for no cap."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] to [rows, vocab_size] float32."""
        logits = ops.linear(self.kernels, hidden, self.weight).float()
        return logits if self.softcap is None else ops.softcap(self.kernels, logits, cap=self.softcap)
