"""The part of attention that all families share: store keys and values, then attend over the blocks."""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.batch import ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """Attention of one layer over its slab of the pool. Letters: T tokens, H, N heads, D head size."""

    kernels: ops.KernelSet
    layer_idx: int
    shape: ops.AttentionShape

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor, batch: ForwardBatch) -> Tensor:
        """Write this step's keys and values, then attend.

        Args:
            query: [T, H, D], rotated.
            keys: [T, N, D], rotated.
            values: [T, N, D].
            batch: the step; this layer's slab is changed.

        Returns:
            [T, H * D].
        """
        group, slab = batch.attention(self.layer_idx)
        ops.write_kv(self.kernels, keys, values, slab, group.slot_mapping)
        return ops.paged_attention(self.kernels, query, slab, group, self.shape).flatten(1)
