"""Prefix tree: hits, namespaces, windows, eviction order, on tiny sizes."""

from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.prefix_tree import (
    NO_BLOCK,
    Namespace,
    PrefixTree,
    TreeNode,
    block_keys,
    first_window_block,
)

HOME = Namespace("m", "float32", "", "tenant", "")


def make_tree(num_blocks: int = 16, windows: tuple[int | None, ...] = (None,), block_size: int = 2):
    pool = BlockPool(num_blocks)
    return PrefixTree(pool, windows=windows, block_size=block_size), pool


def put(tree: PrefixTree, pool: BlockPool, tokens: list[int], namespace: Namespace = HOME) -> list[TreeNode]:
    """Enter all whole blocks of `tokens`; the blocks stay owned once."""
    node = tree.pin_root(namespace)
    path = []
    for key in block_keys(tokens, block_size=2):
        placed = tree.child(node, key)
        assert placed is not None
        child, is_new = placed
        if is_new:
            for group in range(len(child.blocks)):
                tree.put_block(child, group, pool.allocate())
        tree.pin(child)
        tree.unpin(node)
        node = child
        path.append(child)
    tree.unpin(node)
    return path


def release(pool: BlockPool, path: list[TreeNode]) -> None:
    for node in reversed(path):
        for block in node.blocks:
            pool.release(block)


def hit(tree: PrefixTree, tokens: list[int], namespace: Namespace = HOME) -> list[list[int]]:
    return [node.blocks for node in tree.match(namespace, block_keys(tokens, block_size=2)).path]


def test_keys_are_the_exact_tokens():
    assert block_keys([1, 2, 3, 4], block_size=2) == [
        b"\x01\0\0\0\x02\0\0\0",
        b"\x03\0\0\0\x04\0\0\0",
    ]


def test_the_longest_common_prefix_of_whole_blocks_hits():
    tree, pool = make_tree()
    put(tree, pool, [1, 1, 2, 2, 3, 3])
    assert hit(tree, [1, 1, 2, 2, 9, 9]) == [[0], [1]]
    assert hit(tree, [9, 9, 2, 2]) == []


def test_two_texts_share_their_common_nodes():
    tree, pool = make_tree()
    first = put(tree, pool, [1, 1, 2, 2])
    second = put(tree, pool, [1, 1, 3, 3])
    assert first[0] is second[0]
    assert tree.num_nodes == 3


def test_no_part_of_the_namespace_may_differ():
    tree, pool = make_tree()
    put(tree, pool, [1, 1])
    for other in (
        HOME._replace(model_revision="n"),
        HOME._replace(kv_dtype="bfloat16"),
        HOME._replace(adapter_revision="lora"),
        HOME._replace(tenant_id="other"),
        HOME._replace(cache_salt="salt"),
    ):
        assert hit(tree, [1, 1], other) == []


def test_tenant_and_salt_do_not_run_into_each_other():
    tree, pool = make_tree()
    put(tree, pool, [1, 1], HOME._replace(tenant_id="ab", cache_salt="c"))
    assert hit(tree, [1, 1], HOME._replace(tenant_id="a", cache_salt="bc")) == []


def test_the_least_recently_used_leaf_is_evicted_first_and_parents_after_children():
    tree, pool = make_tree()
    old = put(tree, pool, [1, 1, 2, 2])
    new = put(tree, pool, [5, 5])
    release(pool, old)
    release(pool, new)
    tree.evict_oldest()
    assert hit(tree, [1, 1, 2, 2]) == [[0]]
    tree.evict_oldest()
    assert hit(tree, [1, 1]) == []
    assert hit(tree, [5, 5]) == [[2]]


def test_a_hit_makes_a_prefix_young_again():
    tree, pool = make_tree()
    first, second = put(tree, pool, [1, 1]), put(tree, pool, [2, 2])
    release(pool, first)
    release(pool, second)
    pool.acquire(0)
    pool.release(0)
    tree.evict_oldest()
    assert hit(tree, [1, 1]) == [[0]]
    assert hit(tree, [2, 2]) == []


def test_a_namespace_without_blocks_is_forgotten():
    tree, pool = make_tree()
    release(pool, put(tree, pool, [1, 1, 2, 2]))
    tree.evict_oldest()
    tree.evict_oldest()
    assert tree.roots == {}
    assert tree.num_nodes == 0
    assert pool.num_free == pool.num_blocks


def test_first_window_block_by_hand():
    # block_size 4, window 6: the token at 12 attends to 7..12.
    assert first_window_block(12, window=6, block_size=4) == 1
    assert first_window_block(13, window=6, block_size=4) == 2
    assert first_window_block(3, window=6, block_size=4) == 0
    assert first_window_block(8, window=1, block_size=4) == 2


def test_a_window_group_needs_only_the_blocks_of_its_window():
    # Window 3, block_size 2: after 6 tokens the next attends to tokens 4 and 5, block 2 alone.
    tree, pool = make_tree(windows=(None, 3))
    path = put(tree, pool, [1, 1, 2, 2, 3, 3])
    window_blocks = [node.blocks[1] for node in path]
    for block in window_blocks[:2]:
        pool.release(block)
        tree.evict_oldest()
    assert [node.blocks[1] for node in path] == [NO_BLOCK, NO_BLOCK, window_blocks[2]]
    assert len(hit(tree, [1, 1, 2, 2, 3, 3])) == 3
    assert hit(tree, [1, 1, 2, 2]) == []


def test_a_hit_is_the_shortest_over_the_groups():
    tree, pool = make_tree(windows=(None, 3))
    path = put(tree, pool, [1, 1, 2, 2, 3, 3])
    pool.release(path[2].blocks[1])
    tree.evict_oldest()
    assert len(hit(tree, [1, 1, 2, 2, 3, 3])) == 2


def test_evicting_a_full_block_evicts_the_node():
    tree, pool = make_tree(windows=(None, 3))
    release(pool, put(tree, pool, [1, 1]))
    tree.evict_oldest()
    assert tree.num_nodes == 0
    assert pool.num_free == pool.num_blocks


def test_removing_a_subtree_takes_all_below_and_taints_what_is_held():
    tree, pool = make_tree()
    path = put(tree, pool, [1, 1, 2, 2, 3, 3])
    tree.remove_subtree(path[1], taint=True)
    assert hit(tree, [1, 1, 2, 2, 3, 3]) == [[0]]
    assert [node.is_attached for node in path] == [True, False, False]
    for block in (2, 1, 0):
        pool.release(block)
    assert pool.take_blocks_to_zero() == [2, 1]
    assert pool.num_cached == 1


def test_the_number_of_nodes_is_bounded_even_where_nodes_lose_their_blocks():
    tree, pool = make_tree(num_blocks=2, windows=(3,))
    for text in range(40):
        release(pool, [node for node in put(tree, pool, [text, text]) if node.blocks[0] != NO_BLOCK])
        if pool.num_free == 0:
            tree.evict_oldest()
    assert tree.num_nodes <= 4 * pool.num_blocks
    assert tree.approximate_bytes == tree.num_nodes * 408
