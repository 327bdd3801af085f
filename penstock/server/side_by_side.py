"""Runs the parts of one client's request side by side; if one fails, the others are cancelled.

For routes whose requests ask for many vectors or scores; streams of text go through `collect`.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

MAX_AT_ONCE: Final = 256
"""Parts of one request that the engine knows at once: enough for its largest steps, and others find room."""


async def each(items: Sequence[Item], work: Callable[[Item], Awaitable[Result]]) -> list[Result]:
    """Do `work` for every item, at most `MAX_AT_ONCE` at a time.

    Returns:
        The results in the order of the items.

    Raises:
        Exception: the first that a work raised; the others have been cancelled and have ended.
    """
    seats = asyncio.Semaphore(MAX_AT_ONCE)

    async def seated(item: Item) -> Result:
        async with seats:
            return await work(item)

    tasks = [asyncio.ensure_future(seated(item)) for item in items]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
