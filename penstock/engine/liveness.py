"""Is the engine alive? Judged from when it was last heard and how long its steps take. Pure.

The supervisor pings once a second and tells `Liveness` what it hears. A pause of the supervisor itself (a
stopped terminal, a frozen container) is not the engine's silence and is forgiven.
"""

from typing import Final

PING_INTERVAL_S: Final = 1.0
WATCHDOG_MIN_S: Final = 5.0
WATCHDOG_STEPS: Final = 20.0
"""The engine is hung if it is silent for this many times its recent longest step, at least 5 s."""
WARMUP_FACTOR: Final = 3.0
"""Warm-up has run the largest step there is: silence shorter than this many times it is no hang."""
STUCK_S: Final = 3.0
"""Readiness turns off after so much silence."""
STEP_MEMORY: Final = 0.95
"""The recent longest step shrinks by this factor with each shorter one."""
LOADING_SILENCE_S: Final = 300.0
"""A process that loads or warms up says something at least this often."""


class Liveness:
    """What is known of one engine process; a new one for each."""

    def __init__(self, *, now_s: float) -> None:
        self._heard_s = now_s
        self._looked_s = now_s
        self._step_s = 0.0
        self._warmup_s = 0.0
        self._is_started = False

    def on_message(self, *, now_s: float) -> None:
        """Anything arrived."""
        self._heard_s = now_s

    def on_started(self, *, warmup_s: float) -> None:
        """It is ready; from here on the watchdog of a serving engine holds."""
        self._is_started = True
        self._warmup_s = warmup_s

    def on_step(self, step_time_s: float) -> None:
        """A step took so long."""
        self._step_s = max(step_time_s, STEP_MEMORY * self._step_s)

    @property
    def silence_max_s(self) -> float:
        """Silence after which the process counts as hung."""
        if not self._is_started:
            return LOADING_SILENCE_S
        return max(WATCHDOG_MIN_S, WATCHDOG_STEPS * self._step_s, WARMUP_FACTOR * self._warmup_s)

    def is_stuck(self, *, now_s: float) -> bool:
        """True if readiness should be off: too quiet, though not yet hung."""
        return now_s - self._heard_s > max(STUCK_S, 2 * self._step_s, self._warmup_s)

    def is_hung(self, *, now_s: float) -> bool:
        """To be asked every `PING_INTERVAL_S`; a late question means that we slept, not the engine."""
        overslept = now_s - self._looked_s > 2 * PING_INTERVAL_S
        self._looked_s = now_s
        if overslept:
            self._heard_s = now_s
            return False
        return now_s - self._heard_s > self.silence_max_s
