"""The blocks of one sequence: a table per cache group, and the place in the prefix tree.

Plain state; `kv_manager` is the only one that changes it.

Worked example, block_size 4, groups (full, window 6), 14 tokens computed:

```
position       0..3  4..7  8..11  12..15
tables[0]      [ 5,    2,    9,     1 ]     full attention keeps all
tables[1]      [-1,   -1,    3,     7 ]     token 14 attends to 9..14: blocks 0 and 1 are freed
heads          [0, 2]
```
"""

from dataclasses import dataclass, field

from penstock.engine.kv.prefix_tree import Namespace, TreeNode, block_keys


@dataclass(slots=True, kw_only=True, eq=False)
class SequenceBlocks:
    """What one sequence holds in the pool and in the tree."""

    namespace: Namespace
    tables: tuple[list[int], ...]
    """One list of block ids per group, all of the same length; -1 where freed."""
    heads: list[int]
    """Per group: entries before this one are -1."""
    node: TreeNode | None = None
    """The (pinned) node below which the next full block goes; None before the first block."""
    num_tree_blocks: int = 0
    """The first so many blocks are nodes of the tree."""
    can_cache: bool = True
    """False if caching is off, or once the sequence's path has left the tree."""
    is_forked: bool = False
    """Its last, partly filled block may be shared with another answer: writing copies it first."""
    inserted: list[TreeNode] = field(default_factory=list)
    """Nodes that this sequence filled itself: removed again if its KV turns out to be bad."""
    keys: list[bytes] = field(default_factory=list)
    """Edges of the leading full blocks, computed once."""

    @property
    def num_blocks(self) -> int:
        """Length of each table, freed entries included."""
        return len(self.tables[0])

    @property
    def num_held_blocks(self) -> int:
        """Blocks held over all groups, shared ones included."""
        return sum(len(table) - head for table, head in zip(self.tables, self.heads, strict=True))

    @property
    def has_lost_path(self) -> bool:
        """True if the blocks it shares were taken out of the tree because they may be bad."""
        return self.node is not None and not self.node.is_attached

    def extend_keys(self, token_ids: list[int], *, num_blocks: int, block_size: int) -> None:
        """Make sure that `keys` covers the first `num_blocks` blocks of `token_ids`."""
        num_known = len(self.keys)
        if num_known < num_blocks:
            new_ids = token_ids[num_known * block_size : num_blocks * block_size]
            self.keys.extend(block_keys(new_ids, block_size=block_size))
