"""KV manager: exact block ids for allocation, hits, windows, forks, copies and freeing."""

from penstock.engine.kv.block_needs import num_blocks_needed
from penstock.engine.kv.block_table import SequenceBlocks
from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.kv.kv_manager import KvManager


def make_kv(
    num_blocks: int = 8, windows: tuple[int | None, ...] = (None,), caching: bool = True
) -> KvManager:
    return KvManager(
        make_cache_layout(windows), num_blocks=num_blocks, block_size=4, enable_prefix_caching=caching
    )


def new(kv: KvManager, tenant: str = "t") -> SequenceBlocks:
    return kv.new_sequence(adapter_revision="", tenant_id=tenant, cache_salt="")


def compute(kv: KvManager, blocks: SequenceBlocks, tokens: list[int], *, start: int = 0) -> None:
    """Allocate, pretend to compute, and enter the full blocks."""
    kv.free_behind_window(blocks, num_computed_tokens=start)
    kv.allocate(blocks, start=start, end=len(tokens))
    kv.cache_full_blocks(blocks, tokens, num_computed_tokens=len(tokens))


def usage(kv: KvManager) -> tuple[int, int, int]:
    figures = kv.usage()
    return figures.num_free, figures.num_cached, figures.num_owned


def test_blocks_are_allocated_when_they_are_needed():
    kv = make_kv()
    seq = new(kv)
    kv.allocate(seq, start=0, end=4)
    assert seq.tables == ([0],)
    kv.allocate(seq, start=4, end=5)
    kv.allocate(seq, start=5, end=8)
    assert seq.tables == ([0, 1],)


def test_full_blocks_stay_as_cache_and_the_partial_one_is_free():
    kv = make_kv()
    seq = new(kv)
    compute(kv, seq, [1] * 10)
    kv.free(seq)
    assert usage(kv) == (6, 2, 0)
    assert kv.pool.cached_ids == (1, 0)


def test_a_hit_leaves_at_least_the_last_token():
    kv = make_kv()
    first = new(kv)
    compute(kv, first, [1] * 8)
    second = new(kv)
    match = kv.match(second, [1] * 8, num_tokens=8)
    assert kv.acquire(second, match) == 4
    assert second.tables == ([0],)
    assert kv.pool.ref_count(0) == 2


def test_tenants_do_not_share():
    kv = make_kv()
    compute(kv, new(kv, "a"), [1] * 8)
    assert kv.match(new(kv, "b"), [1] * 9, num_tokens=9).num_blocks == 0


def test_without_caching_nothing_hits_and_nothing_stays():
    kv = make_kv(caching=False)
    seq = new(kv)
    compute(kv, seq, [1] * 8)
    assert kv.match(new(kv), [1] * 9, num_tokens=9).num_blocks == 0
    kv.free(seq)
    assert usage(kv) == (8, 0, 0)


def test_window_groups_free_what_lies_behind():
    # Groups of one layer each: full attention and window 6. Token 14 attends to 9..14.
    kv = make_kv(windows=(None, 6), caching=False)
    seq = new(kv)
    kv.allocate(seq, start=0, end=14)
    kv.free_behind_window(seq, num_computed_tokens=14)
    assert seq.tables == ([0, 2, 4, 6], [-1, -1, 5, 7])
    assert seq.heads == [0, 2]
    assert usage(kv) == (2, 0, 6)


def test_a_hit_on_a_window_group_takes_only_its_window():
    kv = make_kv(num_blocks=16, windows=(None, 6))
    first = new(kv)
    compute(kv, first, [1] * 16)
    second = new(kv)
    assert kv.acquire(second, kv.match(second, [1] * 14, num_tokens=14)) == 12
    # Token 12 attends to 7..12: block 1 on.
    assert second.tables == ([0, 2, 4], [-1, 3, 5])


def test_eviction_makes_room_for_allocation():
    kv = make_kv(num_blocks=3)
    old = new(kv)
    compute(kv, old, [1] * 8)
    kv.free(old)
    seq = new(kv)
    assert kv.num_tokens_allocatable(seq, start=0, num_tokens=100) == 12
    kv.allocate(seq, start=0, end=12)
    # The free block first, then the deepest cached one.
    assert seq.tables == ([2, 1, 0],)
    assert kv.usage().num_tree_nodes == 0


