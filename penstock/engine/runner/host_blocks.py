"""Host memory for KV blocks, and the copies between it and the pool.

It carries out the orders of a plan in their order and decides nothing: which block lies in which slot is
`engine/kv/host_tier`'s to know. The runner calls it.

On a CPU a copy is made at once. On a GPU the memory is pinned and the copies run on a stream of their own
beside the steps: a load waits for what was launched before it, because a step under way may still read the
block's former content; a step that needs the block is planned after the load has been reported.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch

from penstock.engine.kv.host_tier import HostMove
from penstock.engine.runner.copy_stream import CopyStream, CudaCopyStream, Ticket, pin
from penstock.engine.scheduler.plan import NO_TRAFFIC, HostTraffic


class Run(NamedTuple):
    """Neighbours in the pool that are neighbours in host memory too."""

    block_id: int
    slot: int
    length: int


def runs_of(block_ids: Sequence[int], slots: Sequence[int]) -> Iterator[Run]:
    """Cut two lists into runs that both rise by one, so that each is one copy.

    Example: blocks 4 5 6 9, slots 0 1 2 3 give (4, 0, 3) and (9, 3, 1).
    """
    pairs = enumerate(zip(block_ids, slots, strict=True))
    for _, members in groupby(pairs, key=lambda item: (item[1][0] - item[0], item[1][1] - item[0])):
        run = [pair for _, pair in members]
        yield Run(*run[0], len(run))


class _UnderWay(NamedTuple):
    """One order on the copy stream."""

    move: HostMove
    ticket: Ticket


class HostBlocks:
    """See the module."""

    def __init__(self, storage: torch.Tensor, *, num_slots: int, stream: CopyStream | None = None) -> None:
        """Reserve the memory.

        Args:
            storage: the pool, [num_blocks, *block] of any dtype and device; the content of a block is copied
                as it is.
            num_slots: blocks that host memory holds.
            stream: makes the copies; None copies here and now.

        Raises:
            CudaError: so much memory cannot be pinned.
        """
        self._storage = storage
        shape = (num_slots, *storage.shape[1:])
        self._stream = stream
        self._slots = torch.empty(shape, dtype=storage.dtype)
        if storage.is_cuda:
            pin(self._slots, owner=self)
        self._bytes_per_block = storage[0].nbytes
        self._under_way: deque[_UnderWay] = deque()
        self._done = NO_TRAFFIC

    @property
    def num_bytes(self) -> int:
        """Host memory that was reserved."""
        return self._slots.nbytes

    def begin(self, moves: Iterable[HostMove]) -> None:
        """Start to carry orders out; returns at once where there is a stream to do it."""
        for move in moves:
            if self._stream is None:
                began_s = time.perf_counter()
                self._copy(move)
                self._note(move, time_s=time.perf_counter() - began_s)
            else:
                self._under_way.append(_UnderWay(move, self._stream.put(partial(self._copy, move))))

    def _copy(self, move: HostMove) -> None:
        for run in runs_of(move.block_ids, move.slots):
            inside = self._storage[run.block_id : run.block_id + run.length]
            outside = self._slots[run.slot : run.slot + run.length]
            source, target = (outside, inside) if move.is_load else (inside, outside)
            target.copy_(source, non_blocking=True)

    def _note(self, move: HostMove, *, time_s: float) -> None:
        num_bytes = len(move.block_ids) * self._bytes_per_block
        done = self._done
        self._done = HostTraffic(
            ended=(*done.ended, move.transfer_id),
            saved_bytes=done.saved_bytes + (0 if move.is_load else num_bytes),
            loaded_bytes=done.loaded_bytes + (num_bytes if move.is_load else 0),
            time_s=done.time_s + time_s,
        )

    def take_done(self, *, wait: bool) -> HostTraffic:
        """Orders that ended since the last call.

        Args:
            wait: for the oldest one, if none has ended: a step without anything to compute has time.
        """
        if wait and self._under_way and not self._done.ended:
            self._under_way[0].ticket.wait()
        while self._under_way and self._under_way[0].ticket.is_done:
            move, ticket = self._under_way.popleft()
            self._note(move, time_s=ticket.time_s)
        done, self._done = self._done, NO_TRAFFIC
        return done


def host_blocks(storage: torch.Tensor, *, num_slots: int) -> HostBlocks | None:
    """The offload tier's memory for a pool, on a device with a stream of its own; None without a tier."""
    if not num_slots:
        return None
    stream = CudaCopyStream(storage.device) if storage.device.type == "cuda" else None
    return HostBlocks(storage, num_slots=num_slots, stream=stream)
