"""KV blocks on their way to or from outside the pool, on behalf of the scheduler.

Holds the blocks of every transfer until the connector has reported its end, and remembers which request
waits for which load. It decides when to save, not what to evict. Called by `scheduler`.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

from penstock.core.ports import KvConnector, KvTransfer
from penstock.engine.kv.host_tier import HostMove, HostTier
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.request import Sequence, SequenceGroup

MAX_SAVES: Final = 4096
"""Saves under way; beyond it full blocks are not saved (they stay in the pool as long as it has room)."""


class EndedLoad(NamedTuple):
    """A request whose load is over."""

    group: SequenceGroup
    num_tokens: int
    """Tokens that were loaded; 0 if the load failed."""


class _Load(NamedTuple):
    group: SequenceGroup
    num_tokens: int


class KvTransfers:
    """See the module."""

    def __init__(self, connector: KvConnector | None, *, kv: KvManager) -> None:
        self._connector = connector
        self._host_tier = connector if isinstance(connector, HostTier) else None
        self._kv = kv
        self._loads: dict[int, _Load] = {}
        self._saves: dict[int, list[int]] = {}
        self._ended: list[EndedLoad] = []
        self._last_id = 0

    @property
    def held_blocks(self) -> list[int]:
        """Blocks held by saves, one entry for each hold."""
        return [block_id for blocks in self._saves.values() for block_id in blocks]

    @property
    def are_under_way(self) -> bool:
        """True while copies that plans carry have not been reported as done."""
        return self._host_tier is not None and bool(self._saves or self._loads)

    @property
    def host_bytes_used(self) -> int:
        """Host memory that holds blocks."""
        return 0 if self._host_tier is None else self._host_tier.used_bytes

    def num_loadable_tokens(self, seq: Sequence) -> int:
        """Tokens of whole blocks that could be loaded next; the last token is always computed."""
        if self._connector is None or not self._kv.enable_prefix_caching:
            return 0
        num_tokens = self._connector.num_loadable_tokens(
            seq.blocks.namespace, seq.token_ids, num_computed_tokens=seq.num_computed_tokens
        )
        block_size = self._kv.block_size
        num_blocks_max = (seq.group.target(seq) - 1) // block_size
        num_tokens = min(num_tokens, num_blocks_max * block_size - seq.num_computed_tokens)
        return (
            self._kv.num_tokens_allocatable(
                seq.blocks, start=seq.num_computed_tokens, num_tokens=max(0, num_tokens)
            )
            // block_size
            * block_size
        )

    def begin_load(self, seq: Sequence, *, num_tokens: int) -> None:
        """Allocate blocks for the next `num_tokens` of `seq` and let the connector fill them."""
        assert self._connector is not None, "only a connector has something to load"
        start = seq.num_computed_tokens
        self._kv.allocate(seq.blocks, start=start, end=start + num_tokens)
        first_block = start // self._kv.block_size
        transfer = self._make_transfer(seq, first_block=first_block, num_tokens=start + num_tokens)
        self._loads[transfer.transfer_id] = _Load(seq.group, num_tokens)
        seq.group.is_loading = True
        self._connector.begin_load(transfer)

    def save(self, seq: Sequence, *, first_block: int) -> None:
        """Offer the full blocks from `first_block` on to the connector."""
        num_full = seq.num_computed_tokens // self._kv.block_size
        if self._connector is None or first_block >= num_full or len(self._saves) >= MAX_SAVES:
            return
        if self._host_tier is not None:
            first_block = 0  # it knows what it has, and what it had to give up on the way
        num_tokens = num_full * self._kv.block_size
        transfer = self._make_transfer(seq, first_block=first_block, num_tokens=num_tokens)
        self._saves[transfer.transfer_id] = self._kv.hold(seq.blocks, num_blocks=num_full)
        self._connector.begin_save(transfer)
        self._take_ended()

    def _make_transfer(self, seq: Sequence, *, first_block: int, num_tokens: int) -> KvTransfer:
        self._last_id += 1
        end = num_tokens // self._kv.block_size
        return KvTransfer(
            transfer_id=self._last_id,
            namespace=tuple(seq.blocks.namespace),
            token_ids=seq.token_ids[:num_tokens],
            first_block=first_block,
            block_ids=tuple(table[first_block:end] for table in seq.blocks.tables),
        )

    def forget(self, seq: Sequence) -> None:
        """What `seq` computed may be bad: it must not be loaded again."""
        if self._host_tier is not None:
            self._host_tier.forget(seq.blocks.namespace, seq.token_ids)

    def take_moves(self) -> list[HostMove]:
        """Copies for the next plan to carry."""
        return [] if self._host_tier is None else self._host_tier.take_moves()

    def end_moves(self, transfer_ids: Iterable[int]) -> None:
        """The runner has made these copies."""
        if self._host_tier is not None:
            self._host_tier.end_moves(transfer_ids)
            self._take_ended()

    def poll(self) -> list[EndedLoad]:
        """Let go of what has ended; returns the loads among it."""
        self._take_ended()
        ended, self._ended = self._ended, []
        return ended

    def _take_ended(self) -> None:
        for end in self._connector.poll() if self._connector is not None else ():
            load = self._loads.pop(end.transfer_id, None)
            if load is None:
                self._kv.let_go(self._saves.pop(end.transfer_id))
                continue
            load.group.is_loading = False
            self._ended.append(EndedLoad(load.group, load.num_tokens if end.ok else 0))
