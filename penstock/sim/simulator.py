"""Runs one seed: the real scheduler and KV manager, a fake runner, every checker after every step."""

import random
from collections.abc import Iterable
from dataclasses import dataclass

from penstock.core.errors import InvalidParameterError, QueueFullError
from penstock.core.ids import RequestId
from penstock.core.ports import KvConnector
from penstock.core.tokens import TokenDelta
from penstock.engine.kv.host_tier import HostTier
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.plan import StepPlan, StepResult
from penstock.engine.scheduler.policy import FairPolicy
from penstock.engine.scheduler.request import GroupState, SequenceGroup
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.sim.checkers import (
    AnswerBook,
    check_fairness,
    check_groups,
    check_order,
    check_pool,
    check_sharing,
    check_stats,
    check_tails,
    check_tree,
)
from penstock.sim.clock import VirtualClock
from penstock.sim.connector import FakeConnector
from penstock.sim.proposer import make_proposer
from penstock.sim.runner import FakeRunner, require
from penstock.sim.waits import WaitBook
from penstock.sim.workload import Arrival, Workload, make_workload, with_asynchrony

EMPTY_STEP_S = 0.001
"""What a step without work takes, so that loads under way come to an end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What one seed did, for its report."""

    seed: int
    num_steps: int
    num_requests: int
    num_refused: int
    num_preemptions: int
    num_hit_tokens: int
    num_failures: int
    num_draft_tokens: int
    num_accepted_tokens: int
    virtual_time_s: float


