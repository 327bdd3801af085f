"""A pretended store of KV blocks outside the pool. Implements `core.ports.KvConnector`.

Copies blocks of the fake runner; transfers take some polls, and loads fail by chance from the seed.
"""

import random
from collections.abc import Sequence
from typing import Final

from penstock.core.ports import KvTransfer, KvTransferEnd
from penstock.sim.runner import FakeRunner, require

MAX_POLLS: Final = 4
LOAD_FAILURE_RATE: Final = 0.2

BlockContent = tuple[list[int], list[int]]
StoreKey = tuple[tuple[str, ...], tuple[int, ...]]


class FakeConnector:
    """See the module."""

    def __init__(self, runner: FakeRunner, *, num_groups: int, block_size: int, rng: random.Random) -> None:
        self._runner = runner
        self._num_groups = num_groups
        self._block_size = block_size
        self._rng = rng
        self._store: dict[StoreKey, list[BlockContent]] = {}
        self._loads: dict[int, KvTransfer] = {}
        self._saves: dict[int, KvTransfer] = {}
        self._due: dict[int, int] = {}
        self.num_loads = 0
        self.num_saves = 0

    def num_loadable_tokens(
        self, namespace: Sequence[str], token_ids: Sequence[int], *, num_computed_tokens: int
    ) -> int:
        """Whole blocks in the store right behind `num_computed_tokens`."""
        end = num_computed_tokens
        while end + self._block_size <= len(token_ids):
            if (tuple(namespace), tuple(token_ids[: end + self._block_size])) not in self._store:
                break
            end += self._block_size
        return end - num_computed_tokens

    def begin_load(self, transfer: KvTransfer) -> None:
        """See the port."""
        self.num_loads += 1
        self._loads[transfer.transfer_id] = transfer
        self._due[transfer.transfer_id] = self._rng.randrange(MAX_POLLS)

    def begin_save(self, transfer: KvTransfer) -> None:
        """See the port."""
        self.num_saves += 1
        self._saves[transfer.transfer_id] = transfer
        self._due[transfer.transfer_id] = self._rng.randrange(MAX_POLLS)

    def poll(self) -> list[KvTransferEnd]:
        """See the port; the bytes move at the end of a transfer, so that blocks freed early show."""
        ended = []
        for transfer_id in list(self._due):
            if self._due[transfer_id]:
                self._due[transfer_id] -= 1
                continue
            del self._due[transfer_id]
            ended.append(KvTransferEnd(transfer_id, self._finish(transfer_id)))
        return ended

    def _finish(self, transfer_id: int) -> bool:
        save = self._saves.pop(transfer_id, None)
        if save is not None:
            self._save(save)
            return True
        load = self._loads.pop(transfer_id)
        ok = self._rng.random() >= LOAD_FAILURE_RATE
        if ok:
            self._load(load)
        return ok

    def _keys(self, transfer: KvTransfer) -> list[StoreKey]:
        num_blocks = len(transfer.token_ids) // self._block_size
        return [
            (transfer.namespace, tuple(transfer.token_ids[: (idx + 1) * self._block_size]))
            for idx in range(transfer.first_block, num_blocks)
        ]

    def _save(self, transfer: KvTransfer) -> None:
        for idx, key in enumerate(self._keys(transfer)):
            blocks = [table[idx] for table in transfer.block_ids]
            contents = [self._runner.read_block(block) for block in blocks]
            expected = list(key[1][-self._block_size :])
            require(all(tokens == expected for tokens, _ in contents), "a block changed while it was saved")
            self._store[key] = contents

    def _load(self, transfer: KvTransfer) -> None:
        for idx, key in enumerate(self._keys(transfer)):
            for group in range(self._num_groups):
                self._runner.write_block(transfer.block_ids[group][idx], self._store[key][group])
