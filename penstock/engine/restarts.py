"""How often in a row the engine has failed to stay, and how long the next start waits. Pure."""

from typing import Final

RESTART_PAUSES_S: Final = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Before the k-th start in a row that follows a failure; the last one for all later."""
MAX_STARTS_TO_WAIT_FOR: Final = 5
"""Requests that wait for a restart fail after so many starts in vain."""
HEALTHY_S: Final = 60.0
"""An engine that served for this long has ended the row of failures."""


class Restarts:
    """See the module."""

    def __init__(self) -> None:
        self._num_failures = 0

    def note_death(self, *, served_s: float) -> None:
        """A process has ended that served for so long, 0 if it never did."""
        self._num_failures = 1 if served_s > HEALTHY_S else self._num_failures + 1

    def note_failed_start(self) -> None:
        """A process could not even be made."""
        self._num_failures += 1

    def begin_anew(self) -> None:
        """The process was ended on purpose: the next one starts at once."""
        self._num_failures = 1

    @property
    def is_in_vain(self) -> bool:
        """True if nobody should wait any longer."""
        return self._num_failures >= MAX_STARTS_TO_WAIT_FOR

    @property
    def pause_s(self) -> float:
        """Before the next start."""
        return RESTART_PAUSES_S[min(self._num_failures, len(RESTART_PAUSES_S)) - 1]
