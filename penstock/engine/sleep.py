"""An engine that sleeps: it holds as little memory as it can, and takes it again when it is woken.

```
          Sleep                      quiet
  awake ---------> falling asleep ----------> asleep
    ^                    |                       |
    +------ WakeUp ------+-------- WakeUp -------+
```

Requests that are in the engine stay in it: those that run go back into the queue and are computed again after
the wake-up, with the same answers; they can be cancelled meanwhile. New ones are refused. The loop calls it.
"""

import enum
from typing import Final

from penstock.core.errors import InvalidParameterError, NotReadyError
from penstock.engine.core import EngineCore
from penstock.engine.scheduler.settlement import StepOutput

RETRY_AFTER_S: Final = 10.0


class SleepState(enum.Enum):
    """See the module's drawing."""

    AWAKE = "awake"
    FALLING = "falling asleep"
    ASLEEP = "asleep"


class Sleeper:
    """The state of one engine, and whom to tell when it is asleep."""

    def __init__(self, core: EngineCore) -> None:
        self._core = core
        self._asking: list[int] = []
        self.state = SleepState.AWAKE

    @property
    def has_work(self) -> bool:
        """True if a step would do something: asleep none does."""
        return self.state is not SleepState.ASLEEP and self._core.has_work

    def refuse_requests(self) -> None:
        """Let a new request pass if awake.

        Raises:
            NotReadyError: it must wait until somebody wakes the engine.
        """
        if self.state is not SleepState.AWAKE:
            raise NotReadyError("the model is sleeping", code="sleeping", retry_after_s=RETRY_AFTER_S)

    def begin(self, question_id: int) -> None:
        """Begin to fall asleep; `fall` says when it has come to it.

        Raises:
            InvalidParameterError: ranks in other processes would keep their memory.
        """
        if not self._core.ranks.can_sleep:
            raise InvalidParameterError(
                "level is 1, which does not go with tensor_parallel_size above 1: it must be 2, which ends "
                "the processes",
                param="level",
            )
        self._asking.append(question_id)
        if self.state is SleepState.AWAKE:
            self._core.pause()
            self.state = SleepState.FALLING

    def fall(self) -> StepOutput | None:
        """Fall asleep if nothing runs any more; returns what a step under way still gave."""
        if self.state is not SleepState.FALLING or not self._core.scheduler.is_quiet:
            return None
        output = self._core.fall_asleep()
        self.state = SleepState.ASLEEP
        return output

    def take_asking(self) -> list[int]:
        """Who is to be told that the engine sleeps; none before it does. Clears the list."""
        if self.state is not SleepState.ASLEEP:
            return []
        asking, self._asking = self._asking, []
        return asking

    def wake_up(self) -> list[int]:
        """Take the memory again and go on; returns who asked for a sleep that did not come."""
        asking, self._asking = self._asking, []
        if self.state is SleepState.ASLEEP:
            self._core.wake_up()
        elif self.state is SleepState.FALLING:
            self._core.scheduler.resume()
        self.state = SleepState.AWAKE
        return asking
