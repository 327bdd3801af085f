"""How long a request may take: a bound in steps for each request, from the work that may come before it.

`check_order` watches who starts; this also finds a request that starts in order and is starved afterwards.
Called by `simulator`.

The bound: every step with room for a token moves somebody whom the request has to let pass, or itself. So

    steps <= ALLOWANCE + steps per token * (own work + work of all whom it lets pass)

with steps per token = 2 if steps are planned ahead (the step after a token's may be empty), else 1, and the
work of a request = (1 + its preemptions so far, at most max_preemptions, + failures so far, which make those
who share blocks begin again) * (prompt + n * max_tokens): each token alone in a step. It lets pass

- who is in the engine when it comes, of any tier: they may hold seats and blocks;
- who comes later in a higher tier, under "priority" and "fair";
- who comes later in its tier from another tenant, under "fair", whose own law is `check_fairness`;
- once it was held back for a prefix or preempted: the `max_num_seqs` largest of all others, who may have
  started meanwhile and become protected from preemption.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from penstock.core.ids import RequestId
from penstock.core.tokens import EngineRequest
from penstock.engine.config import SchedulerConfig
from penstock.engine.scheduler.request import SequenceGroup
from penstock.sim.runner import require

ALLOWANCE: Final = 8
"""Steps for what is no token: a load under way, the end of a wait for a prefix."""
TIERED: Final = ("priority", "fair")


@dataclass(slots=True, kw_only=True)
class Life:
    """One request from its arrival to its end, in steps."""

    request: EngineRequest
    arrival_idx: int
    first_step: int
    last_step: int | None = None
    was_held_back: bool = False
    """For a prefix that another computed."""
    num_preemptions: int = 0

    def work(self, *, num_failures: int) -> int:
        """Tokens to compute, with all that had to be computed again."""
        num_tokens = (
            len(self.request.prompt_token_ids) + self.request.params.num_sequences * self.request.max_tokens
        )
        return (1 + self.num_preemptions + num_failures) * num_tokens


class WaitBook:
    """The lives of all requests of a simulation."""

    def __init__(self, config: SchedulerConfig, *, overlaps: bool) -> None:
        self._config = config
        self._steps_per_token = 2 if overlaps else 1
        self._lives: dict[RequestId, Life] = {}

    def begin(self, request: EngineRequest, *, step: int) -> None:
        """A request was accepted before step number `step`."""
        self._lives[request.request_id] = Life(request=request, arrival_idx=len(self._lives), first_step=step)

    def note(self, groups: Iterable[SequenceGroup]) -> None:
        """Look at the scheduler's requests after a step was planned."""
        for group in groups:
            life = self._lives[group.request.request_id]
            life.was_held_back |= group.num_deferrals > 0
            life.num_preemptions = group.num_preemptions

    def end(self, request_id: RequestId, *, step: int, num_failures: int) -> None:
        """A request ended before step number `step`; checks its bound.

        Raises:
            SimulationError: it took longer.
        """
        life = self._lives[request_id]
        life.last_step = step
        num_steps, limit = step - life.first_step, self._limit(life, num_failures=num_failures)
        require(num_steps <= limit, f"{request_id} took {num_steps} steps, its bound is {limit}")

    def _limit(self, life: Life, *, num_failures: int) -> int:
        first: list[int] = []
        rest: list[int] = []
        for other in self._lives.values():
            if _meets(other, life):
                passes = other is life or self._may_pass(other, life)
                (first if passes else rest).append(other.work(num_failures=num_failures))
        if life.was_held_back or life.num_preemptions:
            first += sorted(rest)[-self._config.max_num_seqs :]
        return ALLOWANCE + self._steps_per_token * sum(first)

    def _may_pass(self, other: Life, life: Life) -> bool:
        """True if `other` may be served before `life` by the rules of the policy."""
        if other.arrival_idx < life.arrival_idx:
            return True
        mine, its = life.request, other.request
        is_higher = self._config.policy in TIERED and its.priority < mine.priority
        is_other_tenant = self._config.policy == "fair" and its.tenant_id != mine.tenant_id
        return is_higher or (is_other_tenant and its.priority == mine.priority)


def _meets(other: Life, life: Life) -> bool:
    """True if both were in the engine at the same time; `life` ends now."""
    return other.last_step is None or other.last_step >= life.first_step
