"""Block pool under any sequence of calls: free + cached + owned = total, against an obvious model."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from penstock.engine.kv.block_pool import BlockPool

NUM_BLOCKS = 4
blocks = st.integers(0, NUM_BLOCKS - 1)


class BlockPoolMachine(RuleBasedStateMachine):
    """The model: a reference count, a mark and the order of release for each block."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(NUM_BLOCKS)
        self.refs = [0] * NUM_BLOCKS
        self.marked: set[int] = set()
        self.cached: list[int] = []
        self.tainted: set[int] = set()
        self.zeroed: list[int] = []

    def free(self) -> set[int]:
        return {block for block in range(NUM_BLOCKS) if not self.refs[block] and block not in self.marked}

    def became_free(self, block: int) -> None:
        if block in self.tainted:
            self.tainted.discard(block)
            self.zeroed.append(block)

    @precondition(lambda self: self.free())
    @rule()
    def allocate(self) -> None:
        block = self.pool.allocate()
        assert block in self.free()
        self.refs[block] = 1

    @rule(block=blocks)
    def acquire(self, block: int) -> None:
        if block in self.free():
            return
        self.pool.acquire(block)
        self.refs[block] += 1
        if block in self.cached:
            self.cached.remove(block)

    @rule(block=blocks)
    def release(self, block: int) -> None:
        if not self.refs[block]:
            return
        self.pool.release(block)
        self.refs[block] -= 1
        if not self.refs[block]:
            if block in self.marked:
                self.cached.append(block)
            else:
                self.became_free(block)

    @rule(block=blocks)
    def add_to_tree(self, block: int) -> None:
        if self.refs[block] and block not in self.marked:
            self.pool.add_to_tree(block)
            self.marked.add(block)

    @rule(block=blocks)
    def remove_from_tree(self, block: int) -> None:
        if block not in self.marked:
            return
        self.pool.remove_from_tree(block)
        self.marked.discard(block)
        if block in self.cached:
            self.cached.remove(block)
            self.became_free(block)

    @rule(block=blocks)
    def taint(self, block: int) -> None:
        self.pool.taint(block)
        if block not in self.free():
            self.tainted.add(block)

    @rule()
    def zero(self) -> None:
        assert self.pool.take_blocks_to_zero() == self.zeroed
        self.zeroed.clear()

    @invariant()
    def agrees_with_the_model(self) -> None:
        pool = self.pool
        assert pool.num_free + pool.num_cached + pool.num_owned == NUM_BLOCKS
        assert set(pool.free_ids) == self.free()
        assert list(pool.cached_ids) == self.cached
        assert [pool.ref_count(block) for block in range(NUM_BLOCKS)] == self.refs
        assert pool.num_owned == sum(count > 0 for count in self.refs)


BlockPoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
test_block_pool_keeps_its_invariant = BlockPoolMachine.TestCase
