"""The prefix tree: which blocks hold the KV of which token prefixes.

A radix tree at block granularity. A root is one namespace (the full key that is not tokens); an edge is
the exact token ids of one block, so that no hash collision can mix prefixes; a node holds one block per
cache group. It knows no requests and no policy. Called by `kv_manager`.

```
 root (revision, dtype, adapter, tenant, salt)
   |  [t0 .. t15]
 node: blocks (7, 3)             group 0: full attention, group 1: window 20
   |  [t16 .. t31]
 node: blocks (9, -1)            -1: the window group's block has been evicted already
   |  [t32 .. t47]
 node: blocks (4, 8)
```

A hit of depth d needs, from a full group, the blocks of all d nodes; from a window group those that cover
the last `window - 1` tokens before position d * block_size.

Eviction takes the block that was released the longest ago. A sequence releases its deepest block first and
holds every full-attention block from the root to its own, so a child is always older than its parent in
that order: leaves go first without a search. Blocks of window groups are evicted one by one.
"""

from array import array
from collections.abc import Sequence
from typing import Final, NamedTuple

from penstock.engine.kv.block_pool import BlockPool

NO_BLOCK: Final = -1
NODE_BYTES: Final = 400
"""About what one node takes in CPython: object, children dict, block list, parent's dict entry."""
MAX_NODES_PER_BLOCK: Final = 4
"""Nodes without blocks exist where all groups have windows; this bounds them."""


class Namespace(NamedTuple):
    """Everything beside the tokens on which a block's content or visibility depends."""

    model_revision: str
    kv_dtype: str
    adapter_revision: str
    tenant_id: str
    cache_salt: str


class TreeNode:
    """One block of tokens below its parent; see the module."""

    __slots__ = ("blocks", "children", "is_attached", "key", "num_pins", "parent", "root_of")

    def __init__(self, parent: "TreeNode | None", key: bytes, *, num_groups: int) -> None:
        self.parent = parent
        self.key = key
        self.children: dict[bytes, TreeNode] = {}
        self.blocks = [NO_BLOCK] * num_groups
        self.num_pins = 0
        """Sequences that will add their next block below this node."""
        self.is_attached = True
        self.root_of: Namespace | None = None

    @property
    def is_removable(self) -> bool:
        """True if nothing hangs on the node any more."""
        return not (self.children or self.num_pins or any(block != NO_BLOCK for block in self.blocks))


class PrefixMatch(NamedTuple):
    """The longest usable prefix; `path` holds its nodes from the first block on."""

    path: list[TreeNode]

    @property
    def num_blocks(self) -> int:
        """Depth of the hit in blocks."""
        return len(self.path)


def block_keys(token_ids: Sequence[int], *, block_size: int) -> list[bytes]:
    """The edges for whole blocks: their exact token ids, 4 bytes each; equal keys mean equal tokens.

    Args:
        token_ids: a multiple of `block_size` ids below 2**32.
        block_size: tokens in a block.
    """
    packed = array("I", token_ids).tobytes()
    step = 4 * block_size
    return [packed[offset : offset + step] for offset in range(0, len(packed), step)]


def first_window_block(num_tokens: int, *, window: int, block_size: int) -> int:
    """First block that the token at position `num_tokens` still attends to.

    Example: block_size 4, window 6, num_tokens 12: tokens 7 to 11 matter, so block 1 is the first.
    """
    return max(0, num_tokens - (window - 1)) // block_size


