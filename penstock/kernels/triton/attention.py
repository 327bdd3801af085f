"""Paged attention."""

from torch import Tensor

from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.ops import AttentionShape
from penstock.kernels.reference import attention


def paged_attention(
    query: Tensor, slab: KvSlab, batch: AttentionBatch, *, shape: AttentionShape, is_deterministic: bool
) -> Tensor:
    """As `ops.paged_attention`."""
    del is_deterministic
    return attention.paged_attention(query, slab, batch, shape)
