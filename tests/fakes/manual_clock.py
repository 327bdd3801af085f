"""A clock that stands still until a test moves it."""


class ManualClock:
    """Implements `core.ports.Clock`."""

    def __init__(self, *, monotonic_s: float = 1000.0, wall_s: float = 1_700_000_000.0) -> None:
        self.monotonic_s = monotonic_s
        self.wall_s = wall_s

    def monotonic(self) -> float:
        return self.monotonic_s

    def wall(self) -> float:
        return self.wall_s

    def advance(self, seconds: float) -> None:
        self.monotonic_s += seconds
        self.wall_s += seconds