class Simulator:
    """One seed, from its first arrival to an idle engine."""

    def __init__(self, workload: Workload) -> None:
        setting = workload.setting
        self._workload = workload
        self._setting = setting
        self._rng = random.Random(workload.seed + 1)  # noqa: S311 - a simulation, not a secret
        self._clock = VirtualClock()
        self._kv = KvManager(
            setting.layout,
            num_blocks=setting.num_blocks,
            block_size=setting.block_size,
            enable_prefix_caching=setting.config.enable_prefix_caching,
        )
        self._runner = FakeRunner(
            windows=setting.layout.windows,
            num_blocks=setting.num_blocks,
            block_size=setting.block_size,
            vocab_size=setting.vocab_size,
            times=setting.times,
            faults=setting.faults,
            rng=self._rng,
        )
        self.host_tier = self._make_host_tier() if setting.has_connector and setting.num_host_slots else None
        connector: KvConnector | None = self.host_tier
        if setting.has_connector and connector is None:
            connector = self._make_connector()
        self._scheduler = Scheduler(
            setting.config,
            kv=self._kv,
            clock=self._clock,
            rng=self._rng,
            connector=connector,
            proposer=make_proposer(setting, rng=self._rng),
        )
        self._books: dict[RequestId, AnswerBook] = {}
        self._waits = WaitBook(setting.config, overlaps=setting.overlaps)
        self._to_come = list(reversed(workload.arrivals))
        self._aborts: dict[int, list[Arrival]] = {}
        self._under_way: list[tuple[StepPlan, StepResult]] = []
        self._num_steps = 0
        self._num_refused = 0
        self._num_preemptions = 0
        self._num_hit_tokens = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def _make_host_tier(self) -> HostTier:
        return HostTier(
            num_slots=max(self._setting.num_host_slots, self._kv.num_groups),
            num_groups=self._kv.num_groups,
            block_size=self._setting.block_size,
            bytes_per_slot=1,
        )

    def _make_connector(self) -> FakeConnector:
        return FakeConnector(
            self._runner,
            num_groups=self._kv.num_groups,
            block_size=self._setting.block_size,
            rng=self._rng,
        )

    def run(self) -> Outcome:
        """Play the workload to its end.

        Raises:
            SimulationError: a law does not hold; the message says which.
        """
        limit = self._num_steps_max()
        while self._to_come or self._scheduler.has_work:
            require(self._num_steps < limit, f"not done after {limit} steps: somebody starves")
            self._let_arrive()
            self._abort_due(in_flight=False)
            self._step()
            self._check()
        self._check_end()
        return self._outcome()

    def _num_steps_max(self) -> int:
        """The bound of virtual time: every token alone in a step, as often as preemption may repeat it."""
        repeats = 1 + self._setting.config.max_preemptions + int(self._setting.faults.numerical_error > 0) * 9
        num_tokens = sum(min(arrival.request.num_tokens_max, 1000) for arrival in self._workload.arrivals)
        return 200 + 4 * repeats * num_tokens

    def _let_arrive(self) -> None:
        if not self._scheduler.has_work and self._to_come:
            self._clock.advance(max(0.0, self._to_come[-1].time_s - self._clock.monotonic()))
        while self._to_come and self._to_come[-1].time_s <= self._clock.monotonic():
            self._submit(self._to_come.pop())

    def _submit(self, arrival: Arrival) -> None:
        request = arrival.request
        try:
            self._scheduler.add(request)
        except InvalidParameterError:
            self._num_refused += 1
            return
        except QueueFullError as error:
            require(
                error.retry_after_s is not None and error.retry_after_s >= 1.0, "a 429 says when to retry"
            )
            self._num_refused += 1
            return
        require(not arrival.is_impossible, "a request that can never fit was accepted")
        self._books[request.request_id] = AnswerBook(request)
        self._waits.begin(request, step=self._num_steps)
        if arrival.abort_after_steps is not None:
            self._aborts.setdefault(self._num_steps + arrival.abort_after_steps, []).append(arrival)

    def _abort_due(self, *, in_flight: bool) -> None:
        due = self._aborts.get(self._num_steps, [])
        for arrival in due:
            if arrival.aborts_in_flight is in_flight:
                self._scheduler.abort(arrival.request.request_id)

    def _step(self) -> None:
        is_async = self._setting.config.async_scheduling
        if self._scheduler.needs_result:
            self._apply()
        before = self._waiting()
        plan = self._scheduler.schedule()
        self._check_order(before)
        self._waits.note(self._scheduler.groups)
        handle = self._runner.launch(plan)
        self._abort_due(in_flight=True)
        self._num_steps += 1
        if is_async:
            if self._under_way:
                self._apply()
            handle = self._runner.draw(handle, void=self._scheduler.void_draws(plan))
        self._under_way.append((plan, handle))
        if self._setting.overlaps and plan.has_work and len(self._under_way) < 2:
            return
        self._apply()
        if not plan.has_work:
            self._clock.advance(EMPTY_STEP_S)

    def _apply(self) -> None:
        plan, handle = self._under_way.pop(0)
        result = self._runner.collect(handle)
        self._clock.advance(result.step_time_s)
        output = self._scheduler.apply(plan, result)
        self._num_preemptions += output.stats.num_preemptions
        self._num_hit_tokens += output.stats.num_prefix_hit_tokens
        self._num_draft_tokens += output.stats.num_draft_tokens
        self._num_accepted_tokens += sum(output.stats.num_accepted_tokens)
        check_stats(output.stats)
        self._take(output.deltas)

    def _take(self, deltas: Iterable[TokenDelta]) -> None:
        for delta in deltas:
            self._books[delta.request_id].take(delta)
            if delta.is_last:
                self._waits.end(delta.request_id, step=self._num_steps, num_failures=len(self._runner.failed))

    def _waiting(self) -> list[SequenceGroup]:
        return [group for group in self._scheduler.groups if group.state is GroupState.WAITING]

    def _check_order(self, before: list[SequenceGroup]) -> None:
        started = [group for group in before if group.state is not GroupState.WAITING]
        by_tenant = self._setting.config.policy == "fair"
        check_order(started, self._waiting(), by_tenant=by_tenant)
        policy = self._scheduler.policy
        if isinstance(policy, FairPolicy):
            check_fairness(policy, started, self._waiting())

    def _check(self) -> None:
        groups = self._scheduler.groups
        tables = [seq.blocks for group in groups for seq in group.live]
        tables += [seq.blocks for seq in self._scheduler.leaving]
        check_pool(self._kv, tables, held=self._scheduler.held_blocks)
        check_sharing(self._kv, groups)
        check_tree(self._kv.tree, self._kv)
        config = self._setting.config
        check_groups(
            self._scheduler, max_preemptions=config.max_preemptions, max_num_seqs=config.max_num_seqs
        )
        if not self._setting.has_connector:  # a load may fill fewer blocks than it asked for
            check_tails(groups, block_size=self._setting.block_size)

    def _check_end(self) -> None:
        while self._under_way:
            self._apply()
        while self._scheduler.held_blocks:
            self._scheduler.schedule()
        self._check()
        require(self._kv.pool.num_owned == 0, "an idle engine owns no block")
        for book in self._books.values():
            require(book.is_over, f"{book.request.request_id} never ended")
            book.check_tokens(
                vocab_size=self._setting.vocab_size, max_model_len=self._setting.config.max_model_len
            )

    def _outcome(self) -> Outcome:
        return Outcome(
            seed=self._workload.seed,
            num_steps=self._num_steps,
            num_requests=len(self._books),
            num_refused=self._num_refused,
            num_preemptions=self._num_preemptions,
            num_hit_tokens=self._num_hit_tokens,
            num_failures=len(self._runner.failed),
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
            virtual_time_s=self._clock.monotonic(),
        )


def simulate(seed: int, *, is_async: bool = False) -> Outcome:
    """Run one seed.

    Args:
        seed: of the workload.
        is_async: with one step of asynchrony, whatever the seed says.

    Raises:
        SimulationError: a law does not hold.
        AssertionError: the scheduler or KV manager found its own bug.
    """
    workload = make_workload(seed)
    return Simulator(with_asynchrony(workload) if is_async else workload).run()


def replay_line(seed: int, *, is_async: bool = False) -> str:
    """How to see a failure again."""
    return f"SEED={seed} replay: python -m penstock.sim --seed {seed}{' --async' if is_async else ''}"
