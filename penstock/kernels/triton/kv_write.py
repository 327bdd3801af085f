"""How keys and values of a block lie, and how new ones get there."""

from torch import Tensor

from penstock.kernels.batch import KvBlock, KvShape, KvSlab
from penstock.kernels.reference import attention


def kv_block(shape: KvShape) -> KvBlock:
    """As `ops.kv_block`: token by token."""
    return KvBlock(shape=(shape.block_size, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype)


def write_kv(keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`."""
    attention.write_kv(keys, values, slab, slot_mapping)
