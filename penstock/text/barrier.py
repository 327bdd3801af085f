"""The edge of one request's work with text: what nobody foresaw ends that request and nothing else."""

import logging
from collections.abc import Awaitable
from typing import Final, TypeVar

from penstock.core.errors import GenerateError, PenstockError

logger: Final = logging.getLogger(__name__)

Result = TypeVar("Result")


async def behind_barrier(stage: Awaitable[Result]) -> Result:
    """Await a stage of one request; an unforeseen exception becomes that request's `GenerateError`."""
    try:
        return await stage
    except PenstockError:
        raise
    except Exception:
        logger.exception("the text stage of a request failed")
        raise GenerateError("this request failed before it reached the model") from None
