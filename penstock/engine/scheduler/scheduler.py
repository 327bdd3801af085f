"""The scheduler: which sequences compute how many tokens in the next step, and what came of the last.

It owns the life of every request in the engine: queue, running set, preemption, forks, endings. It does no
I/O, runs no model and knows no text. Called by `engine/core`:

    plan = scheduler.schedule()
    result = runner.collect(runner.launch(plan))
    output = scheduler.apply(plan, result)

Every plan is applied once, in order, an empty one too. `schedule` may be called again before `apply`: what is
in flight is neither scheduled twice nor freed, and with `async_scheduling` decodes go on with the tokens that
are being drawn (see `lookahead`), unless `needs_result`.

Here requests come in and are admitted or refused; the rest is shared out:

```
            add, abort                    who is there, who has ended, what is told
  Scheduler ----------------------------> Roster
     |  schedule                            ^
     +---------> Planner -------------------+   who starts, who goes back
     |  apply                               |
     +---------> Settlement ----------------+   who gained what, who is over
```
"""

from typing import Final

from penstock.core.errors import InvalidParameterError
from penstock.core.ids import RequestId, SequenceId
from penstock.core.ports import Clock, KvConnector, Rng
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineRequest, RequestReport, TokenDelta
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.lora.slots import AdapterSlots
from penstock.engine.scheduler.admission import (
    AdmissionLimits,
    QueueLoad,
    check_admissible,
    check_queue,
    num_blocks_max,
)
from penstock.engine.scheduler.constraint import Constraint
from penstock.engine.scheduler.cost import CostModel, StepLoad
from penstock.engine.scheduler.drafting import Drafting, Proposer
from penstock.engine.scheduler.figures import StepCounts, request_report
from penstock.engine.scheduler.group_maker import GroupMaker
from penstock.engine.scheduler.memory_pressure import MemoryPressure
from penstock.engine.scheduler.plan import StepPlan, StepResult
from penstock.engine.scheduler.planner import Planner
from penstock.engine.scheduler.policy import Policy
from penstock.engine.scheduler.request import Sequence, SequenceGroup
from penstock.engine.scheduler.roster import Roster
from penstock.engine.scheduler.settlement import Settlement, StepOutput

MAX_REPORTS: Final = 10_000
MAX_RETRY_AFTER_S: Final = 60.0


