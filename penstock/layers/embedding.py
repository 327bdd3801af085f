"""Token embedding and the head that maps hidden states to logits; they may share one weight."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops
from penstock.parallel.rank import ALONE, Rank


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
class SharedEmbedding(Embedding):
    """The same where each rank has some of the rows: it adds nothing for the others'."""

    rank: Rank
    num_rows: int
    """Of all ranks."""

    def __call__(self, indices: Tensor) -> Tensor:
        """As `Embedding`."""
        return self.scaled(indices, 1.0)

    def scaled(self, indices: Tensor, scale: float) -> Tensor:
        """As `Embedding.scaled`."""
        first, end = self.rank.rows(self.num_rows)
        is_mine = (indices >= first) & (indices < end)
        local = (indices - first).clamp(0, end - first - 1)
        rows = ops.embedding(self.kernels, local, self.weight, scale=scale)
        return self.rank.sum(rows * is_mine[:, None])


@dataclass(frozen=True, slots=True, kw_only=True)
class LmHead:
    """Hidden states to logits."""

    kernels: ops.KernelSet
    weight: ops.LinearWeight
    """[vocab_size, hidden_size]"""
    softcap: float | None = None
    """Logits become `softcap * tanh(logit / softcap)`; None for no cap."""
    rank: Rank = ALONE
    """Which has some of the weight's rows, unless it is alone."""
    vocab_size: int = 0
    """Rows of all ranks; read only if there are several."""

    def __call__(self, hidden: Tensor) -> Tensor:
        """[rows, hidden_size] to [rows, vocab_size] float32."""
        logits = ops.linear(self.kernels, hidden, self.weight).float()
        if not self.rank.is_alone:
            logits = self.rank.join(logits, total=self.vocab_size)
        return logits if self.softcap is None else ops.softcap(self.kernels, logits, cap=self.softcap)
