"""Smaller steps for a while, after one for which there was not enough memory.

A step that fails for want of memory costs no request anything: what it did not compute is planned again
(`settlement`), in steps of half as many tokens, and requests for which those have no seat are preempted
(`planner`). After some good steps the limit doubles, until it is gone. Only a sequence that fails again and
again though there is as little of it in a step as can be is given up, alone.

```
tokens a step   2048 ------+                       +----- 2048
                           | fails      +--- 1024 -+
                           +---- 512 ---+ 32 good steps
```
"""

from typing import Final

RECOVERY_STEPS: Final = 32
"""Good steps after which the limit doubles."""
MAX_TRIES: Final = 3
"""Failures in a row, at the smallest size, after which a sequence is given up."""


class MemoryPressure:
    """See the module."""

    def __init__(self, *, max_num_batched_tokens: int, least: int) -> None:
        """Begin without a limit.

        Args:
            max_num_batched_tokens: tokens in a step that nothing limits.
            least: the limit never falls below this.
        """
        self._most = max_num_batched_tokens
        self._least = min(least, max_num_batched_tokens)
        self._num_good_steps = 0
        self.budget = max_num_batched_tokens
        """Tokens in the next step."""

    @property
    def is_high(self) -> bool:
        """True while steps are smaller than they may be."""
        return self.budget < self._most

    def note_failure(self, *, num_tokens: int) -> None:
        """A step of so many tokens was too large."""
        self._num_good_steps = 0
        self.budget = max(self._least, min(self.budget, num_tokens) // 2)

    def note_success(self) -> None:
        """A step with work went well."""
        self._num_good_steps += 1
        if self._num_good_steps >= RECOVERY_STEPS:
            self._num_good_steps = 0
            self.budget = min(self._most, 2 * self.budget)
