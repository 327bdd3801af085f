"""The KV memory: one allocation, cut into blocks; a block holds `num_slabs` layers of keys and values.

It moves and clears bytes; who owns a block is `engine/kv`'s to know. The runner calls it.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.runner.host_memory import release_pages
from penstock.engine.scheduler.plan import BlockCopy
from penstock.kernels.batch import KvBlock, KvShape, KvSlab
from penstock.kernels.devices import CPU
from penstock.kernels.ops import kv_block
from penstock.models.interface import LoadedModel

KEYS_AND_VALUES: Final = 2


def bytes_per_block(layout: CacheLayout, *, block: KvBlock) -> int:
    """Bytes of one block: keys and values of `num_slabs` layers."""
    return layout.num_slabs * KEYS_AND_VALUES * block.num_bytes


def _zeros(shape: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros; on the CPU the kernel hands their pages out at first touch, not all now as in `torch.zeros`."""
    if device != CPU:
        return torch.zeros(*shape, dtype=dtype, device=device)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8)).view(dtype).view(*shape)


class KvPool:
    """Keys and values of every block.

    The storage is `[num_blocks + 1, num_slabs, 2, *block]`: all of a block lies in one piece, so that it is
    copied or cleared at the speed of memory, and a new one touches few new pages. What stands where inside a
    block of one layer is the kernels' to know. The last block belongs to no sequence: it is the runner's
    scratch.
    """

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_blocks: int,
        shape: KvShape,
        block: KvBlock,
        device: torch.device = CPU,
    ) -> None:
        """Reserve the memory; on the CPU its pages are touched when blocks are written.

        Args:
            layout: how layers share blocks.
            num_blocks: blocks that the scheduler may hand out, ids 0 to `num_blocks - 1`.
            shape: what a block of one layer holds.
            block: how the kernels keep it.
            device: where the model is.
        """
        self.device = device
        self.num_blocks = num_blocks
        self.block_size = shape.block_size
        self.scratch_block = num_blocks
        storage = (num_blocks + 1, layout.num_slabs, KEYS_AND_VALUES, *block.shape)
        self._storage = _zeros(storage, dtype=block.dtype, device=device)
        self._num_bytes = self._storage.nbytes
        self.bytes_per_block = self._storage.nbytes // (num_blocks + 1)
        self.slabs = tuple(
            KvSlab(keys=self._storage[:, slab, 0], values=self._storage[:, slab, 1], shape=shape)
            for slab in range(layout.num_slabs)
        )

    @property
    def storage(self) -> torch.Tensor:
        """[num_blocks + 1, *block]: all of a block in one piece, for whoever copies whole blocks."""
        return self._storage

    def release(self) -> None:
        """Give the memory back until `restore`; what was in it is lost.

        On a CPU its pages are handed back to the kernel, and come again as zeros when they are touched.
        """
        if self._storage.device.type == "cpu":
            release_pages(self._storage)
        else:
            self._storage.untyped_storage().resize_(0)

    def restore(self) -> None:
        """Take the memory again, all zeros: a slot that is masked still must be finite."""
        if self._storage.device.type != "cpu":
            self._storage.untyped_storage().resize_(self._num_bytes)
            self._storage.zero_()

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy on write: `dst` becomes equal to `src` in all layers. No block is both in one call."""
        for copy in copies:  # one by one: no memory is needed beside the pool
            self._storage[copy.dst].copy_(self._storage[copy.src])

    def zero_blocks(self, block_ids: Sequence[int]) -> None:
        """Clear blocks in all layers: NaN times a weight of zero would still be NaN."""
        for block_id in block_ids:
            self._storage[block_id].zero_()


def pool_for(loaded: LoadedModel, layout: CacheLayout, *, num_blocks: int, block_size: int) -> KvPool:
    """A pool on the model's device, its blocks as the model's kernels keep them."""
    shape = loaded.kv_shape(block_size=block_size)
    block = kv_block(loaded.kernels, shape)
    return KvPool(layout, num_blocks=num_blocks, shape=shape, block=block, device=loaded.device)


def layer_slabs(layout: CacheLayout, *, slabs: Sequence[KvSlab]) -> tuple[KvSlab, ...]:
    """For each model layer its keys and values: layer j of a group uses slab j."""
    by_layer = {layer: slabs[j] for group in layout.groups for j, layer in enumerate(group.layers)}
    return tuple(by_layer[layer] for layer in sorted(by_layer))


def layer_groups(layout: CacheLayout) -> tuple[int, ...]:
    """For each model layer the index of its cache group."""
    by_layer = {layer: idx for idx, group in enumerate(layout.groups) for layer in group.layers}
    return tuple(by_layer[layer] for layer in sorted(by_layer))
