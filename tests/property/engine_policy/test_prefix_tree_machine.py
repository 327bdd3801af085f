"""Prefix tree under any order of entries, hits and evictions: a vocabulary of 2, against a plain dictionary."""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.prefix_tree import Namespace, PrefixTree, TreeNode, block_keys

NUM_BLOCKS = 6
texts = st.lists(st.integers(0, 1), min_size=1, max_size=4)
namespaces = st.sampled_from([Namespace("m", "f", "", "a", ""), Namespace("m", "f", "", "b", "")])


class PrefixTreeMachine(RuleBasedStateMachine):
    """The model: the block of every text that is in the tree; blocks of one token."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.tree = PrefixTree(self.pool, windows=(None,), block_size=1)
        self.known: dict[tuple[Namespace, tuple[int, ...]], int] = {}
        self.held: list[tuple[Namespace, list[TreeNode], list[int]]] = []

    def forget_evicted(self) -> None:
        self.known = {key: block for key, block in self.known.items() if self.pool.is_in_tree(block)}

    @rule(namespace=namespaces, tokens=texts)
    def enter(self, namespace: Namespace, tokens: list[int]) -> None:
        """Take the hit, compute the rest as far as blocks reach, and keep it all."""
        path = self.tree.match(namespace, block_keys(tokens, block_size=1)).path
        for node in path:
            self.pool.acquire(node.blocks[0])
        path = list(path)
        for depth in range(len(path), len(tokens)):
            if self.pool.num_free + self.pool.num_cached == 0:
                break
            if self.pool.num_free == 0:
                self.tree.evict_oldest()
                self.forget_evicted()
            block = self.pool.allocate()
            parent = path[-1] if path else self.tree.pin_root(namespace)
            placed = self.tree.child(parent, block_keys(tokens, block_size=1)[depth])
            assert placed is not None
            assert placed[1]
            self.tree.put_block(placed[0], 0, block)
            if not path:
                self.tree.unpin(parent)
            path.append(placed[0])
            self.known[(namespace, tuple(tokens[: depth + 1]))] = block
        self.held.append((namespace, path, tokens))

    @rule(idx=st.integers(0, 9))
    def let_go(self, idx: int) -> None:
        if self.held:
            _, path, _ = self.held.pop(idx % len(self.held))
            for node in reversed(path):
                self.pool.release(node.blocks[0])

    @rule()
    def evict(self) -> None:
        if self.pool.num_cached:
            before = self.pool.num_free
            self.tree.evict_oldest()
            self.forget_evicted()
            assert self.pool.num_free > before

    @rule(namespace=namespaces, tokens=texts)
    def match(self, namespace: Namespace, tokens: list[int]) -> None:
        """A hit is the longest prefix whose every part is known, with exactly its blocks."""
        expected = []
        for depth in range(1, len(tokens) + 1):
            block = self.known.get((namespace, tuple(tokens[:depth])))
            if block is None:
                break
            expected.append(block)
        path = self.tree.match(namespace, block_keys(tokens, block_size=1)).path
        assert [node.blocks[0] for node in path] == expected

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.tree.num_nodes == len(self.known)
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_owned == NUM_BLOCKS
        assert len(self.known) == self.pool.num_cached + self.pool.num_owned


PrefixTreeMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=30, deadline=None)
test_prefix_tree_finds_exactly_what_was_entered = PrefixTreeMachine.TestCase
