"""KV manager and prefix tree under any life of sequences: a vocabulary of 2, tiny blocks, every invariant.

The content of each block is tracked beside the real thing: whatever a table points to must hold the tokens
that the table says, whoever computed them.
"""

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from penstock.engine.kv.block_table import SequenceBlocks
from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.kv.prefix_tree import NO_BLOCK
from penstock.sim.checkers import check_pool, check_tree

BLOCK_SIZE = 2
texts = st.lists(st.integers(0, 1), min_size=1, max_size=9)


class Live:
    """A sequence: its tokens, how many are computed, its blocks."""

    def __init__(self, blocks: SequenceBlocks, tokens: list[int]) -> None:
        self.blocks = blocks
        self.tokens = tokens
        self.num_computed = 0


class KvMachine(RuleBasedStateMachine):
    windows: tuple[int | None, ...] = (None,)

    @initialize(num_blocks=st.integers(4, 14), caching=st.booleans())
    def start(self, num_blocks: int, caching: bool) -> None:
        self.kv = KvManager(
            make_cache_layout(self.windows),
            num_blocks=num_blocks,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=caching,
        )
        self.live: list[Live] = []
        self.content: dict[int, dict[int, tuple[int, ...]]] = {block: {} for block in range(num_blocks)}
        self.zero_owed: set[int] = set()

    def pick(self, idx: int) -> Live | None:
        return self.live[idx % len(self.live)] if self.live else None

    @rule(tokens=texts, tenant=st.sampled_from("ab"))
    def begin(self, tokens: list[int], tenant: str) -> None:
        seq = Live(self.kv.new_sequence(adapter_revision="", tenant_id=tenant, cache_salt=""), list(tokens))
        match = self.kv.match(seq.blocks, seq.tokens, num_tokens=len(tokens))
        seq.num_computed = self.kv.acquire(seq.blocks, match)
        assert seq.num_computed < len(tokens)
        self.live.append(seq)

    @rule(idx=st.integers(0, 9), chunk=st.integers(1, 6))
    def compute(self, idx: int, chunk: int) -> None:
        seq = self.pick(idx)
        if seq is None or seq.num_computed == len(seq.tokens):
            return
        self.kv.free_behind_window(seq.blocks, num_computed_tokens=seq.num_computed)
        wanted = min(chunk, len(seq.tokens) - seq.num_computed)
        num_fit = self.kv.num_tokens_allocatable(seq.blocks, start=seq.num_computed, num_tokens=wanted)
        if num_fit <= 0:
            return
        end = seq.num_computed + num_fit
        self.kv.allocate(seq.blocks, start=seq.num_computed, end=end)
        for block in self.kv.take_blocks_to_zero():
            self.content[block].clear()
        for src, dst in self.kv.take_copies():
            self.content[dst] = dict(self.content[src])
        self.write(seq, end)
        if not seq.blocks.has_lost_path:
            self.kv.cache_full_blocks(seq.blocks, seq.tokens, num_computed_tokens=end)

    def write(self, seq: Live, end: int) -> None:
        for table in seq.blocks.tables:
            for position in range(seq.num_computed, end):
                prefix = tuple(seq.tokens[: position + 1])
                self.content[table[position // BLOCK_SIZE]][position % BLOCK_SIZE] = prefix
        seq.num_computed = end

    @rule(idx=st.integers(0, 9), token=st.integers(0, 1))
    def append(self, idx: int, token: int) -> None:
        seq = self.pick(idx)
        if seq is not None and len(seq.tokens) < 12:
            seq.tokens.append(token)

    @rule(idx=st.integers(0, 9))
    def fork(self, idx: int) -> None:
        seq = self.pick(idx)
        if seq is None or len(self.live) > 5:
            return
        other = Live(self.kv.fork(seq.blocks), list(seq.tokens))
        other.num_computed = seq.num_computed
        self.live.append(other)

    @rule(idx=st.integers(0, 9), taint=st.booleans())
    def end(self, idx: int, taint: bool) -> None:
        seq = self.pick(idx)
        if seq is None:
            return
        self.live.remove(seq)
        self.kv.free(seq.blocks, taint=taint)

    @invariant()
    def pool_and_tree_are_sound(self) -> None:
        check_pool(self.kv, [seq.blocks for seq in self.live], held=())
        check_tree(self.kv.tree, self.kv)

    @invariant()
    def every_table_holds_its_own_tokens(self) -> None:
        for seq in self.live:
            for group, table in enumerate(seq.blocks.tables):
                first = seq.blocks.heads[group] * BLOCK_SIZE
                for position in range(first, seq.num_computed):
                    block = table[position // BLOCK_SIZE]
                    assert block != NO_BLOCK
                    assert self.content[block][position % BLOCK_SIZE] == tuple(seq.tokens[: position + 1])

    def teardown(self) -> None:
        if not hasattr(self, "kv"):
            return
        for seq in self.live:
            self.kv.free(seq.blocks)
        usage = self.kv.usage()
        assert usage.num_owned == 0
        assert usage.num_free + usage.num_cached == usage.num_blocks


@pytest.mark.parametrize("windows", [(None,), (3,), (None, 2), (None, 3, 5)], ids=str)
def test_kv_manager_keeps_its_invariants(windows):
    machine = type("Machine", (KvMachine,), {"windows": windows})
    case = machine.TestCase
    case.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
    case("runTest").runTest()
