"""The pool: bytes, copy on write and clearing reach every layer of a block and nothing else."""

import pytest
import torch

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.kv_pool import KvPool, bytes_per_block
from penstock.engine.scheduler.plan import BlockCopy
from penstock.kernels.batch import KvBlock, KvShape
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.observe.memory import resident_bytes

LAYOUT = make_cache_layout((None, None, None))


def made_pool(num_blocks, *, block_size=2, num_kv_heads=2, head_dim=3, dtype=torch.float32):
    shape = KvShape(block_size=block_size, num_kv_heads=num_kv_heads, head_dim=head_dim, dtype=dtype)
    block = ReferenceKernels().kv_block(shape)
    return KvPool(LAYOUT, num_blocks=num_blocks, shape=shape, block=block)


def pool(num_blocks=6, dtype=torch.float32):
    made = made_pool(num_blocks, dtype=dtype)
    for number, slab in enumerate(made.slabs):
        slab.keys[:] = torch.arange(num_blocks + 1)[:, None, None, None] + 100 * number
        slab.values[:] = -slab.keys
    return made


def contents(made):
    return [[int(slab.keys[b].unique()) for b in range(made.num_blocks)] for slab in made.slabs]


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_a_block_is_keys_and_values_of_all_slabs(dtype, size):
    expected = 3 * 2 * (2 * 2 * 3) * size
    assert bytes_per_block(LAYOUT, block=KvBlock(shape=(2, 2, 3), dtype=dtype)) == expected
    made = pool(dtype=dtype)
    assert made.bytes_per_block == expected
    assert made.slabs[0].keys.shape == (7, 2, 2, 3)
    assert made.slabs[0].keys.dtype == dtype


def test_copy_on_write_copies_keys_and_values_in_every_layer_and_leaves_the_source():
    made = pool()
    made.copy_blocks([BlockCopy(1, 4), BlockCopy(2, 0)])
    assert contents(made) == [[2 + s, 1 + s, 2 + s, 3 + s, 1 + s, 5 + s] for s in (0, 100, 200)]
    assert all((slab.values == -slab.keys).all() for slab in made.slabs)


def test_a_copy_is_not_a_view():
    made = pool()
    made.copy_blocks([BlockCopy(1, 4)])
    made.slabs[0].keys[1] = 77
    assert contents(made)[0][4] == 1


def test_zeroing_clears_nan_in_every_layer_and_no_other_block():
    made = pool()
    made.slabs[2].values[3] = float("nan")
    made.zero_blocks([3])
    assert [row[3] for row in contents(made)] == [0, 0, 0]
    assert (made.slabs[2].values[3] == 0).all()
    assert [row[2] for row in contents(made)] == [2, 102, 202]


def test_a_pool_is_zero_at_first_and_takes_no_memory_until_it_is_written():
    before = resident_bytes()
    big = made_pool(1 << 16, block_size=16, num_kv_heads=4, head_dim=16)
    assert big.num_blocks * big.bytes_per_block == 3 * 2 * 16 * 4 * 16 * 4 * (1 << 16) == 1_610_612_736
    assert resident_bytes() - before < 100_000_000
    assert not big.slabs[1].keys[1000].any()