class PrefixTree:
    """See the module; mutates the pool it is given."""

    def __init__(self, pool: BlockPool, *, windows: Sequence[int | None], block_size: int) -> None:
        self._pool = pool
        self._windows = tuple(windows)
        self._has_windows = any(window is not None for window in windows)
        self._block_size = block_size
        self._roots: dict[Namespace, TreeNode] = {}
        self._owners: dict[int, tuple[TreeNode, int]] = {}
        self._max_nodes = MAX_NODES_PER_BLOCK * pool.num_blocks
        self.num_nodes = 0

    @property
    def approximate_bytes(self) -> int:
        """Host memory of the nodes and keys, estimated; O(1)."""
        return self.num_nodes * (NODE_BYTES + 4 * self._block_size)

    @property
    def roots(self) -> dict[Namespace, TreeNode]:
        """The namespaces, for checkers; not to be changed."""
        return self._roots

    def match(self, namespace: Namespace, keys: Sequence[bytes]) -> PrefixMatch:
        """Find the longest prefix of `keys` for which every group has what it needs.

        Cost: O(len(keys) * num_groups); takes no reference.
        """
        path: list[TreeNode] = []
        node = self._roots.get(namespace)
        for key in keys:
            node = node.children.get(key) if node is not None else None
            if node is None:
                break
            path.append(node)
        # A node of full-attention groups alone always has all its blocks.
        if self._has_windows:
            del path[self._num_usable(path) :]
        return PrefixMatch(path)

    def _num_usable(self, path: Sequence[TreeNode]) -> int:
        """Greatest depth at which every group has what it needs."""
        runs = [0] * len(self._windows)
        num_usable = 0
        for depth, node in enumerate(path, start=1):
            for group, block in enumerate(node.blocks):
                runs[group] = runs[group] + 1 if block != NO_BLOCK else 0
            if self._is_usable(runs, depth=depth):
                num_usable = depth
        return num_usable

    def _is_usable(self, runs: Sequence[int], *, depth: int) -> bool:
        return all(
            run >= depth - self.first_needed(group, num_blocks=depth) for group, run in enumerate(runs)
        )

    def first_needed(self, group: int, *, num_blocks: int) -> int:
        """First block that `group` needs to continue after `num_blocks` whole blocks."""
        window = self._windows[group]
        if window is None:
            return 0
        return first_window_block(num_blocks * self._block_size, window=window, block_size=self._block_size)

    def pin_root(self, namespace: Namespace) -> TreeNode:
        """The root of a namespace, made if need be, with one pin more."""
        root = self._roots.get(namespace)
        if root is None:
            root = TreeNode(None, b"", num_groups=len(self._windows))
            root.root_of = namespace
            self._roots[namespace] = root
        root.num_pins += 1
        return root

    def pin(self, node: TreeNode) -> None:
        """A sequence will add its next block below `node`: keep it even if its blocks go."""
        node.num_pins += 1

    def unpin(self, node: TreeNode) -> None:
        """Undo one `pin`; removes the node if nothing hangs on it."""
        node.num_pins -= 1
        self._prune(node)

    def child(self, parent: TreeNode, key: bytes) -> tuple[TreeNode, bool] | None:
        """The node below `parent` for `key`, made if need be, and whether it was made.

        None if the tree is full of nodes that cannot be evicted: the block stays private then.
        """
        node = parent.children.get(key)
        if node is not None:
            return node, False
        while self.num_nodes >= self._max_nodes and self._pool.num_cached:
            self.evict_oldest()
        if self.num_nodes >= self._max_nodes:
            return None
        node = TreeNode(parent, key, num_groups=len(self._windows))
        parent.children[key] = node
        self.num_nodes += 1
        return node, True

    def put_block(self, node: TreeNode, group: int, block_id: int) -> None:
        """Give an owned block to the node's empty place for `group`."""
        assert node.blocks[group] == NO_BLOCK, "the node has a block for this group"
        node.blocks[group] = block_id
        self._owners[block_id] = (node, group)
        self._pool.add_to_tree(block_id)

    def evict_oldest(self) -> None:
        """Free at least the least recently used cached block; there must be one. O(1) amortised."""
        node, group = self._owners[self._pool.oldest_cached()]
        if self._windows[group] is None:
            assert not node.children, "a parent is never older than its child"
            self._drop_blocks(node)
        else:
            self._drop_block(node, group)
        self._prune(node)

    def remove_subtree(self, node: TreeNode, *, taint: bool) -> None:
        """Forget `node` and all below it, whoever holds the blocks; `taint` also has them zeroed."""
        if not node.is_attached:
            return
        stack = [node]
        while stack:
            current = stack.pop()
            stack.extend(current.children.values())
            current.children.clear()
            self._detach(current, taint=taint)
        if node.parent is not None:
            self._prune(node.parent)

    def _detach(self, node: TreeNode, *, taint: bool) -> None:
        if taint:
            for block_id in node.blocks:
                if block_id != NO_BLOCK:
                    self._pool.taint(block_id)
        self._drop_blocks(node)
        self._unlink(node)

    def _drop_blocks(self, node: TreeNode) -> None:
        for group, block_id in enumerate(node.blocks):
            if block_id != NO_BLOCK:
                self._drop_block(node, group)

    def _drop_block(self, node: TreeNode, group: int) -> None:
        block_id = node.blocks[group]
        node.blocks[group] = NO_BLOCK
        del self._owners[block_id]
        self._pool.remove_from_tree(block_id)

    def _prune(self, node: TreeNode) -> None:
        current: TreeNode | None = node
        while current is not None and current.is_attached and current.is_removable:
            parent = current.parent
            self._unlink(current)
            current = parent

    def _unlink(self, node: TreeNode) -> None:
        node.is_attached = False
        if node.root_of is not None:
            del self._roots[node.root_of]
        else:
            assert node.parent is not None
            node.parent.children.pop(node.key, None)
            self.num_nodes -= 1
