"""What drafts have brought and cost, in steps without them: whether there may be any now.

Prices are estimates; this is the account. A step with drafts that took as long as `t` plain steps and gave
each sequence `y` tokens on average is worth `y - t`: everything is in it, the draft model's passes, what it
had to read first, the rows that verify. Plain steps pay in a little. While there is credit there are drafts;
when it is used up there are none until enough is paid in for another attempt. So whatever is wrong about a
price, speculation loses at most the share that plain steps pay in.

```
open --credit used up--> closed --credit of an attempt, or the load has fallen by half--> open
```

It chooses no lengths: that is `drafting`'s, which asks it first. Pure; constant time.
"""

from dataclasses import dataclass
from typing import Final

PAID_IN: Final = 0.01
"""Share of a plain step's time that drafts may lose."""
ATTEMPT: Final = 4.0
"""Credit, in plain steps, at the beginning and of every further attempt."""
MAX_CREDIT: Final = 12.0
"""What was won may be lost again up to here: luck comes in runs, and a few bad steps end nothing."""
MAX_LOSS: Final = 4.0
"""Most that a bad step counts for, if the next one is better: a pause of the machine is nobody's fault."""
NUM_PLAIN_STEPS: Final = 3
"""Steps without drafts that must be known for a number of sequences before there are any."""
WEIGHT: Final = 0.1
"""Of the newest plain step in the mean."""
STEPS_BETWEEN_GRANTS: Final = 512
"""Between two attempts that are granted because the load has fallen."""


@dataclass(slots=True)
class _PlainSteps:
    """Steps without drafts for one number of sequences."""

    mean_s: float
    num_steps: int = 1

    def add(self, step_time_s: float) -> None:
        self.mean_s += WEIGHT * (min(step_time_s, 2 * self.mean_s) - self.mean_s)
        self.num_steps += 1


class DraftLedger:
    """See the module. Owned by `Drafting`."""

    def __init__(self) -> None:
        """Open, with the credit of one attempt."""
        self._plain: dict[int, _PlainSteps] = {}
        self._credit = ATTEMPT
        self._is_open = True
        self._forgiven = 0.0
        """What the last step with drafts lost beyond `MAX_LOSS`."""
        self._num_seqs_closed = 0
        self._num_steps = 0
        self._next_grant = 0

    @property
    def credit(self) -> float:
        """In plain steps."""
        return self._credit

    def allows(self, num_seqs: int) -> bool:
        """Whether a step of so many decodes may have drafts."""
        if (
            not self._is_open
            and 2 * num_seqs <= self._num_seqs_closed
            and self._num_steps >= self._next_grant
        ):
            self._next_grant = self._num_steps + STEPS_BETWEEN_GRANTS
            self._credit, self._is_open = max(self._credit, ATTEMPT), True
        known = self._plain.get(num_seqs)
        return self._is_open and known is not None and known.num_steps >= NUM_PLAIN_STEPS

    def note_plain(self, *, num_seqs: int, step_time_s: float) -> None:
        """A step of decodes alone, without drafts."""
        self._num_steps += 1
        known = self._plain.get(num_seqs)
        if known is None:
            self._plain[num_seqs] = _PlainSteps(step_time_s)
        else:
            known.add(step_time_s)
        self._change(PAID_IN, num_seqs=num_seqs)

    def note_drafted(self, *, num_seqs: int, num_tokens: int, step_time_s: float) -> None:
        """A step of decodes with drafts, or for which the draft model was asked, that gave `num_tokens`."""
        self._num_steps += 1
        known = self._plain.get(num_seqs)
        if known is not None and known.mean_s > 0.0:
            worth = num_tokens / num_seqs - step_time_s / known.mean_s
            self._change(self._charged(worth), num_seqs=num_seqs)

    def _charged(self, worth: float) -> float:
        if worth >= -MAX_LOSS:
            self._forgiven = 0.0
            return worth
        if self._forgiven:
            charged, self._forgiven = worth + self._forgiven, 0.0
            return charged
        self._forgiven = worth + MAX_LOSS
        return -MAX_LOSS

    def _change(self, amount: float, *, num_seqs: int) -> None:
        self._credit = min(MAX_CREDIT, self._credit + amount)
        if self._is_open and self._credit <= 0.0:
            self._is_open, self._num_seqs_closed = False, num_seqs
        elif not self._is_open and self._credit >= ATTEMPT:
            self._is_open = True
