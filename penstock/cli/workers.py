"""A bounded number of asyncio workers over a stream of items; used by the offline API and `penstock run`."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


async def work_off(
    items: Iterable[Item], work: Callable[[Item], Awaitable[None]], *, num_workers: int
) -> None:
    """Call `work` for every item, at most `num_workers` at a time, starting in the order of the items.

    Args:
        items: read one by one, never further ahead than there are workers.
        work: what to do; if it raises, the others are cancelled and the exception is raised here.
        num_workers: at least 1.
    """
    shared = iter(items)
    tasks = [asyncio.create_task(_work(shared, work)) for _ in range(num_workers)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _work(shared: Iterator[Item], work: Callable[[Item], Awaitable[None]]) -> None:
    for item in shared:
        await work(item)
