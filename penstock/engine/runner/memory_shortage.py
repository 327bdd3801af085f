"""Want of memory in a step: counted, and met by giving back what nothing uses.

It is no fault of a sequence. Whoever computes or draws asks here when something was raised, and then tries
again with less.
"""

import logging
import traceback

from penstock.engine.runner.device_memory import DeviceMemory
from penstock.engine.runner.out_of_memory import is_out_of_memory

log = logging.getLogger("penstock.engine.runner")


class MemoryShortage:
    """See the module."""

    def __init__(self, memory: DeviceMemory | None, *, is_alone: bool) -> None:
        """Count from 0.

        Args:
            memory: of the device; None where the host's is used, which keeps nothing back.
            is_alone: False if there are other ranks: they compute on, and would wait for this one for ever.
        """
        self._memory = memory
        self._is_alone = is_alone
        self._count = 0

    def relieve(self, error: Exception) -> None:
        """Give back what nothing uses, since memory could not be had.

        The frames in which it was raised are cleared first: they hold what the failed attempt had made.

        Raises:
            Exception: `error` itself if it says anything else, or if there are other ranks.
        """
        if not is_out_of_memory(error) or not self._is_alone:
            raise error
        self._count += 1
        log.warning("a step ran out of memory: %s", error)
        traceback.clear_frames(error.__traceback__)
        self.empty_cache()

    def relieve_if_short(self, error: Exception) -> None:
        """The same; any other error is left to others."""
        if is_out_of_memory(error):
            self.relieve(error)

    def empty_cache(self) -> None:
        """Give back what no tensor uses."""
        if self._memory is not None:
            self._memory.empty_cache()

    def take_count(self) -> int:
        """How often memory could not be had since the last call."""
        count, self._count = self._count, 0
        return count
