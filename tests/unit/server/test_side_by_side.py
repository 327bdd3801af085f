"""The parts of one request: in order, a bounded number at once, all ended with the first that fails."""

import asyncio

import pytest

from penstock.server.side_by_side import MAX_AT_ONCE, each


async def test_results_come_in_the_order_of_the_items():
    async def work(item):
        for _ in range(10 - item):
            await asyncio.sleep(0)
        return item * item

    assert await each(range(10), work) == [item * item for item in range(10)]


async def test_the_first_that_fails_ends_the_others_before_it_is_raised():
    begun, ended = [], []

    async def work(item):
        begun.append(item)
        if item == 3:
            raise ValueError(item)
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended.append(item)

    with pytest.raises(ValueError, match="3"):
        await each(range(MAX_AT_ONCE + 5), work)
    assert len(begun) <= MAX_AT_ONCE + 1, "one more had taken the seat of the one that failed"
    assert sorted([*ended, 3]) == sorted(begun)


async def test_a_request_that_is_cancelled_ends_all_of_its_parts():
    num_open = 0

    async def work(_item):
        nonlocal num_open
        num_open += 1
        try:
            await asyncio.Event().wait()
        finally:
            num_open -= 1

    task = asyncio.create_task(each(range(5), work))
    for _ in range(5):
        await asyncio.sleep(0)
    assert num_open == 5
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert num_open == 0
