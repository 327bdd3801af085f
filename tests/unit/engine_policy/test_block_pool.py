"""Block pool: exact ids and counts on tiny sizes."""

import pytest

from penstock.engine.kv.block_pool import BlockPool


def counts(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_owned


def test_blocks_come_in_order_of_id_at_first():
    pool = BlockPool(3)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    assert counts(pool) == (0, 0, 3)


def test_the_block_freed_last_is_used_first():
    pool = BlockPool(3)
    for _ in range(3):
        pool.allocate()
    pool.release(0)
    pool.release(2)
    assert pool.allocate() == 2
    assert pool.allocate() == 0


def test_a_block_is_free_only_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.acquire(block)
    pool.release(block)
    assert counts(pool) == (1, 0, 1)
    pool.release(block)
    assert counts(pool) == (2, 0, 0)


def test_a_block_in_the_tree_stays_cached_and_a_hit_owns_it_again():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.add_to_tree(block)
    pool.release(block)
    assert counts(pool) == (1, 1, 0)
    pool.acquire(block)
    assert counts(pool) == (1, 0, 1)
    assert pool.ref_count(block) == 1


def test_removing_a_cached_block_from_the_tree_frees_it_and_an_owned_one_not():
    pool = BlockPool(2)
    cached, owned = pool.allocate(), pool.allocate()
    for block in (cached, owned):
        pool.add_to_tree(block)
    pool.release(cached)
    pool.remove_from_tree(cached)
    pool.remove_from_tree(owned)
    assert counts(pool) == (1, 0, 1)
    pool.release(owned)
    assert counts(pool) == (2, 0, 0)


def test_cached_blocks_are_ordered_by_the_time_of_release():
    pool = BlockPool(3)
    blocks = [pool.allocate() for _ in range(3)]
    for block in blocks:
        pool.add_to_tree(block)
    for block in (1, 0, 2):
        pool.release(block)
    pool.acquire(1)
    pool.release(1)
    assert pool.cached_ids == (0, 2, 1)
    assert pool.oldest_cached() == 0


def test_a_tainted_block_is_zeroed_once_when_it_becomes_free():
    pool = BlockPool(2)
    block = pool.allocate()
    pool.taint(block)
    assert pool.take_blocks_to_zero() == []
    pool.release(block)
    assert pool.take_blocks_to_zero() == [block]
    assert pool.allocate() == block
    pool.release(block)
    assert pool.take_blocks_to_zero() == []


def test_releasing_a_block_without_holder_is_our_bug():
    pool = BlockPool(1)
    with pytest.raises(AssertionError, match="no holder"):
        pool.release(0)
