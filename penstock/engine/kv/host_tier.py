"""The offload tier: which KV blocks lie in host memory, beyond the pool. Implements `core.ports.KvConnector`.

Every block that enters the prefix tree is copied out at once, so evicting it later costs nothing, and a
sequence that is preempted has been swapped out already, but for its last, partly filled block. What is asked
for again comes back from here in place of being computed.

It knows blocks by number and moves no byte: it writes orders (`take_moves`), a step's plan carries them, the
runner copies, and its result says which transfers are over (`end_moves`). Orders are carried out in the order
in which they were given: so a slot may be read by one order and overwritten by the next, and is offered as
soon as its save is ordered.

```
 root (namespace)          a tree as the prefix tree's: the edge is the exact tokens of one block
   |  [t0 .. t15]
 node: slots (0, 1)        one slot of host memory for each cache group
   |  [t16 .. t31]
 node: slots (4, 2)
```

When all slots are taken the least recently used leaf goes: a node is never evicted before what lies below it.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import msgspec

from penstock.core.ports import KvTransfer, KvTransferEnd
from penstock.engine.kv.prefix_tree import NO_BLOCK, block_keys

Key = tuple[str, ...] | bytes


class HostMove(msgspec.Struct, frozen=True, array_like=True):
    """Copy blocks between the pool and host memory, in all layers; the lists run side by side."""

    transfer_id: int
    is_load: bool
    """From host memory into the pool; else out of it."""
    block_ids: list[int]
    slots: list[int]


class _Node:
    """One block of tokens below its parent."""

    __slots__ = ("children", "key", "parent", "slots", "stamp")

    def __init__(self, parent: "_Node | None", key: Key, *, slots: list[int], stamp: int) -> None:
        self.parent = parent
        self.key = key
        self.slots = slots
        """One per cache group; none in the node above all namespaces, and in those."""
        self.children: dict[Key, _Node] = {}
        self.stamp = stamp
        """When it was last used, in calls."""


class HostTier:
    """See the module. Not thread-safe: the step loop owns it."""

    def __init__(self, *, num_slots: int, num_groups: int, block_size: int, bytes_per_slot: int) -> None:
        """Hold nothing.

        Args:
            num_slots: blocks that fit into host memory, of any cache group.
            num_groups: cache groups.
            block_size: tokens in a block.
            bytes_per_slot: for the figures.
        """
        self.num_slots = num_slots
        self.bytes_per_slot = bytes_per_slot
        self._num_groups = num_groups
        self._block_size = block_size
        self._now = 0
        self._moves: list[HostMove] = []
        self._ended: list[KvTransferEnd] = []
        self.num_loaded_tokens = 0
        """Tokens of all loads so far."""
        self._clear()

    def _clear(self) -> None:
        self._top = _Node(None, b"", slots=[], stamp=0)
        self._free = list(range(self.num_slots - 1, -1, -1))
        self._leaves: OrderedDict[_Node, None] = OrderedDict()

    @property
    def num_used_slots(self) -> int:
        """Slots that hold a block."""
        return self.num_slots - len(self._free)

    @property
    def used_bytes(self) -> int:
        """Host memory that holds blocks."""
        return self.num_used_slots * self.bytes_per_slot

    @property
    def total_bytes(self) -> int:
        """Host memory for blocks."""
        return self.num_slots * self.bytes_per_slot

    # -- the connector -------------------------------------------------------------------------------------

    def num_loadable_tokens(
        self, namespace: Sequence[str], token_ids: Sequence[int], *, num_computed_tokens: int
    ) -> int:
        """See the port. Cost: O(tokens found)."""
        first = num_computed_tokens // self._block_size
        num_found = sum(1 for _ in self._path(tuple(namespace), token_ids))
        return max(0, num_found - first) * self._block_size

    def begin_load(self, transfer: KvTransfer) -> None:
        """See the port; the prefix must be there, as `num_loadable_tokens` has said."""
        nodes = list(self._path(transfer.namespace, transfer.token_ids))
        self._touch(nodes)
        wanted = nodes[transfer.first_block :]
        num_blocks = len(transfer.block_ids[0])
        assert len(wanted) == num_blocks, "what is loaded has been looked up in the same step"
        self.num_loaded_tokens += num_blocks * self._block_size
        self._order(transfer, is_load=True, nodes=zip(range(num_blocks), wanted, strict=True))

    def begin_save(self, transfer: KvTransfer) -> None:
        """See the port; blocks that are here already are not copied again."""
        keys = block_keys(transfer.token_ids, block_size=self._block_size)
        path = list(self._path(transfer.namespace, transfer.token_ids))
        self._touch(path)
        parent = path[-1] if path else self._root(transfer.namespace)
        new: list[tuple[int, _Node]] = []
        for block_idx in range(len(path), len(keys)):
            place = block_idx - transfer.first_block
            # Without a block's forerunners it cannot be found; those of a window may have been freed.
            is_here = place >= 0 and all(table[place] != NO_BLOCK for table in transfer.block_ids)
            node = self._add(parent, keys[block_idx]) if is_here else None
            if node is None:
                break
            new.append((place, node))
            parent = node
        self._drop_if_empty(parent)
        self._order(transfer, is_load=False, nodes=new)

    def poll(self) -> Sequence[KvTransferEnd]:
        """See the port."""
        ended, self._ended = self._ended, []
        return ended

    # -- beside the connector ------------------------------------------------------------------------------

    def take_moves(self) -> list[HostMove]:
        """Orders for the next plan; clears the list."""
        moves, self._moves = self._moves, []
        return moves

    def end_moves(self, transfer_ids: Iterable[int]) -> None:
        """The runner has carried these orders out."""
        self._ended.extend(KvTransferEnd(transfer_id) for transfer_id in transfer_ids)

    def forget(self, namespace: Sequence[str], token_ids: Sequence[int]) -> None:
        """Drop the first block of a text and all that lies below it: what was computed may be bad."""
        first = next(self._path(tuple(namespace), token_ids), None)
        if first is None:
            return
        stack = [first]
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            self._free.extend(node.slots)
            self._leaves.pop(node, None)
        self._unlink(first)

    def reset(self) -> None:
        """Forget everything; no order may be under way."""
        assert not self._moves, "orders under way name slots"
        self._clear()

    # -- the tree ------------------------------------------------------------------------------------------

    def _path(self, namespace: tuple[str, ...], token_ids: Sequence[int]) -> Iterator[_Node]:
        """The nodes of the leading whole blocks of a text, as far as they are here."""
        node = self._top.children.get(namespace)
        size = self._block_size
        for start in range(0, len(token_ids) - size + 1, size):
            if node is None or not node.children:
                return
            (key,) = block_keys(token_ids[start : start + size], block_size=size)
            node = node.children.get(key)
            if node is not None:
                yield node

    def _root(self, namespace: tuple[str, ...]) -> _Node:
        root = self._top.children.get(namespace)
        if root is None:
            root = _Node(self._top, namespace, slots=[], stamp=self._now)
            self._top.children[namespace] = root
        return root

    def _touch(self, nodes: Sequence[_Node]) -> None:
        """These were used now."""
        self._now += 1
        for node in nodes:
            node.stamp = self._now
        if nodes and nodes[-1] in self._leaves:
            self._leaves.move_to_end(nodes[-1])

    def _add(self, parent: _Node, key: bytes) -> _Node | None:
        """A new leaf with slots of its own, or None if all others are taken by what it stands on."""
        while len(self._free) < self._num_groups:
            oldest = next((leaf for leaf in self._leaves if leaf is not parent), None)
            if oldest is None:
                return None
            self._evict(oldest)
        slots = [self._free.pop() for _ in range(self._num_groups)]
        node = _Node(parent, key, slots=slots, stamp=self._now)
        parent.children[key] = node
        if not parent.slots:  # the last other block of a namespace may just have made room
            self._top.children[parent.key] = parent
        self._leaves.pop(parent, None)
        self._leaves[node] = None
        return node

    def _evict(self, leaf: _Node) -> None:
        del self._leaves[leaf]
        self._free.extend(leaf.slots)
        self._unlink(leaf)

    def _unlink(self, node: _Node) -> None:
        """Take a node out; its parent is a leaf then if it has no other child.

        The parent follows as the next to go, unless something else used it later.
        """
        parent = node.parent
        assert parent is not None, "the top is never taken out"
        del parent.children[node.key]
        if parent.children or parent is self._top:
            return
        if not parent.slots:
            del self._top.children[parent.key]
            return
        self._leaves[parent] = None
        self._leaves.move_to_end(parent, last=parent.stamp > node.stamp)

    def _drop_if_empty(self, node: _Node) -> None:
        if not node.slots and not node.children:
            self._top.children.pop(node.key, None)

    def _order(self, transfer: KvTransfer, *, is_load: bool, nodes: Iterable[tuple[int, _Node]]) -> None:
        """Copy the blocks at these places of the transfer; without any it is over at once."""
        placed = list(nodes)
        if not placed:
            self._ended.append(KvTransferEnd(transfer.transfer_id))
            return
        block_ids = [[table[idx] for table in transfer.block_ids] for idx, _ in placed]
        self._moves.append(
            HostMove(
                transfer.transfer_id,
                is_load,
                list(chain.from_iterable(block_ids)),
                list(chain.from_iterable(node.slots for _, node in placed)),
            )
        )
