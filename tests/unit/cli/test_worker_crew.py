"""`work_off`: bounded, in order of the items, and the first failure ends all."""

import asyncio

import pytest

from penstock.cli.workers import work_off


async def test_every_item_is_worked_on_once_in_order() -> None:
    seen: list[int] = []

    async def work(item: int) -> None:
        seen.append(item)
        await asyncio.sleep(0)

    await work_off(range(10), work, num_workers=3)
    assert seen == list(range(10))


async def test_no_more_than_the_given_number_work_at_once() -> None:
    busy, most = 0, 0

    async def work(_: int) -> None:
        nonlocal busy, most
        busy += 1
        most = max(most, busy)
        await asyncio.sleep(0)
        busy -= 1

    await work_off(range(20), work, num_workers=4)
    assert most == 4


async def test_items_are_read_no_further_ahead_than_there_are_workers() -> None:
    read: list[int] = []
    gate = asyncio.Event()

    def items() -> "list[int]":
        return [0, 1, 2, 3, 4]

    async def work(item: int) -> None:
        read.append(item)
        await gate.wait()

    task = asyncio.create_task(work_off(items(), work, num_workers=2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert read == [0, 1]
    gate.set()
    await task


async def test_a_failure_cancels_the_others_and_is_raised() -> None:
    cancelled: list[int] = []

    async def work(item: int) -> None:
        if item == 1:
            raise ValueError("1")
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(item)
            raise

    with pytest.raises(ValueError, match="1"):
        await work_off([0, 1, 2], work, num_workers=3)
    assert cancelled == [0, 2]
