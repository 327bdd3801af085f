"""The operating system's clocks behind the `Clock` port; the simulator has its own."""

import time


class SystemClock:
    """Real time; implements `core.ports.Clock`."""

    def monotonic(self) -> float:
        """Seconds, never going back; for intervals."""
        return time.monotonic()

    def wall(self) -> float:
        """Unix time in seconds; for dates only."""
        return time.time()
