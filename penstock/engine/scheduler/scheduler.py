"""The scheduler: which sequences compute how many tokens in the next step, and what came of the last.

It owns the life of every request in the engine: queue, running set, preemption, forks, endings. It does no
I/O, runs no model and knows no text. Called by `engine/core`:

    plan = scheduler.schedule()
    result = runner.collect(runner.launch(plan))
    output = scheduler.apply(plan, result)

Every plan is applied once, in order, an empty one too. `schedule` may be called again before `apply`: what is
in flight is neither scheduled twice nor freed.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import groupby
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError
from penstock.core.ids import RequestId, SequenceId
from penstock.core.ports import Clock, KvConnector, Rng
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineRequest, RequestReport, StepStats, TokenDelta
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import EMPTY_MATCH, KvManager
from penstock.engine.kv.prefix_tree import PrefixMatch
from penstock.engine.lora.slots import AdapterSlots, Readiness
from penstock.engine.scheduler.admission import (
    AdmissionLimits,
    QueueLoad,
    check_admissible,
    check_queue,
    num_blocks_max,
)
from penstock.engine.scheduler.answer import (
    GRAMMAR_ERROR,
    NO_TOKEN_ALLOWED,
    Gain,
    beam_deltas,
    closing_delta,
    failure_delta,
    take_tokens,
    token_delta,
)
from penstock.engine.scheduler.beam_sequences import regroup
from penstock.engine.scheduler.constraint import Constraint
from penstock.engine.scheduler.cost import CostModel, StepLoad, step_target_s
from penstock.engine.scheduler.drafting import Drafting, Proposer, Wanted, num_possible
from penstock.engine.scheduler.figures import QueueGauges, StepCounts, request_report, step_stats
from penstock.engine.scheduler.group_maker import GroupMaker
from penstock.engine.scheduler.plan import (
    AdapterBinding,
    BlockCopy,
    ForcedTokens,
    NewSequence,
    SampledToken,
    SampleSpec,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from penstock.engine.scheduler.policy import make_policy
from penstock.engine.scheduler.prefix_wait import is_held_back, next_place
from penstock.engine.scheduler.request import GroupState, Sequence, SequenceGroup
from penstock.engine.scheduler.running_set import RunningSet
from penstock.engine.scheduler.step_draft import StepDraft, new_sequence
from penstock.engine.scheduler.transfers import KvTransfers

MAX_REPORTS: Final = 10_000
MAX_RETRY_AFTER_S: Final = 60.0
MEAN_WEIGHT: Final = 0.05
"""Of the newest answer in the running mean of answer lengths."""


MAX_UNNOTICED_CATCH_UP: Final = 32
"""A step in which a draft model read more than so many old tokens says nothing about what steps take."""

NUMERICAL_ERROR: Final = "numerical_error"
"""`SequenceFailure.code` of NaN logits: the only one after which the KV itself is bad."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave to the world."""

    deltas: list[TokenDelta]
    stats: StepStats


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
        self.policy = make_policy(config.policy)
        self._transfers = KvTransfers(connector, kv=kv)
        self.cost = CostModel()
        self._drafting = None if proposer is None else Drafting(proposer, cost=self.cost)
        self._limits = AdmissionLimits(
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            num_blocks=kv.pool.num_blocks,
            block_size=kv.block_size,
            windows=kv.windows,
            vocab_size=vocab_size,
            num_labels=num_labels,
        )
        self._groups: dict[RequestId, SequenceGroup] = {}
        self._adapters = adapters
        self._running = RunningSet(config, kv=kv, adapters=adapters)
        self._closing: list[SequenceGroup] = []
        self._sequences: dict[SequenceId, Sequence] = {}
        self.constraints: dict[SequenceId, Constraint] = {}
        """Of the answers that have not ended, for the masks of a step."""
        self._deltas: list[TokenDelta] = []
        self._finished_seq_ids: list[SequenceId] = []
        self._forced_tokens: list[ForcedTokens] = []
        self._last_step_id = 0
        self._num_waiting_tokens = 0
        self._counts: dict[int, StepCounts] = {}
        self._num_outputs_mean = 0.0
        self._must_recheck_paths = False

    # -- requests in and out -------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while any accepted request has not ended, or a delta has not been taken."""
        return bool(self._groups or self._closing or self._deltas)

    @property
    def num_waiting(self) -> int:
        """Requests that are not running."""
        return len(self._groups) - len(self._running)

    def add(self, request: EngineRequest, *, constraint: Constraint | None = None) -> None:
        """Accept a request; from here on it ends in exactly one terminal delta.

        Args:
            request: what is wanted.
            constraint: its grammar, compiled, at its start; this request owns it from now on.

        Raises:
            InvalidParameterError: it can never be served; the message says why, with the numbers.
            QueueFullError: the queue is at its limit; `retry_after_s` is the predicted wait.
        """
        if request.request_id in self._groups:
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
            tier=self.policy.tier_of(int(request.priority)),
            num_blocks_max=num_blocks_max(request, limits=self._limits),
            constraint=constraint,
        )
        self._groups[request.request_id] = group
        for seq in group.sequences:
            self._sequences[seq.seq_id] = seq
            if seq.constraint is not None:
                self.constraints[seq.seq_id] = seq.constraint
        self._num_waiting_tokens += num_prompt_tokens
        self.policy.add(group)
        if self._adapters is not None and request.adapter_revision:
            self._adapters.enter(request.adapter_revision)
        if group.ends_with_prompt and request.pooling is None and group.prompt_logprobs is None:
            self._close_answers(group, FinishReason.LENGTH)
            self._end(group)

    def _queue_load(self) -> QueueLoad:
        # Requests that find a free seat leave the queue with the next step: they do not count.
        num_seats = self._config.max_num_seqs - self._running.num_seqs
        return QueueLoad(
            num_requests=max(0, self.num_waiting - max(0, num_seats)),
            num_tokens=self._num_waiting_tokens,
            max_num_requests=self._config.max_num_queued_reqs,
            max_num_tokens=self._config.max_num_queued_tokens,
        )

    def predicted_wait_s(self, num_prompt_tokens: int) -> float:
        """Seconds until a request that came now would be scheduled, 1 to 60, by the cost model.

        The prompts before it must be computed, and where all seats are taken, answers must end.
        """
        config = self._config
        num_tokens = self._num_waiting_tokens + num_prompt_tokens
        num_steps = num_tokens / config.max_num_batched_tokens
        wait_s = num_steps * self.cost.predict(StepLoad(config.max_num_batched_tokens, 1, num_tokens))
        num_rounds = (self.num_waiting + self._running.num_seqs) // config.max_num_seqs
        num_kv_tokens = config.max_num_seqs * self._kv.block_size
        decode_s = self.cost.predict(StepLoad(config.max_num_seqs, config.max_num_seqs, num_kv_tokens))
        wait_s += num_rounds * self._num_outputs_mean * decode_s
        return min(MAX_RETRY_AFTER_S, max(1.0, wait_s))

    def abort(self, request_id: RequestId) -> None:
        """End a request now; unknown ids and requests that have ended are ignored.

        Its answers get `FinishReason.CANCELLED` deltas (by `take_deltas`, or with the next `apply`). Its
        blocks are freed at once, or by `apply` if a step under way uses them.
        """
        group = self._groups.get(request_id)
        if group is not None:
            self._close_answers(group, FinishReason.CANCELLED)
            self._end(group)

    def take_deltas(self) -> list[TokenDelta]:
        """Deltas made outside a step (cancelled, asked for no token); clears the list."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def _close_answers(self, group: SequenceGroup, reason: FinishReason) -> None:
        *_, last = group.open_answers
        for index in group.open_answers:
            stats = group.stats(now_s=self._clock.monotonic()) if index == last else None
            self._deltas.append(closing_delta(group, reason, index=index, stats=stats))
        for seq in group.live:
            seq.finish_reason = reason

    # -- planning a step -----------------------------------------------------------------------------------

    def schedule(self) -> StepPlan:
        """Plan the next step: running decodes, then running prefills, then waiting requests.

        Returns:
            The plan; without sequences if nothing can be computed now. Block tables are the live lists.
        """
        draft = StepDraft(num_tokens_left=self._config.max_num_batched_tokens)
        self._end_loads()
        if self._must_recheck_paths:
            self._restart_contaminated(draft)
        prefills = self._schedule_decodes(draft)
        if self._drafting and draft.decodes:
            self._add_drafts(draft, self._drafting)
        prefills.sort(key=lambda seq: (seq.group.tier, seq.group.arrival_idx))
        self._limit_chunks(draft, chunk_start=prefills[0].next_position if prefills else 0)
        self._schedule_prefills(draft, prefills)
        self._admit(draft)
        return self._finish_plan(draft)

    def _end_loads(self) -> None:
        for group, num_tokens in self._transfers.poll():
            if group.state is not GroupState.WAITING_KV:
                continue
            leader = group.live[0]
            leader.num_computed_tokens += num_tokens
            if not group.num_preemptions and not group.num_generated_tokens:
                group.num_cached_tokens = leader.num_computed_tokens
            group.move_to(GroupState.RUNNING)
            self._settle_blocks(leader)
        self._free_closed()

    def _schedule_decodes(self, draft: StepDraft) -> list[Sequence]:
        """Give each decode its token; returns the sequences that have more than that to compute."""
        prefills = []
        for group in list(self._running):
            needs_fork = group.needs_fork
            for seq in group.active:
                # Preemption for an earlier one may have taken this group out of the running set meanwhile.
                if group.state is not GroupState.RUNNING or seq.blocks.has_lost_path:
                    break
                gap = len(seq.token_ids) - seq.num_computed_tokens - seq.num_inflight_tokens
                if needs_fork or gap > 1 or (gap == 1 and seq.num_outputs == 0):
                    prefills.append(seq)
                elif gap == 1 and self._place(draft, seq, num_tokens=1):
                    draft.decodes.add(seq.seq_id)
        return prefills

    def _add_drafts(self, draft: StepDraft, drafting: Drafting) -> None:
        """Let decodes carry drafts, on half of what is left of the budget and on blocks that none misses."""
        decodes = [self._sequences[seq_id] for seq_id in draft.decodes]
        wanted = [
            Wanted(seq.seq_id, seq.token_ids, limit)
            for seq in decodes
            if (limit := self._num_drafts_max(seq, drafting)) > 0
        ]
        base = StepLoad(len(decodes), len(decodes), draft.num_kv_tokens)
        proposals = drafting.propose(wanted, base=base, num_rows=draft.num_tokens_left // 2)
        num_kept = self._kv.num_groups * self._running.num_seqs
        for seq_id, token_ids in proposals.items():
            seq = self._sequences[seq_id]
            start = seq.next_position + 1
            num_fit = self._kv.num_drafts_allocatable(
                seq.blocks, start=start, num_tokens=num_possible(seq, token_ids), num_kept=num_kept
            )
            if num_fit > 0:
                self._kv.allocate(seq.blocks, start=start, end=start + num_fit)
                draft.add_drafts(seq, token_ids[:num_fit])

    def _num_drafts_max(self, seq: Sequence, drafting: Drafting) -> int:
        """Drafts after whose confirmation the answer may still gain the token behind them."""
        if seq.group.beams is not None or not seq.group.request.params.can_speculate:
            return 0
        num_outputs_left = seq.group.request.max_tokens - seq.num_outputs - 1
        num_positions_left = self._config.max_model_len - seq.num_tokens - 1
        return min(drafting.num_tokens_max, num_outputs_left, num_positions_left)

    def _limit_chunks(self, draft: StepDraft, *, chunk_start: int) -> None:
        """With decodes in the step, cut the budget to what ends within the target; one block at least.

        Args:
            draft: with all decodes of the step.
            chunk_start: where the first prompt goes on.
        """
        num_decodes = len(draft.decodes)
        if not num_decodes or not self._config.enable_chunked_prefill:
            return
        num_drafts = draft.num_draft_tokens
        decodes = StepLoad(num_decodes, num_decodes, draft.num_kv_tokens, num_draft_tokens=num_drafts)
        target_s = step_target_s(
            self._config.step_time_target_ms / 1000,
            decodes_s=self.cost.predict(decodes),
            stretch=self._config.decode_stretch,
        )
        budget = self.cost.token_budget(
            target_s=target_s / self.cost.caution,
            num_seqs=num_decodes + 1,
            num_kv_tokens=draft.num_kv_tokens + chunk_start,
            chunk_start=chunk_start,
            num_draft_tokens=num_drafts,
        )
        num_tokens = max(self._kv.block_size, min(draft.num_tokens_left, budget - num_decodes))
        draft.num_tokens_left = min(draft.num_tokens_left, int(num_tokens))

    def _schedule_prefills(self, draft: StepDraft, prefills: list[Sequence]) -> None:
        for seq in prefills:
            if draft.num_tokens_left <= 0:
                return
            gap = seq.group.target(seq) - seq.next_position
            if gap <= 0 or seq.group.state is not GroupState.RUNNING:
                continue
            if not self._fits_step(draft, num_tokens=gap):
                draft.num_tokens_left = 0  # nobody behind it gets what it waits for
                return
            self._place(draft, seq, num_tokens=min(gap, draft.num_tokens_left))

    def _fits_step(self, draft: StepDraft, *, num_tokens: int) -> bool:
        """True if the step has room for the rest of a prompt, or may compute a part of it.

        Without chunked prefill it waits for a step with enough room: running answers end, and the budget is
        at least `max_model_len`.
        """
        return self._config.enable_chunked_prefill or num_tokens <= draft.num_tokens_left

    def _place(self, draft: StepDraft, seq: Sequence, *, num_tokens: int) -> int:
        """Put up to `num_tokens` of `seq` into the step, preempting if there is no block at all.

        Without chunked prefill it is all of them or none, preempting as long as some lack a slot.
        """
        start = seq.next_position
        kv, blocks = self._kv, seq.blocks
        kv.free_behind_window(blocks, num_computed_tokens=seq.num_computed_tokens)
        num_fit = kv.num_tokens_allocatable(blocks, start=start, num_tokens=num_tokens)
        num_least = 1 if self._config.enable_chunked_prefill else num_tokens
        while num_fit < num_least:
            if not self._make_room(draft, seq.group):
                return 0
            num_fit = kv.num_tokens_allocatable(blocks, start=start, num_tokens=num_tokens)
        kv.allocate(blocks, start=start, end=start + num_fit)
        draft.add(seq, num_tokens=num_fit, samples=self._samples(seq, end=start + num_fit))
        place = next_place(seq, block_size=self._kv.block_size)
        if place is not None:
            draft.note_next_block(seq, place)
        return num_fit

    def _samples(self, seq: Sequence, *, end: int) -> tuple[SampleSpec, ...]:
        group = seq.group
        if end < group.target(seq) or group.ends_with_prompt:
            return ()
        if not group.needs_fork:
            return (SampleSpec(seq.seq_id, seq.num_outputs),)
        if group.beams is not None:
            return () if seq.num_outputs else (SampleSpec(seq.seq_id, 0),)
        # After a preemption the prompt is computed once more for all, but each has a next token already.
        return tuple(SampleSpec(each.seq_id, 0) for each in group.live if each.num_outputs == 0)

    # -- preemption ----------------------------------------------------------------------------------------

    def _make_room(self, draft: StepDraft, group: SequenceGroup) -> bool:
        """Preempt somebody for `group`; False if `group` itself had to go or has to wait.

        A protected group never waits for long: what protected groups may need together fits the pool.
        """
        victim = self._running.worst()
        if victim is None:
            return False
        self._preempt(draft, victim)
        return victim is not group

    def _preempt(self, draft: StepDraft, group: SequenceGroup) -> None:
        group.num_preemptions += 1
        draft.counts.num_preemptions += 1
        self._put_back(draft, group)

    def _put_back(self, draft: StepDraft, group: SequenceGroup, *, taint: bool = False) -> None:
        """Free all that a running group holds and let it wait at its old place; it is recomputed later."""
        for seq in group.live:
            if draft.remove(seq):
                self._kv.drop_copies_to(seq.blocks)
            self._kv.free(seq.blocks, taint=taint)
            seq.restart()
        group.is_forked = False
        if group.beams is not None:
            group.beams.forget_offers()
        draft.num_promised_blocks = None
        self._running.leave(group)
        group.move_to(GroupState.WAITING)
        self._num_waiting_tokens += group.num_prompt_tokens
        self.policy.push(group)

    def _restart_contaminated(self, draft: StepDraft) -> None:
        """Recompute groups that share blocks which a failed sequence computed; not counted as preemption.

        One that is in flight gets no further work until that step is applied.
        """
        self._must_recheck_paths = False
        for group in list(self._running):
            if not any(seq.blocks.has_lost_path for seq in group.active):
                continue
            if group.is_busy:
                self._must_recheck_paths = True
            else:
                self._put_back(draft, group, taint=True)

    # -- admission to the running set ----------------------------------------------------------------------

    def _admit(self, draft: StepDraft) -> None:
        """Start waiting groups in the policy's order until tokens, seats or blocks run out.

        A group whose next block a running one (of no lower tier) computes in this very step is held back:
        one step later it finds that block in the tree. It keeps its place; only such groups are passed over.
        """
        held_back: list[SequenceGroup] = []
        broken: list[SequenceFailure] = []
        while draft.num_tokens_left > 0 and len(held_back) < self._config.max_num_seqs:
            group = self.policy.pop()
            if group is None:
                break
            leader = group.live[0]
            if self._waits_for_adapter(draft, group, broken):
                held_back.append(group)
                continue
            match = self._match(group)
            if is_held_back(draft, group, match, block_size=self._kv.block_size):
                held_back.append(group)
            elif self._fits_step(
                draft, num_tokens=group.target(leader) - match.num_blocks * self._kv.block_size
            ) and self._find_room(draft, group, match):
                self._start(draft, group, match)
                if draft.num_promised_blocks is not None:
                    draft.num_promised_blocks += self._running.num_promised(group)
            else:
                held_back.append(group)
                break
        for group in held_back:
            self.policy.push(group)
        self._end_failed(broken)

    def _waits_for_adapter(
        self, draft: StepDraft, group: SequenceGroup, broken: list[SequenceFailure]
    ) -> bool:
        """True if the group cannot start because its adapter is not in memory, or no slot is free.

        Who waits for a slot is not passed by others that would keep the slots in use. A group whose adapter
        cannot be read any more is put on `broken`.
        """
        revision = group.request.adapter_revision
        if self._adapters is None or not revision:
            return False
        readiness = self._adapters.ask(revision)
        if readiness is Readiness.BROKEN:
            message = "the adapter's files are gone or have changed"
            broken.append(SequenceFailure(group.live[0].seq_id, "adapter_unavailable", message))
            return True
        if readiness is Readiness.COMING:
            return True
        has_slot = readiness is Readiness.READY and self._adapters.can_take(revision)
        draft.owes_slot |= not has_slot
        return draft.owes_slot

    def _match(self, group: SequenceGroup) -> PrefixMatch:
        """The cached blocks that `group` can begin with."""
        leader = group.live[0]
        if group.needs_whole_prompt:
            return EMPTY_MATCH
        return self._kv.match(leader.blocks, leader.token_ids, num_tokens=group.target(leader))

    def _find_room(self, draft: StepDraft, group: SequenceGroup, match: PrefixMatch) -> bool:
        """True if `group` can start; preempts running groups of lower tiers if that is what it takes."""
        if not self._running.can_reserve(group):
            return False
        while not self._running.has_room(draft, group, match):
            victim = self._running.worst()
            if victim is None or victim.tier <= group.tier or not self._running.could_get_seats(group):
                return False
            self._preempt(draft, victim)
        return True

    def _start(self, draft: StepDraft, group: SequenceGroup, match: PrefixMatch) -> None:
        leader = group.live[0]
        leader.num_computed_tokens = self._kv.acquire(leader.blocks, match)
        for seq in group.live:
            seq.own_tokens()
        self._running.join(group)
        self._num_waiting_tokens -= group.num_prompt_tokens
        if group.first_scheduled_s is None:
            self._count_start(draft, group, num_hit=leader.num_computed_tokens)
        num_loadable = 0 if group.needs_whole_prompt else self._transfers.num_loadable_tokens(leader)
        if num_loadable:
            group.move_to(GroupState.WAITING_KV)
            self._transfers.begin_load(leader, num_tokens=num_loadable)
            return
        group.move_to(GroupState.RUNNING)
        gap = group.target(leader) - leader.next_position
        self._place(draft, leader, num_tokens=min(gap, draft.num_tokens_left))

    def _count_start(self, draft: StepDraft, group: SequenceGroup, *, num_hit: int) -> None:
        draft.started.append(group)
        draft.counts.num_prefix_query_tokens += group.num_prompt_tokens
        draft.counts.num_prefix_hit_tokens += num_hit
        group.first_scheduled_s = self._clock.monotonic()
        group.num_cached_tokens = num_hit
        self.policy.charge(group, num_prompt_tokens=group.num_prompt_tokens - num_hit)

    def _finish_plan(self, draft: StepDraft) -> StepPlan:
        self._last_step_id += 1
        self._counts[self._last_step_id] = draft.counts
        usage = self._kv.usage()
        for group in draft.started:
            group.batch_size = len(draft.scheduled)
            group.kv_usage = usage.num_owned / usage.num_blocks
        finished, self._finished_seq_ids = self._finished_seq_ids, []
        forced, self._forced_tokens = self._forced_tokens, []
        bindings = [] if self._adapters is None else self._adapters.take_bindings()
        return StepPlan(
            step_id=self._last_step_id,
            sequences=self._in_adapter_order(draft),
            new_sequences=self._mark_inflight(draft),
            forced_tokens=forced,
            finished_seq_ids=finished,
            block_copies=[BlockCopy(copy.src, copy.dst) for copy in self._kv.take_copies()],
            blocks_to_zero=self._kv.take_blocks_to_zero(),
            adapter_bindings=[AdapterBinding(slot, revision) for slot, revision in bindings],
        )

    def _in_adapter_order(self, draft: StepDraft) -> list[ScheduledSequence]:
        """The step's sequences; those of one adapter together, so that its weights are read once."""
        sequences = list(draft.scheduled.values())
        if self._adapters is not None and self._adapters.num_used:
            sequences.sort(key=lambda entry: entry.adapter_slot)
        return sequences

    def _mark_inflight(self, draft: StepDraft) -> list[NewSequence]:
        """The step is under way from here on; returns the sequences that the runner has not met."""
        unknown = []
        for seq_id, entry in draft.scheduled.items():
            seq = self._sequences[seq_id]
            seq.num_inflight_tokens += len(entry.token_ids)
            seq.num_inflight_drafts += entry.num_drafts
            met = [seq, *(self._sequences[spec.seq_id] for spec in entry.samples if spec.seq_id != seq_id)]
            for each in met:
                if not each.is_known_to_runner:
                    each.is_known_to_runner = True
                    unknown.append(new_sequence(each))
        return unknown

    # -- the outcome of a step -----------------------------------------------------------------------------

    def apply(self, plan: StepPlan, result: StepResult) -> StepOutput:
        """Take in what a step produced: tokens, endings, failures, full blocks.

        Returns:
            The deltas of the step (and those made since the last one), and its figures.
        """
        failures = {failure.seq_id: failure for failure in result.failures}
        counts = self._counts.pop(plan.step_id)
        for entry in plan.sequences:
            self._advance(entry, counts, has_failed=entry.seq_id in failures)
        self._end_failed(failures.values())
        for entry in plan.sequences:
            self._settle_blocks(self._sequences.get(entry.seq_id))
        self._take_prompt_outputs(plan, result)
        for seq_id, drawn in groupby(result.tokens, key=lambda sampled: sampled.seq_id):
            self._take_tokens(seq_id, drawn, counts)
        if self._drafting:
            self._settle_drafts(self._drafting, plan, result, counts)
        self._free_closed()
        if counts.num_seqs and not failures and result.num_caught_up_tokens <= MAX_UNNOTICED_CATCH_UP:
            self.cost.observe(counts.load, step_time_s=result.step_time_s)
        return StepOutput(deltas=self.take_deltas(), stats=self._stats(counts, result.step_time_s))

    def _advance(self, entry: ScheduledSequence, counts: StepCounts, *, has_failed: bool) -> None:
        """Move what the step computed of one sequence from in flight to computed."""
        seq = self._sequences[entry.seq_id]
        num_tokens = len(entry.token_ids) - entry.num_drafts
        counts.num_seqs += 1
        counts.num_tokens += num_tokens
        counts.num_kv_tokens += entry.start + num_tokens
        if num_tokens > 1 or seq.num_outputs == 0:
            counts.num_prompt_tokens += num_tokens
            counts.num_chunk_pairs += num_tokens * (entry.start + num_tokens)
        seq.num_inflight_tokens -= num_tokens + entry.num_drafts
        seq.num_inflight_drafts -= entry.num_drafts
        if not has_failed:
            seq.num_computed_tokens += num_tokens

    def _end_failed(self, failures: Iterable[SequenceFailure]) -> None:
        for failure in failures:
            seq = self._sequences.get(failure.seq_id)
            if seq is None:
                continue
            group = seq.group
            # Also of a request that has ended meanwhile: its blocks are yet to be freed.
            group.is_tainted |= failure.code == NUMERICAL_ERROR
            if seq.finish_reason is not None or self._ends_whole(seq, failure):
                continue
            # a beam is not an answer: a search with fewer answers than beams has no such index
            index = seq.index if group.beams is None else 0
            self._deltas.append(failure_delta(group, failure, index=index))
            for each in group.live:
                each.finish_reason = FinishReason.ERROR
            self._end(group)

    def _ends_whole(self, seq: Sequence, failure: SequenceFailure) -> bool:
        """End an answer that its grammar lets end where `min_tokens` or a ban leaves nothing else to draw."""
        if failure.code != NO_TOKEN_ALLOWED or seq.constraint is None or not seq.constraint.may_end:
            return False
        is_last = len(seq.group.live) == 1
        stats = seq.group.stats(now_s=self._clock.monotonic()) if is_last else None
        self._deltas.append(closing_delta(seq.group, FinishReason.STOP, index=seq.index, stats=stats))
        self._end_answer(seq, FinishReason.STOP)
        return True

    def _settle_blocks(self, seq: Sequence | None) -> None:
        """Enter full blocks into the tree, and fork once the prompt is computed."""
        if seq is None or seq.finish_reason is not None:
            return
        group = seq.group
        num_known = seq.blocks.num_tree_blocks
        if self._kv.cache_full_blocks(seq.blocks, seq.token_ids, num_computed_tokens=seq.num_computed_tokens):
            self._transfers.save(seq, first_block=num_known)
        if group.needs_fork and seq.num_computed_tokens == group.num_prompt_tokens:
            self._fork(group)

    def _fork(self, group: SequenceGroup) -> None:
        leader = group.live[0]
        for seq in group.live[1:]:
            seq.blocks = self._kv.fork(leader.blocks)
            seq.num_computed_tokens = group.num_prompt_tokens
        group.is_forked = True

    def _take_prompt_outputs(self, plan: StepPlan, result: StepResult) -> None:
        """Collect what was asked of prompts, and end the requests that asked for nothing else."""
        for part in result.prompt_logprobs:
            seq = self._sequences.get(part.seq_id)
            told = None if seq is None else seq.group.prompt_logprobs
            if told is not None:
                del told[part.start - 1 :]  # of a computation before a preemption
                told.extend(part.logprobs)
        pooled = {each.seq_id: each.values for each in result.pooled}
        for entry in plan.sequences:
            seq = None if entry.samples else self._sequences.get(entry.seq_id)
            if seq is None or seq.finish_reason is not None or not seq.group.ends_with_prompt:
                continue
            if seq.num_computed_tokens == seq.num_prompt_tokens:
                self._end_with_prompt(seq.group, pooled=pooled.get(seq.seq_id))

    def _end_with_prompt(self, group: SequenceGroup, *, pooled: tuple[float, ...] | None) -> None:
        assert (pooled is None) == (group.request.pooling is None), "the runner pools what it is asked to"
        reason = FinishReason.LENGTH if pooled is None else FinishReason.STOP
        first, *_, last = (*group.open_answers, group.open_answers[-1])
        for index in group.open_answers:
            self._deltas.append(
                closing_delta(
                    group,
                    reason,
                    index=index,
                    stats=group.stats(now_s=self._clock.monotonic()) if index == last else None,
                    prompt_logprobs=group.take_prompt_logprobs() if index == first else None,
                    pooled=pooled,
                )
            )
        for seq in group.live:
            seq.finish_reason = reason
        self._end(group)

    def _take_tokens(self, seq_id: SequenceId, drawn: Iterable[SampledToken], counts: StepCounts) -> None:
        """Append what was drawn for an answer, and what its grammar forces after it; end it if it is over."""
        seq = self._sequences.get(seq_id)
        if seq is None or seq.finish_reason is not None:
            return
        group = seq.group
        if group.beams is not None:
            self._take_beam(seq, next(iter(drawn)))
            return
        is_first = group.num_generated_tokens == 0
        gain = take_tokens(
            seq,
            drawn,
            max_model_len=self._config.max_model_len,
            jumps_forward=self._config.enable_jump_forward,
        )
        if gain.failure is not None:
            self._end_failed([SequenceFailure(seq_id, GRAMMAR_ERROR, gain.failure)])
            return
        self._count_gain(seq, gain, counts)
        is_last = gain.ending.finish_reason is not None and len(group.live) == 1
        stats = group.stats(now_s=self._clock.monotonic()) if is_last or is_first else None
        self._deltas.append(
            token_delta(
                seq,
                gain,
                stats=stats if is_last else None,
                stats_so_far=stats if is_first else None,
                prompt_logprobs=group.take_prompt_logprobs() if seq.index == 0 else None,
            )
        )
        if gain.ending.finish_reason is not None:
            self._end_answer(seq, gain.ending.finish_reason)

    def _take_beam(self, seq: Sequence, sampled: SampledToken) -> None:
        """Note how one beam may go on; once that is known of all, fork and prune them, or end the search."""
        group = seq.group
        assert group.beams is not None
        assert sampled.logprobs is not None
        if not group.beams.offer(group.live.index(seq), sampled.logprobs):
            return
        beams = group.beams.advance()
        if beams is None:
            self._end_search(group)
            return
        self.policy.charge(group, num_output_tokens=len(beams))
        for left_over in regroup(group, beams, kv=self._kv):
            self._running.num_seqs -= 1
            self._forget(left_over)

    def _end_search(self, group: SequenceGroup) -> None:
        assert group.beams is not None
        best = group.beams.finished[: group.request.params.n]
        group.num_generated_tokens = sum(len(answer.token_ids) for answer in best)
        self._deltas.extend(beam_deltas(group, stats=group.stats(now_s=self._clock.monotonic())))
        for seq in group.live:
            seq.finish_reason = FinishReason.STOP
        self._end(group)

    def _settle_drafts(
        self, drafting: Drafting, plan: StepPlan, result: StepResult, counts: StepCounts
    ) -> None:
        """Keep what confirmed drafts computed, give back the blocks of the others, and learn from both."""
        num_drawn = Counter(sampled.seq_id for sampled in result.tokens)
        num_guessed = {each.seq_id: len(each.token_ids) for each in result.proposals}
        for entry in plan.sequences:
            if not entry.num_drafts:
                continue
            num_drafts = num_guessed.get(entry.seq_id, entry.num_drafts)
            num_right = max(0, num_drawn[entry.seq_id] - 1)
            counts.count_draft(num_tokens=num_drafts, num_accepted=num_right)
            seq = self._sequences.get(entry.seq_id)
            if seq is None or seq.finish_reason is not None:
                continue
            drafting.learn(seq.seq_id, num_drafts=num_drafts, num_right=num_right)
            self._settle_blocks(seq)
            self._kv.free_tail(seq.blocks, num_tokens=seq.num_computed_tokens)

    def _count_gain(self, seq: Sequence, gain: Gain, counts: StepCounts) -> None:
        num_tokens = len(gain.token_ids)
        counts.num_generated_tokens += num_tokens
        counts.num_forced_tokens += gain.num_forced
        if gain.num_forced:
            self._forced_tokens.append(ForcedTokens(seq.seq_id, tuple(gain.token_ids[-gain.num_forced :])))
        if num_tokens:
            seq.group.num_generated_tokens += num_tokens
            self.policy.charge(seq.group, num_output_tokens=num_tokens)

    def _end_answer(self, seq: Sequence, reason: FinishReason) -> None:
        """One answer is over; the request with it if it was the last."""
        group = seq.group
        self._settle_blocks(seq)
        seq.finish_reason = reason
        self._num_outputs_mean += MEAN_WEIGHT * (seq.num_outputs - self._num_outputs_mean)
        if len(group.live) == 1:
            self._end(group)
            return
        group.live.remove(seq)
        self._running.num_seqs -= 1
        self._forget(seq)

    def _end(self, group: SequenceGroup) -> None:
        """The request is over: free all now, or once the step or load under way is done."""
        if group.state is GroupState.WAITING:
            self.policy.remove(group)
            self._num_waiting_tokens -= group.num_prompt_tokens
        else:
            self._running.leave(group)
        if self._adapters is not None and group.request.adapter_revision:
            self._adapters.exit(group.request.adapter_revision)
        group.move_to(GroupState.FINISHED)
        del self._groups[group.request.request_id]
        self.policy.end(group)
        self._closing.append(group)
        self._free_closed()

    def _free_closed(self) -> None:
        if not self._closing:
            return
        ended = [group for group in self._closing if not group.is_busy]
        self._closing = [group for group in self._closing if group.is_busy]
        for group in ended:
            for seq in group.live:
                self._forget(seq)
            group.live.clear()
            self._must_recheck_paths |= group.is_tainted

    def _forget(self, seq: Sequence) -> None:
        self._kv.free(seq.blocks, taint=seq.group.is_tainted)
        del self._sequences[seq.seq_id]
        self.constraints.pop(seq.seq_id, None)
        if self._drafting:
            self._drafting.forget(seq.seq_id)
        if seq.is_known_to_runner:
            self._finished_seq_ids.append(seq.seq_id)

    # -- figures -------------------------------------------------------------------------------------------

    def _stats(self, counts: StepCounts, step_time_s: float) -> StepStats:
        gauges = QueueGauges(
            num_running=len(self._running),
            num_waiting=self.num_waiting,
            num_waiting_tokens=self._num_waiting_tokens,
            num_adapters_running=0 if self._adapters is None else self._adapters.num_used,
            num_adapters_waiting=0 if self._adapters is None else self._adapters.num_waiting,
        )
        return step_stats(
            counts,
            gauges=gauges,
            kv=self._kv,
            running=self._running,
            step_time_s=step_time_s,
        )

    def reports(self) -> list[RequestReport]:
        """Every request in the engine, oldest first, at most 10,000; never its text."""
        now_s = self._clock.monotonic()
        groups = list(self._groups.values())[:MAX_REPORTS]
        return [request_report(group, now_s=now_s) for group in groups]

    @property
    def drafting_bytes(self) -> int:
        """Bytes that speculation holds beside the sequences."""
        return self._drafting.num_bytes if self._drafting else 0

    @property
    def groups(self) -> list[SequenceGroup]:
        """All that hold or may hold blocks, for checkers; not to be changed."""
        return [*self._groups.values(), *self._closing]

    @property
    def held_blocks(self) -> list[int]:
        """Blocks held by saves under way, for checkers; one entry for each hold."""
        return self._transfers.held_blocks
