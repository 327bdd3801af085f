"""How offline work reaches the engine: so many requests at a time, in a queue that has room for them.

Used by the offline API and by `penstock run`, which have nobody to send a 429 to: they wait instead.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

import msgspec

from penstock.core.errors import QueueFullError
from penstock.engine.config import SchedulerConfig

Result = TypeVar("Result")

IN_FLIGHT_PER_SEQ: Final = 4
"""Requests in the engine for each seat of a step, so that its queue never runs dry."""
MAX_IN_FLIGHT: Final = 8192
"""Most requests in the engine: twice the most seats that there can be."""
MAX_PROMPTS: Final = 32
"""Engine requests of one request: a completion may ask for so many prompts."""
MAX_QUEUED_TOKENS: Final = 1 << 40
"""More than `MAX_IN_FLIGHT` requests of `MAX_PROMPTS` contexts of 4 million tokens."""
DEFAULT_RETRY_S: Final = 1.0


def num_in_flight(*, max_num_seqs: int) -> int:
    """Most requests that are kept in the engine."""
    return min(IN_FLIGHT_PER_SEQ * max_num_seqs, MAX_IN_FLIGHT)


def with_room(scheduler: SchedulerConfig) -> SchedulerConfig:
    """The same with a queue that takes everything that `num_in_flight` lets in."""
    return msgspec.structs.replace(
        scheduler, max_num_queued_reqs=MAX_PROMPTS * MAX_IN_FLIGHT, max_num_queued_tokens=MAX_QUEUED_TOKENS
    )


async def with_patience(ask: Callable[[], Awaitable[Result]]) -> Result:
    """Ask again, as late as the refusal says, for as long as a queue is full (the chat template has one too).

    Raises:
        PenstockError: any other error, at once.
    """
    while True:
        try:
            return await ask()
        except QueueFullError as error:
            await asyncio.sleep(error.retry_after_s or DEFAULT_RETRY_S)
