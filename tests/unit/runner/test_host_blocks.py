"""Copies between the pool and host memory: exact, in order, reported when they are over."""

from collections.abc import Callable

import pytest
import torch

from penstock.engine.kv.host_tier import HostMove
from penstock.engine.runner.host_blocks import HostBlocks, runs_of


class LateTicket:
    def __init__(self, work: Callable[[], None]) -> None:
        self._work: Callable[[], None] | None = work
        self.time_s = 0.5

    @property
    def is_done(self) -> bool:
        return self._work is None

    def wait(self) -> None:
        work, self._work = self._work, None
        if work is not None:
            work()


class LateStream:
    """Does nothing until it is waited for."""

    def put(self, work: Callable[[], None]) -> LateTicket:
        return LateTicket(work)


def pool(num_blocks: int = 6) -> torch.Tensor:
    return torch.arange(num_blocks * 8, dtype=torch.float32).view(num_blocks, 2, 4)


def test_neighbours_are_one_copy():
    assert list(runs_of([4, 5, 6, 9, 10, 3], [0, 1, 2, 3, 5, 6])) == [
        (4, 0, 3),
        (9, 3, 1),
        (10, 5, 1),
        (3, 6, 1),
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_what_comes_back_is_what_went_out(dtype: torch.dtype):
    storage = pool().to(dtype)
    before = storage.clone()
    blocks = HostBlocks(storage, num_slots=4)
    blocks.begin([HostMove(1, False, [1, 2, 5], [3, 0, 1])])
    storage.zero_()
    blocks.begin([HostMove(2, True, [0, 4], [0, 3])])
    assert torch.equal(storage[0], before[2])
    assert torch.equal(storage[4], before[1])
    done = blocks.take_done(wait=False)
    assert done.ended == (1, 2)
    assert (done.saved_bytes, done.loaded_bytes) == (3 * storage[0].nbytes, 2 * storage[0].nbytes)
    assert blocks.take_done(wait=True).ended == ()


def test_a_stream_reports_what_is_over_and_is_waited_for_only_in_an_empty_step():
    storage = pool()
    before = storage.clone()
    blocks = HostBlocks(storage, num_slots=2, stream=LateStream())
    blocks.begin([HostMove(1, False, [1], [0]), HostMove(2, True, [3], [0])])
    assert blocks.take_done(wait=False).ended == ()
    done = blocks.take_done(wait=True)
    assert (done.ended, done.time_s) == ((1,), 0.5)
    assert blocks.take_done(wait=True).ended == (2,)
    assert torch.equal(storage[3], before[1])
