"""A fixed pool of block ids with reference counts; every block is free, cached or owned.

It knows no tokens and no tree: it is told which blocks the prefix tree holds. Called by `prefix_tree` and
`kv_manager`. Every operation is O(1).

```
             allocate                 release, last holder
    free ---------------> owned ------------------------------> free
                          |   ^                                  ^
  release, last holder,   |   |  acquire (prefix hit)            |  remove_from_tree
  block is in the tree    v   |                                  |  (eviction)
                         cached ---------------------------------+
```

Invariant: num_free + num_cached + num_owned == num_blocks.
"""

from collections import OrderedDict


class BlockPool:
    """Reference counts, the free list and the order in which cached blocks are evicted."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._ref_counts = [0] * num_blocks
        self._in_tree = bytearray(num_blocks)
        # A stack: the block freed last is used first, its memory is the likeliest to be in a CPU cache.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._tainted: set[int] = set()
        self._to_zero: list[int] = []

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing of use."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Blocks of the prefix tree that no sequence holds; evictable."""
        return len(self._cached)

    @property
    def num_owned(self) -> int:
        """Blocks that at least one sequence or transfer holds."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def free_ids(self) -> tuple[int, ...]:
        """The free list, for checkers; O(num_free)."""
        return tuple(self._free)

    @property
    def cached_ids(self) -> tuple[int, ...]:
        """Cached blocks, the next to be evicted first, for checkers; O(num_cached)."""
        return tuple(self._cached)

    def ref_count(self, block_id: int) -> int:
        """How many holders the block has."""
        return self._ref_counts[block_id]

    def is_in_tree(self, block_id: int) -> bool:
        """True if the prefix tree refers to the block."""
        return bool(self._in_tree[block_id])

    def allocate(self) -> int:
        """Take a free block for one holder; the caller has made sure that there is one."""
        block_id = self._free.pop()
        self._ref_counts[block_id] = 1
        return block_id

    def acquire(self, block_id: int) -> None:
        """Add a holder to an owned or cached block."""
        if self._ref_counts[block_id] == 0:
            del self._cached[block_id]
        self._ref_counts[block_id] += 1

    def release(self, block_id: int) -> None:
        """Drop one holder; the last one leaves the block cached if it is in the tree, else free."""
        count = self._ref_counts[block_id] - 1
        assert count >= 0, f"block {block_id} has no holder to release"
        self._ref_counts[block_id] = count
        if count:
            return
        if self._in_tree[block_id]:
            self._cached[block_id] = None
        else:
            self._put_free(block_id)

    def add_to_tree(self, block_id: int) -> None:
        """The prefix tree refers to this owned block from now on."""
        assert self._ref_counts[block_id] > 0, f"block {block_id} must be owned to enter the tree"
        assert not self._in_tree[block_id], f"block {block_id} is in the tree already"
        self._in_tree[block_id] = 1

    def remove_from_tree(self, block_id: int) -> None:
        """The prefix tree forgets the block; it becomes free unless a sequence holds it."""
        assert self._in_tree[block_id], f"block {block_id} is not in the tree"
        self._in_tree[block_id] = 0
        if self._ref_counts[block_id] == 0:
            del self._cached[block_id]
            self._put_free(block_id)

    def oldest_cached(self) -> int:
        """The cached block that was released the longest ago; there must be one."""
        return next(iter(self._cached))

    def taint(self, block_id: int) -> None:
        """The block may hold NaN: it must be zeroed once nobody holds it, before it is used again.

        A masked slot still enters attention as 0 * value, and 0 * NaN is NaN.
        """
        if self._ref_counts[block_id] == 0 and not self._in_tree[block_id]:
            return
        self._tainted.add(block_id)

    def take_blocks_to_zero(self) -> list[int]:
        """Tainted blocks that became free since the last call; clears the list."""
        blocks, self._to_zero = self._to_zero, []
        return blocks

    def _put_free(self, block_id: int) -> None:
        self._free.append(block_id)
        if block_id in self._tainted:
            self._tainted.discard(block_id)
            self._to_zero.append(block_id)