def test_two_sequences_that_computed_the_same_end_up_sharing():
    kv = make_kv()
    one, two = new(kv), new(kv)
    kv.allocate(one, start=0, end=8)
    kv.allocate(two, start=0, end=8)
    kv.cache_full_blocks(one, [1] * 8, num_computed_tokens=8)
    assert kv.cache_full_blocks(two, [1] * 8, num_computed_tokens=8) == 0
    assert two.tables == one.tables == ([0, 1],)
    assert usage(kv) == (6, 0, 2)


def test_a_fork_shares_all_blocks_and_the_writer_copies_the_partial_one():
    kv = make_kv()
    leader = new(kv)
    compute(kv, leader, [1] * 6)
    other = kv.fork(leader)
    assert other.tables == ([0, 1],)
    kv.allocate(leader, start=6, end=7)
    kv.allocate(other, start=6, end=7)
    assert leader.tables == ([0, 2],)
    assert other.tables == ([0, 1],)
    assert [tuple(copy) for copy in kv.take_copies()] == [(1, 2)]
    assert kv.take_copies() == []


def test_a_fork_at_the_edge_of_a_block_copies_nothing():
    kv = make_kv()
    leader = new(kv)
    compute(kv, leader, [1] * 8)
    other = kv.fork(leader)
    kv.allocate(leader, start=8, end=9)
    kv.allocate(other, start=8, end=9)
    assert (leader.tables, other.tables) == (([0, 1, 2],), ([0, 1, 3],))
    assert kv.take_copies() == []


def test_a_copy_for_a_sequence_that_left_the_step_is_forgotten():
    kv = make_kv()
    leader = new(kv)
    compute(kv, leader, [1] * 6)
    other = kv.fork(leader)
    kv.allocate(leader, start=6, end=7)
    kv.drop_copies_to(other)
    kv.drop_copies_to(leader)
    kv.free(leader)
    assert kv.take_copies() == []
    kv.free(other)
    assert kv.usage().num_owned == 0


def test_bad_kv_leaves_the_tree_and_is_zeroed_when_nobody_holds_it():
    kv = make_kv()
    good = new(kv)
    compute(kv, good, [1] * 4)
    bad = new(kv)
    kv.acquire(bad, kv.match(bad, [1] * 4 + [2] * 6, num_tokens=10))
    compute(kv, bad, [1] * 4 + [2] * 6, start=4)
    sharer = new(kv)
    kv.acquire(sharer, kv.match(sharer, [1] * 4 + [2] * 5, num_tokens=9))
    kv.free(bad, taint=True)
    assert sharer.has_lost_path
    assert not good.has_lost_path
    assert kv.match(new(kv), [1] * 4 + [2] * 6, num_tokens=10).num_blocks == 1
    assert kv.take_blocks_to_zero() == [2]
    kv.free(sharer, taint=True)
    assert kv.take_blocks_to_zero() == [1]


def test_a_sequence_whose_path_was_removed_enters_nothing_more():
    kv = make_kv()
    bad = new(kv)
    compute(kv, bad, [2] * 4)
    sharer = new(kv)
    kv.acquire(sharer, kv.match(sharer, [2] * 5, num_tokens=5))
    kv.free(bad, taint=True)
    kv.allocate(sharer, start=4, end=8)
    assert kv.cache_full_blocks(sharer, [2] * 8, num_computed_tokens=8) == 0
    assert kv.usage().num_tree_nodes == 0


def test_unused_slots_are_those_of_blocks_that_are_not_full():
    kv = make_kv()
    seq = new(kv)
    kv.allocate(seq, start=0, end=10)
    unused: dict[int, int] = {}
    kv.add_unused_slots(unused, seq, num_computed_tokens=5)
    assert unused == {1: 3, 2: 4}


def test_most_blocks_needed_by_hand():
    def needed(num_tokens: int, *, prompt: int, n: int, windows: tuple[int | None, ...]) -> int:
        return num_blocks_needed(num_tokens, num_shared_tokens=prompt, n=n, windows=windows, block_size=4)

    assert needed(9, prompt=6, n=1, windows=(None,)) == 3
    # One prompt block is shared, two more are each answer's own.
    assert needed(9, prompt=6, n=3, windows=(None,)) == 1 + 3 * 2
    # A window of 6 touches at most 3 blocks of 4: e.g. 3..8.
    assert needed(100, prompt=6, n=1, windows=(6,)) == 3
    assert needed(5, prompt=4, n=1, windows=(None, 6)) == 4
    assert needed(100, prompt=4, n=1, windows=(1,)) == 1
