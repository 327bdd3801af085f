"""Gives blocks to sequences: allocation on demand, prefix hits, forks, copy on write, freeing, figures.

It joins the pool, the tree and the block tables and keeps their invariants; it knows neither requests nor
time nor policy. Called by `engine/scheduler` only.
"""

from typing import Final, NamedTuple

import msgspec

from penstock.engine.kv.block_needs import num_blocks_needed
from penstock.engine.kv.block_pool import BlockPool
from penstock.engine.kv.block_table import SequenceBlocks
from penstock.engine.kv.cache_groups import CacheLayout
from penstock.engine.kv.prefix_tree import (
    NO_BLOCK,
    Namespace,
    PrefixMatch,
    PrefixTree,
    TreeNode,
    first_window_block,
)

EMPTY_MATCH: Final = PrefixMatch([])


class Copy(NamedTuple):
    """Copy on write: block `src` to block `dst`, before the step."""

    src: int
    dst: int


class KvUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The pool and the tree in numbers."""

    num_blocks: int
    num_free: int
    num_cached: int
    num_owned: int
    num_tree_nodes: int
    tree_bytes: int
    """Approximate host memory of the tree."""


class KvManager:
    """See the module."""

    def __init__(
        self,
        layout: CacheLayout,
        *,
        num_blocks: int,
        block_size: int,
        model_revision: str = "",
        kv_dtype: str = "",
        enable_prefix_caching: bool = True,
    ) -> None:
        self.block_size = block_size
        self.windows = layout.windows
        self.num_groups = len(layout.groups)
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)
        self.tree = PrefixTree(self.pool, windows=self.windows, block_size=block_size)
        self._model_revision = model_revision
        self._kv_dtype = kv_dtype
        self._windowed = [(g, w) for g, w in enumerate(self.windows) if w is not None]
        self._copies: list[Copy] = []

    @property
    def num_available(self) -> int:
        """Blocks that can be allocated now: free ones, and cached ones by eviction."""
        return self.pool.num_free + self.pool.num_cached

    def usage(self) -> KvUsage:
        """Figures of this moment; O(1)."""
        pool = self.pool
        return KvUsage(
            num_blocks=pool.num_blocks,
            num_free=pool.num_free,
            num_cached=pool.num_cached,
            num_owned=pool.num_owned,
            num_tree_nodes=self.tree.num_nodes,
            tree_bytes=self.tree.approximate_bytes,
        )

    def num_blocks_needed(self, num_tokens: int, *, num_shared_tokens: int, n: int) -> int:
        """`num_blocks_needed` for this pool."""
        return num_blocks_needed(
            num_tokens,
            num_shared_tokens=num_shared_tokens,
            n=n,
            windows=self.windows,
            block_size=self.block_size,
        )

    def num_missing(self, match: PrefixMatch, *, num_needed: int) -> int:
        """Of `num_needed` blocks, those that a hit does not bring; counted against `num_available`.

        A matched block that is owned saves one; one that is cached is in `num_available` already.
        """
        num_owned = 0
        for group in range(self.num_groups):
            for node in match.path[self.tree.first_needed(group, num_blocks=match.num_blocks) :]:
                num_owned += self.pool.ref_count(node.blocks[group]) > 0
        return max(0, num_needed - num_owned)

    def num_unallocated(self, blocks: SequenceBlocks, *, num_tokens: int) -> int:
        """Blocks of full-attention groups that a sequence of `num_tokens` does not have yet."""
        num_full_groups = self.num_groups - len(self._windowed)
        return num_full_groups * max(0, -(-num_tokens // self.block_size) - blocks.num_blocks)

    def add_unused_slots(
        self, unused: dict[int, int], blocks: SequenceBlocks, *, num_computed_tokens: int
    ) -> None:
        """Note for each block that is not full, and that forks may share, how many slots hold no token."""
        for block_idx in range(num_computed_tokens // self.block_size, blocks.num_blocks):
            num_used = max(0, num_computed_tokens - block_idx * self.block_size)
            for table in blocks.tables:
                unused[table[block_idx]] = self.block_size - num_used

    def num_unused_slots(self, blocks: SequenceBlocks, *, num_computed_tokens: int) -> int:
        """Slots without a token of a sequence that shares no partly filled block."""
        return self.num_groups * (blocks.num_blocks * self.block_size - num_computed_tokens)

    def new_sequence(self, *, adapter_revision: str, tenant_id: str, cache_salt: str) -> SequenceBlocks:
        """Empty tables in the namespace of a request; holds nothing yet."""
        namespace = Namespace(self._model_revision, self._kv_dtype, adapter_revision, tenant_id, cache_salt)
        return SequenceBlocks(
            namespace=namespace,
            tables=tuple([] for _ in range(self.num_groups)),
            heads=[0] * self.num_groups,
            can_cache=self.enable_prefix_caching,
        )

    def match(self, blocks: SequenceBlocks, token_ids: list[int], *, num_tokens: int) -> PrefixMatch:
        """The longest prefix hit within the first `num_tokens`, of which at least one is left to compute."""
        if not blocks.can_cache:
            return EMPTY_MATCH
        num_blocks = (num_tokens - 1) // self.block_size
        blocks.extend_keys(token_ids, num_blocks=num_blocks, block_size=self.block_size)
        return self.tree.match(blocks.namespace, blocks.keys[:num_blocks])

    def acquire(self, blocks: SequenceBlocks, match: PrefixMatch) -> int:
        """Begin `blocks`, which must be empty, with the blocks of a hit.

        Returns:
            Tokens that need not be computed.
        """
        assert blocks.num_blocks == 0, "a hit starts a sequence"
        for group, table in enumerate(blocks.tables):
            first = self.tree.first_needed(group, num_blocks=match.num_blocks)
            blocks.heads[group] = first
            table.extend([NO_BLOCK] * first)
            for node in match.path[first:]:
                self.pool.acquire(node.blocks[group])
                table.append(node.blocks[group])
        if match.path:
            self._move_to(blocks, match.path[-1])
        blocks.num_tree_blocks = match.num_blocks
        return match.num_blocks * self.block_size

    def _move_to(self, blocks: SequenceBlocks, node: TreeNode) -> None:
        previous, blocks.node = blocks.node, node
        self.tree.pin(node)
        if previous is not None:
            self.tree.unpin(previous)

    def has_slots(self, blocks: SequenceBlocks, *, end: int) -> bool:
        """True if positions up to `end` have slots of the sequence's own and nothing is behind a window.

        `num_tokens_allocatable`, `allocate` and `free_behind_window` have nothing to do then, as for most
        decodes.
        """
        return end <= blocks.num_blocks * self.block_size and not (blocks.is_forked or self._windowed)

    def num_tokens_allocatable(self, blocks: SequenceBlocks, *, start: int, num_tokens: int) -> int:
        """How many of `num_tokens` from position `start` on can get slots now."""
        if not blocks.is_forked and start + num_tokens <= blocks.num_blocks * self.block_size:
            return num_tokens
        num_spare = self.num_available - len(self._shared_partials(blocks, start=start))
        if num_spare < 0:
            return 0
        end = (blocks.num_blocks + num_spare // self.num_groups) * self.block_size
        return min(num_tokens, end - start)

    def num_drafts_allocatable(
        self, blocks: SequenceBlocks, *, start: int, num_tokens: int, num_kept: int
    ) -> int:
        """How many of `num_tokens` from `start` on can get slots and leave `num_kept` blocks to others."""
        num_slots = blocks.num_blocks * self.block_size - start
        if num_tokens > num_slots:
            num_slots += max(0, self.num_available - num_kept) // self.num_groups * self.block_size
        return min(num_tokens, num_slots)

    def allocate(self, blocks: SequenceBlocks, *, start: int, end: int) -> None:
        """Make slots for positions [start, end); `num_tokens_allocatable` has said that they fit.

        A partly filled block that is shared is replaced by a private copy (`take_copies`).
        """
        for group in self._shared_partials(blocks, start=start):
            self._copy_on_write(blocks, group=group, block_idx=start // self.block_size)
        num_new = -(-end // self.block_size) - blocks.num_blocks
        for _ in range(num_new):
            for table in blocks.tables:
                table.append(self._new_block())

    def _shared_partials(self, blocks: SequenceBlocks, *, start: int) -> list[int]:
        """Groups whose block at `start` is partly filled and shared."""
        if not blocks.is_forked:
            return []
        block_idx, offset = divmod(start, self.block_size)
        if offset == 0 or block_idx >= blocks.num_blocks:
            return []
        ref_count = self.pool.ref_count
        return [group for group, table in enumerate(blocks.tables) if ref_count(table[block_idx]) > 1]

    def _copy_on_write(self, blocks: SequenceBlocks, *, group: int, block_idx: int) -> None:
        table = blocks.tables[group]
        src, dst = table[block_idx], self._new_block()
        self._copies.append(Copy(src, dst))
        self.pool.release(src)
        table[block_idx] = dst

    def _new_block(self) -> int:
        if self.pool.num_free == 0:
            self.tree.evict_oldest()
        return self.pool.allocate()

    def free_tail(self, blocks: SequenceBlocks, *, num_tokens: int) -> None:
        """Release the blocks behind the first `num_tokens`: drafts that did not stand filled them."""
        for _ in range(blocks.num_blocks - -(-num_tokens // self.block_size)):
            for table in blocks.tables:
                self.pool.release(table.pop())

    def free_behind_window(self, blocks: SequenceBlocks, *, num_computed_tokens: int) -> None:
        """Let window groups release what the token at `num_computed_tokens` no longer attends to."""
        for group, window in self._windowed:
            first = first_window_block(num_computed_tokens, window=window, block_size=self.block_size)
            table = blocks.tables[group]
            for block_idx in range(blocks.heads[group], first):
                self.pool.release(table[block_idx])
                table[block_idx] = NO_BLOCK
            blocks.heads[group] = max(blocks.heads[group], first)

    def cache_full_blocks(
        self, blocks: SequenceBlocks, token_ids: list[int], *, num_computed_tokens: int
    ) -> int:
        """Enter the blocks that became full into the tree.

        If another sequence entered the same tokens first, its block is kept and this sequence swaps to it
        and frees its own: less memory, and every sequence then holds its whole path, on which the order of
        eviction rests. The swapped block is full and equal, so a plan in flight may use either.

        Returns:
            Number of blocks that are new in the tree.
        """
        num_full = num_computed_tokens // self.block_size
        if not blocks.can_cache or num_full <= blocks.num_tree_blocks:
            return 0
        if blocks.has_lost_path:
            return 0
        blocks.extend_keys(token_ids, num_blocks=num_full, block_size=self.block_size)
        num_before = len(blocks.inserted)
        while blocks.num_tree_blocks < num_full and self._cache_next_block(blocks):
            pass
        return len(blocks.inserted) - num_before

    def _cache_next_block(self, blocks: SequenceBlocks) -> bool:
        if blocks.node is None:
            blocks.node = self.tree.pin_root(blocks.namespace)
        key = blocks.keys[blocks.num_tree_blocks]
        placed = self.tree.child(blocks.node, key)
        if placed is None:
            blocks.can_cache = False
            return False
        node, is_new = placed
        for group, table in enumerate(blocks.tables):
            self._share_block(node, group=group, table=table, block_idx=blocks.num_tree_blocks)
        if is_new:
            blocks.inserted.append(node)
        self._move_to(blocks, node)
        blocks.num_tree_blocks += 1
        return True

    def _share_block(self, node: TreeNode, *, group: int, table: list[int], block_idx: int) -> None:
        own, shared = table[block_idx], node.blocks[group]
        assert own != NO_BLOCK, "a block enters the tree before it leaves the window"
        if shared == NO_BLOCK:
            self.tree.put_block(node, group, own)
            return
        self.pool.acquire(shared)
        table[block_idx] = shared
        self.pool.release(own)

    def fork(self, blocks: SequenceBlocks) -> SequenceBlocks:
        """A second sequence with the same tokens, sharing every block; writes copy later."""
        for table in blocks.tables:
            for block_id in table:
                if block_id != NO_BLOCK:
                    self.pool.acquire(block_id)
        blocks.is_forked = True
        if blocks.node is not None:
            self.tree.pin(blocks.node)
        return SequenceBlocks(
            namespace=blocks.namespace,
            tables=tuple(list(table) for table in blocks.tables),
            heads=list(blocks.heads),
            node=blocks.node,
            num_tree_blocks=blocks.num_tree_blocks,
            can_cache=blocks.can_cache,
            is_forked=True,
            keys=blocks.keys[: blocks.num_tree_blocks],
        )

    def free(self, blocks: SequenceBlocks, *, taint: bool = False) -> None:
        """Release all that a sequence holds; its full blocks stay as cache.

        Args:
            blocks: emptied, and usable again from the start.
            taint: its KV may hold NaN: what it entered leaves the tree, with all that others computed on
                top, and its blocks are zeroed once nobody holds them (`take_blocks_to_zero`).
        """
        if taint:
            self._taint(blocks)
        self._release_all(blocks)
        if blocks.node is not None:
            self.tree.unpin(blocks.node)
        blocks.node = None
        blocks.num_tree_blocks = 0
        blocks.is_forked = False
        blocks.inserted.clear()
        blocks.can_cache = self.enable_prefix_caching

    def _release_all(self, blocks: SequenceBlocks) -> None:
        # Deepest first: the order in which cached blocks are evicted again (see prefix_tree).
        for block_idx in range(blocks.num_blocks - 1, -1, -1):
            for table in blocks.tables:
                if table[block_idx] != NO_BLOCK:
                    self.pool.release(table[block_idx])
        for group, table in enumerate(blocks.tables):
            table.clear()
            blocks.heads[group] = 0

    def _taint(self, blocks: SequenceBlocks) -> None:
        for node in blocks.inserted:
            self.tree.remove_subtree(node, taint=True)
        for table in blocks.tables:
            for block_id in table:
                if block_id != NO_BLOCK and not self.pool.is_in_tree(block_id):
                    self.pool.taint(block_id)

    def hold(self, blocks: SequenceBlocks, *, num_blocks: int) -> list[int]:
        """Keep the first `num_blocks` blocks of a sequence from being used again until `let_go`.

        From the first block on, because eviction relies on holders having their whole path.
        """
        held = [
            table[block_idx]
            for block_idx in range(num_blocks)
            for table in blocks.tables
            if table[block_idx] != NO_BLOCK
        ]
        for block_id in held:
            self.pool.acquire(block_id)
        return held

    def let_go(self, held: list[int]) -> None:
        """Undo `hold`, deepest block first."""
        for block_id in reversed(held):
            self.pool.release(block_id)

    def drop_copies_to(self, blocks: SequenceBlocks) -> None:
        """Forget the copies planned for a sequence that is taken back out of the step."""
        held = {block_id for table in blocks.tables for block_id in table}
        self._copies = [copy for copy in self._copies if copy.dst not in held]

    def take_copies(self) -> list[Copy]:
        """Copies that the step being planned must make first; clears the list."""
        copies, self._copies = self._copies, []
        return copies

    def drop_cache(self) -> None:
        """Forget all that is cached; the pool's memory is about to be cleared."""
        assert self.pool.num_owned == 0, "somebody holds blocks"
        while self.pool.num_cached:
            self.tree.evict_oldest()
        self.pool.take_blocks_to_zero()

    def take_blocks_to_zero(self) -> list[int]:
        """Freed blocks that may hold NaN; clears the list."""
        return self.pool.take_blocks_to_zero()
