"""A clock that moves only when it is told to. Implements `core.ports.Clock`."""

from typing import Final

WALL_AT_START_S: Final = 1_700_000_000.0


class VirtualClock:
    """Seconds since the start of the simulation."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def monotonic(self) -> float:
        """Virtual seconds."""
        return self._now_s

    def wall(self) -> float:
        """Virtual Unix time."""
        return WALL_AT_START_S + self._now_s

    def advance(self, seconds: float) -> None:
        """Let time pass; never back."""
        assert seconds >= 0.0, "time does not go back"
        self._now_s += seconds