class Scheduler:
    """See the module. Not thread-safe: one step loop owns it."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        kv: KvManager,
        clock: Clock,
        rng: Rng,
        connector: KvConnector | None = None,
        vocab_size: int | None = None,
        proposer: Proposer | None = None,
        adapters: AdapterSlots | None = None,
        num_labels: int = 0,
    ) -> None:
        """Start with an empty queue.

        Args:
            config: limits, validated.
            kv: the pool; the scheduler is its only user.
            clock: intervals by `monotonic`.
            rng: seeds of requests that bring none.
            connector: moves KV in and out of the pool, or None.
            vocab_size: when given, token ids of requests are checked against it.
            proposer: guesses tokens ahead, or None for no speculation.
            adapters: slots for the adapters of running requests, or None without adapters.
            num_labels: classes of a model that classifies; 0 for one that generates.
        """
        self._config = config
        self._kv = kv
        self._clock = clock
        self._maker = GroupMaker(kv=kv, clock=clock, rng=rng)
        self._limits = AdmissionLimits(
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_blocks=kv.pool.num_blocks,
            block_size=kv.block_size,
            windows=kv.windows,
            vocab_size=vocab_size,
            num_labels=num_labels,
        )
        self.cost = CostModel()
        self._drafting = drafting = None if proposer is None else Drafting(proposer, cost=self.cost)
        self._roster = roster = Roster(
            config, kv=kv, clock=clock, connector=connector, adapters=adapters, drafting=drafting
        )
        pressure = MemoryPressure(
            max_num_batched_tokens=config.max_num_batched_tokens,
            # A prompt that must be computed whole cannot wait for larger steps.
            least=kv.block_size if config.enable_chunked_prefill else config.max_model_len,
        )
        self._planner = Planner(
            config,
            roster=roster,
            kv=kv,
            clock=clock,
            cost=self.cost,
            drafting=drafting,
            adapters=adapters,
            pressure=pressure,
        )
        self._settlement = Settlement(
            config, roster=roster, kv=kv, cost=self.cost, drafting=drafting, pressure=pressure
        )
        self._counts: dict[int, StepCounts] = {}
        """Of the steps under way."""
        self._awaited_step_ids: set[int] = set()

    # -- requests in and out -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while a request has not ended, a delta has not been taken, or blocks are being copied."""
        return self._roster.has_work

    @property
    def num_waiting(self) -> int:
        """Requests that are not running."""
        return self._roster.num_waiting

    def add(self, request: EngineRequest, *, constraint: Constraint | None = None) -> None:
        """Accept a request; from here on it ends in exactly one terminal delta.

        Args:
            request: what is wanted.
            constraint: its grammar, compiled, at its start; this request owns it from now on.

        Raises:
            InvalidParameterError: it can never be served; the message says why, with the numbers.
            QueueFullError: the queue is at its limit; `retry_after_s` is the predicted wait.
        """
        if self._roster.find(request.request_id) is not None:
            raise InvalidParameterError(f"request_id {request.request_id!r} is in use", param="request_id")
        check_admissible(request, limits=self._limits)
        num_prompt_tokens = len(request.prompt_token_ids)
        check_queue(
            self._queue_load(),
            num_prompt_tokens=num_prompt_tokens,
            retry_after_s=self.predicted_wait_s(num_prompt_tokens),
        )
        group = self._maker.make(
            request,
            tier=self._roster.policy.tier_of(int(request.priority)),
            num_blocks_max=num_blocks_max(request, limits=self._limits),
            constraint=constraint,
        )
        self._roster.add(group)
        if group.ends_with_prompt and request.pooling is None and group.prompt_logprobs is None:
            self._roster.close(group, FinishReason.LENGTH)

    def _queue_load(self) -> QueueLoad:
        # Requests that find a free seat leave the queue with the next step: they do not count.
        num_seats = self._config.max_num_seqs - self._roster.running.num_seqs
        return QueueLoad(
            num_requests=max(0, self.num_waiting - max(0, num_seats)),
            num_tokens=self._roster.num_waiting_tokens,
            max_num_requests=self._config.max_num_queued_reqs,
            max_num_tokens=self._config.max_num_queued_tokens,
        )

    def predicted_wait_s(self, num_prompt_tokens: int) -> float:
        """Seconds until a request that came now would be scheduled, 1 to 60, by the cost model.

        The prompts before it must be computed, and where all seats are taken, answers must end.
        """
        config = self._config
        num_tokens = self._roster.num_waiting_tokens + num_prompt_tokens
        num_steps = num_tokens / config.max_num_batched_tokens
        wait_s = num_steps * self.cost.predict(StepLoad(config.max_num_batched_tokens, 1, num_tokens))
        num_rounds = (self.num_waiting + self._roster.running.num_seqs) // config.max_num_seqs
        num_kv_tokens = config.max_num_seqs * self._kv.block_size
        decode_s = self.cost.predict(StepLoad(config.max_num_seqs, config.max_num_seqs, num_kv_tokens))
        wait_s += num_rounds * self._roster.num_outputs_mean * decode_s
        return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))

    def abort(self, request_id: RequestId) -> None:
        """End a request now; unknown ids and requests that have ended are ignored.

        Its answers get `FinishReason.CANCELLED` deltas (by `take_deltas`, or with the next `apply`). Its
        blocks are freed at once, or by `apply` if a step under way uses them.
        """
        group = self._roster.find(request_id)
        if group is not None:
            self._roster.close(group, FinishReason.CANCELLED)

    def take_deltas(self) -> list[TokenDelta]:
        """Deltas made outside a step (cancelled, asked for no token); clears the list."""
        return self._roster.take_deltas()

    # -- steps ---------------------------------------------------------------------------------------------

    @property
    def constraints(self) -> dict[SequenceId, Constraint]:
        """Of the answers that have not ended, for the masks of a step."""
        return self._roster.constraints

    def schedule(self) -> StepPlan:
        """Plan the next step: running decodes, then running prefills, then waiting requests.

        Returns:
            The plan; without sequences if nothing can be computed now. Block tables are the live lists.
        """
        is_ahead = bool(self._counts) and bool(self._config.async_scheduling)
        planned = self._planner.plan(is_ahead=is_ahead)
        step_id = planned.plan.step_id
        self._counts[step_id] = planned.counts
        if planned.needs_result and self._config.async_scheduling:
            self._awaited_step_ids.add(step_id)
        return planned.plan

    def apply(self, plan: StepPlan, result: StepResult, *, host_time_s: float = 0.0) -> StepOutput:
        """Take in what a step produced: tokens, endings, failures, full blocks.

        Args:
            plan: of the step.
            result: what the runner made of it.
            host_time_s: for the figures.

        Returns:
            The deltas of the step (and those made since the last one), and its figures.
        """
        self._awaited_step_ids.discard(plan.step_id)
        counts = self._counts.pop(plan.step_id)
        counts.host_time_s = host_time_s
        return self._settlement.settle(plan, result, counts)

    @property
    def needs_result(self) -> bool:
        """True if nothing may be planned before the step under way is applied; see `lookahead`."""
        return bool(self._awaited_step_ids)

    def void_draws(self, plan: StepPlan) -> frozenset[SequenceId]:
        """Sequences for which a step under way is to draw nothing, by all that has been applied since."""
        return self._settlement.void_draws(plan)

    def output_of_no_step(self) -> StepOutput:
        """What there is to tell when no step has ended."""
        return self._settlement.output_of_no_step()

    # -- pauses --------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Let requests that run go back into the queue with the next steps, and start nobody."""
        self._planner.is_paused = True

    def resume(self) -> None:
        """Go on after `pause`."""
        self._planner.is_paused = False

    @property
    def is_quiet(self) -> bool:
        """True if no request holds blocks and nothing is being copied."""
        return self._roster.is_quiet

    # -- figures -------------------------------------------------------------------------------------------

    @property
    def policy(self) -> Policy:
        """The order in which requests are admitted."""
        return self._roster.policy

    def reports(self) -> list[RequestReport]:
        """Every request in the engine, oldest first, at most 10,000; never its text."""
        now_s = self._clock.monotonic()
        return [request_report(group, now_s=now_s) for group in self._roster.open_groups[:MAX_REPORTS]]

    @property
    def drafting_bytes(self) -> int:
        """Bytes that speculation holds beside the sequences."""
        return self._drafting.num_bytes if self._drafting else 0

    @property
    def host_bytes_used(self) -> int:
        """Bytes of the offload tier that hold blocks."""
        return self._roster.transfers.host_bytes_used

    @property
    def groups(self) -> list[SequenceGroup]:
        """All that hold or may hold blocks, for checkers; not to be changed."""
        return self._roster.groups

    @property
    def leaving(self) -> list[Sequence]:
        """Answers that have ended and yet hold blocks, for checkers; not to be changed."""
        return self._roster.leaving

    @property
    def held_blocks(self) -> list[int]:
        """Blocks held by saves under way, for checkers; one entry for each hold."""
        return self._roster.transfers.held_blocks
