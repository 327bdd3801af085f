"""What the next step computes: running decodes, then running prefills, then waiting requests.

It hands out the step's tokens, seats and blocks, preempts where there are too few, and leaves a `StepPlan`
and the counts so far. It ends nothing but requests whose adapter is gone. Called by `scheduler`.
"""

from typing import NamedTuple

from penstock.core.ports import Clock
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import EMPTY_MATCH, KvManager
from penstock.engine.kv.prefix_tree import PrefixMatch
from penstock.engine.lora.slots import AdapterSlots, Readiness
from penstock.engine.scheduler.computed_blocks import settle_blocks
from penstock.engine.scheduler.cost import CostModel, StepLoad, step_target_s
from penstock.engine.scheduler.drafting import Drafting, Wanted, num_possible
from penstock.engine.scheduler.figures import StepCounts
from penstock.engine.scheduler.lookahead import can_go_ahead, needs_result
from penstock.engine.scheduler.memory_pressure import MemoryPressure
from penstock.engine.scheduler.plan import (
    AdapterBinding,
    BlockCopy,
    NewSequence,
    SampleSpec,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
)
from penstock.engine.scheduler.prefix_wait import is_held_back, next_place
from penstock.engine.scheduler.request import GroupState, Sequence, SequenceGroup
from penstock.engine.scheduler.roster import Roster
from penstock.engine.scheduler.step_draft import StepDraft, new_sequence


class Planned(NamedTuple):
    """A step that can be launched."""

    plan: StepPlan
    counts: StepCounts
    """What planning counted; `settlement` goes on counting."""
    needs_result: bool
    """No step may be planned before this one is applied."""


class Planner:
    """See the module."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        roster: Roster,
        kv: KvManager,
        clock: Clock,
        cost: CostModel,
        drafting: Drafting | None,
        adapters: AdapterSlots | None,
        pressure: MemoryPressure,
    ) -> None:
        self._config = config
        self._roster = roster
        self._kv = kv
        self._clock = clock
        self._cost = cost
        self._drafting = drafting
        self._speculates = drafting is not None
        self._adapters = adapters
        self._pressure = pressure
        self._last_step_id = 0
        self.is_paused = False
        """Requests that run go back to their places in the queue, and nobody starts."""

    def plan(self, *, is_ahead: bool = False) -> Planned:
        """Plan the next step; it counts as under way from here on.

        Args:
            is_ahead: a step is under way, and this one may go on with tokens that it draws.

        Returns:
            The plan; without sequences if nothing can be computed now. Block tables are the live lists.
        """
        draft = StepDraft(num_tokens_left=self._pressure.budget, is_ahead=is_ahead)
        self._end_loads(draft)
        if self.is_paused:
            self._put_all_back(draft)
            return self._finish_plan(draft)
        if self._pressure.is_high:
            self._shed(draft)
        if self._roster.must_recheck_paths:
            self._restart_contaminated(draft)
        prefills = self._schedule_decodes(draft)
        if self._drafting and draft.decodes and not self._drafting.rests(len(draft.decodes)):
            self._add_drafts(draft, self._drafting)
        prefills.sort(key=lambda seq: (seq.group.tier, seq.group.arrival_idx))
        if prefills or self._roster.num_waiting:
            start = prefills[0].next_position if prefills else 0
            self._limit_chunks(draft, chunk_start=start, num_prefills=len(prefills))
        self._schedule_prefills(draft, prefills)
        self._admit(draft)
        return self._finish_plan(draft)

    def _end_loads(self, draft: StepDraft) -> None:
        for group, num_tokens in self._roster.transfers.poll():
            if group.state is not GroupState.WAITING_KV:
                continue
            leader = group.live[0]
            leader.num_computed_tokens += num_tokens
            draft.counts.num_loaded_tokens += num_tokens
            if not group.num_preemptions and not group.num_generated_tokens:
                group.num_cached_tokens = leader.num_computed_tokens
            group.move_to(GroupState.RUNNING)
            settle_blocks(leader, kv=self._kv, transfers=self._roster.transfers)
        self._roster.free_closed()

    def _schedule_decodes(self, draft: StepDraft) -> list[Sequence]:
        """Give each decode its token; returns the sequences that have more than that to compute."""
        prefills = []
        for group in list(self._roster.running):
            needs_fork = group.needs_fork
            for seq in group.active:
                # Preemption for an earlier one may have taken this group out of the running set meanwhile.
                if group.state is not GroupState.RUNNING or seq.blocks.has_lost_path or seq.is_held:
                    break
                gap = len(seq.token_ids) - seq.num_computed_tokens - seq.num_inflight_tokens
                if needs_fork or gap > 1 or (gap == 1 and seq.num_outputs == 0):
                    prefills.append(seq)
                elif (gap == 1 or self._goes_ahead(draft, seq)) and self._place(draft, seq, num_tokens=1):
                    draft.decodes.add(seq.seq_id)
        return prefills

    def _goes_ahead(self, draft: StepDraft, seq: Sequence) -> bool:
        """True if `seq` goes on with the token that the step under way draws for it."""
        return draft.is_ahead and can_go_ahead(seq, max_model_len=self._config.max_model_len)

    def _add_drafts(self, draft: StepDraft, drafting: Drafting) -> None:
        """Let decodes carry drafts, on half of what is left of the budget and on blocks that none misses."""
        decodes = [self._roster.sequences[seq_id] for seq_id in draft.decodes]
        wanted = [
            Wanted(seq.seq_id, seq.token_ids, limit)
            for seq in decodes
            if (limit := self._num_drafts_max(seq, drafting)) > 0
        ]
        base = StepLoad(len(decodes), len(decodes), draft.num_kv_tokens)
        proposals = drafting.propose(wanted, base=base, num_rows=draft.num_tokens_left // 2)
        num_kept = self._kv.num_groups * self._roster.running.num_seqs
        for seq_id, token_ids in proposals.items():
            seq = self._roster.sequences[seq_id]
            start = seq.next_position + 1
            num_fit = self._kv.num_drafts_allocatable(
                seq.blocks, start=start, num_tokens=num_possible(seq, token_ids), num_kept=num_kept
            )
            if num_fit > 0:
                self._kv.allocate(seq.blocks, start=start, end=start + num_fit)
                draft.add_drafts(seq, token_ids[:num_fit])

    def _num_drafts_max(self, seq: Sequence, drafting: Drafting) -> int:
        """Drafts after whose confirmation the answer may still gain the token behind them."""
        if not seq.group.request.params.can_speculate:
            return 0
        num_outputs_left = seq.group.request.max_tokens - seq.num_outputs - 1
        num_positions_left = self._config.max_model_len - seq.num_tokens - 1
        return min(drafting.num_tokens_max, num_outputs_left, num_positions_left)

    def _limit_chunks(self, draft: StepDraft, *, chunk_start: int, num_prefills: int) -> None:
        """With decodes in the step, cut the budget to what ends within the target; one block at least.

        Where more prompts ask for the step than answers run, it may be longer in that proportion: each token
        of a chunk delays so many and is waited for by so many, and a small batch is a slow one.

        Args:
            draft: with all decodes of the step.
            chunk_start: where the first prompt goes on.
            num_prefills: prompts that have begun.
        """
        num_decodes = len(draft.decodes)
        if not num_decodes or not self._config.enable_chunked_prefill:
            return
        num_seats = self._config.max_num_seqs - self._roster.running.num_seqs
        num_asking = num_prefills + min(self._roster.num_waiting, max(0, num_seats))
        num_drafts = draft.num_draft_tokens
        decodes = StepLoad(num_decodes, num_decodes, draft.num_kv_tokens, num_draft_tokens=num_drafts)
        target_s = step_target_s(
            self._config.step_time_target_ms / 1000,
            decodes_s=self._cost.predict(decodes),
            stretch=self._config.decode_stretch * max(1.0, num_asking / num_decodes),
        )
        budget = self._cost.token_budget(
            target_s=target_s / self._cost.caution,
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
        if not self._kv.has_slots(seq.blocks, end=start + num_tokens):
            num_tokens = self._find_slots(draft, seq, start=start, num_tokens=num_tokens)
            if not num_tokens:
                return 0
        draft.add(seq, num_tokens=num_tokens, samples=self._samples(seq, end=start + num_tokens))
        place = next_place(seq, block_size=self._kv.block_size)
        if place is not None:
            draft.note_next_block(seq, place)
        return num_tokens

    def _find_slots(self, draft: StepDraft, seq: Sequence, *, start: int, num_tokens: int) -> int:
        """Allocate blocks for as many of `num_tokens` as `_place` says; returns for how many."""
        kv, blocks = self._kv, seq.blocks
        kv.free_behind_window(blocks, num_computed_tokens=seq.num_computed_tokens)
        num_fit = kv.num_tokens_allocatable(blocks, start=start, num_tokens=num_tokens)
        num_least = 1 if self._config.enable_chunked_prefill else num_tokens
        while num_fit < num_least:
            if not self._make_room(draft, seq.group):
                return 0
            num_fit = kv.num_tokens_allocatable(blocks, start=start, num_tokens=num_tokens)
        kv.allocate(blocks, start=start, end=start + num_fit)
        return num_fit

    def _samples(self, seq: Sequence, *, end: int) -> tuple[SampleSpec, ...]:
        group = seq.group
        if group.needs_fork:
            return self._first_samples(group, end=end)
        if end < seq.num_tokens or group.ends_with_prompt:
            return ()
        return (SampleSpec(seq.seq_id, seq.num_outputs + (end > seq.num_tokens)),)

    def _first_samples(self, group: SequenceGroup, *, end: int) -> tuple[SampleSpec, ...]:
        """Of the sequence that computes the prompt for all of its group."""
        seq = group.live[0]
        if end < group.num_prompt_tokens or group.ends_with_prompt:
            return ()
        if group.beams is not None:
            return () if seq.num_outputs else (SampleSpec(seq.seq_id, 0),)
        # After a preemption the prompt is computed once more for all, but each has a next token already.
        return tuple(SampleSpec(each.seq_id, 0) for each in group.live if each.num_outputs == 0)

    # -- preemption ------------------------------------------------------------------------------------------

    def _make_room(self, draft: StepDraft, group: SequenceGroup) -> bool:
        """Preempt somebody for `group`; False if `group` itself had to go or has to wait.

        A protected group never waits for long: what protected groups may need together fits the pool. A step
        that is planned ahead preempts nobody: most are in the step under way, and who is not would always go.
        """
        victim = self._roster.running.worst(even_busy=draft.is_ahead)
        if victim is None or draft.is_ahead:
            draft.needs_result |= victim is not None
            return False
        self._preempt(draft, victim)
        return victim is not group

    def _shed(self, draft: StepDraft) -> None:
        """Memory is short: preempt down to what steps may hold now, and plan none ahead."""
        draft.needs_result = True
        running = self._roster.running
        while sum(len(group.active) for group in running) > draft.num_tokens_left:
            victim = running.worst()
            if victim is None:
                return
            self._preempt(draft, victim)

    def _preempt(self, draft: StepDraft, group: SequenceGroup) -> None:
        group.num_preemptions += 1
        draft.counts.num_preemptions += 1
        self._put_back(draft, group)

    def _put_back(self, draft: StepDraft, group: SequenceGroup, *, taint: bool = False) -> None:
        """Take a running group out of the step and the running set; it is recomputed later."""
        for seq in group.live:
            if draft.remove(seq):
                self._kv.drop_copies_to(seq.blocks)
        draft.num_promised_blocks = None
        self._roster.requeue(group, taint=taint)

    def _put_all_back(self, draft: StepDraft) -> None:
        """Not counted as preemption: it is nobody's fault, and protects nobody."""
        for group in list(self._roster.running):
            if group.state is GroupState.RUNNING and not group.is_busy:
                self._put_back(draft, group)

    def _restart_contaminated(self, draft: StepDraft) -> None:
        """Recompute groups that share blocks which a failed sequence computed; not counted as preemption.

        One that is in flight gets no further work until that step is applied.
        """
        self._roster.must_recheck_paths = False
        for group in list(self._roster.running):
            if not any(seq.blocks.has_lost_path for seq in group.active):
                continue
            if group.is_busy:
                self._roster.must_recheck_paths = True
            else:
                self._put_back(draft, group, taint=True)

    # -- admission to the running set ------------------------------------------------------------------------

    def _admit(self, draft: StepDraft) -> None:
        """Start waiting groups in the policy's order until tokens, seats or blocks run out.

        A group whose next block a running one (of no lower tier) computes in this very step is held back:
        one step later it finds that block in the tree. It keeps its place; only such groups are passed over.
        """
        held_back: list[SequenceGroup] = []
        broken: list[SequenceFailure] = []
        while draft.num_tokens_left > 0 and len(held_back) < self._config.max_num_seqs:
            group = self._roster.policy.pop()
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
                    draft.num_promised_blocks += self._roster.running.num_promised(group)
            else:
                held_back.append(group)
                break
        for group in held_back:
            self._roster.policy.push(group)
        self._roster.fail(broken)

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
        if not self._roster.running.can_reserve(group):
            return False
        while not self._roster.running.has_room(draft, group, match):
            victim = self._victim(group, even_busy=draft.is_ahead)
            if victim is None or draft.is_ahead:
                draft.needs_result |= victim is not None
                return False
            self._preempt(draft, victim)
        return True

    def _victim(self, group: SequenceGroup, *, even_busy: bool) -> SequenceGroup | None:
        """Who would be preempted so that `group` can start; None if nobody may be, or it would not help."""
        running = self._roster.running
        victim = running.worst(even_busy=even_busy)
        if victim is None or victim.tier <= group.tier:
            return None
        return victim if running.could_get_seats(group, even_busy=even_busy) else None

    def _start(self, draft: StepDraft, group: SequenceGroup, match: PrefixMatch) -> None:
        leader = group.live[0]
        leader.num_computed_tokens = self._kv.acquire(leader.blocks, match)
        self._roster.start(group)
        if group.first_scheduled_s is None:
            self._count_start(draft, group, num_hit=leader.num_computed_tokens)
        num_loadable = 0 if group.needs_whole_prompt else self._roster.transfers.num_loadable_tokens(leader)
        if num_loadable:
            group.move_to(GroupState.WAITING_KV)
            self._roster.transfers.begin_load(leader, num_tokens=num_loadable)
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
        self._roster.policy.charge(group, num_prompt_tokens=group.num_prompt_tokens - num_hit)

    # -- the plan --------------------------------------------------------------------------------------------

    def _finish_plan(self, draft: StepDraft) -> Planned:
        self._last_step_id += 1
        usage = self._kv.usage()
        for group in draft.started:
            group.batch_size = len(draft.scheduled)
            group.kv_usage = usage.num_owned / usage.num_blocks
        bindings = [] if self._adapters is None else self._adapters.take_bindings()
        plan = StepPlan(
            step_id=self._last_step_id,
            sequences=self._in_adapter_order(draft),
            new_sequences=self._mark_inflight(draft),
            forced_tokens=self._roster.take_forced_tokens(),
            finished_seq_ids=self._roster.take_finished_seq_ids(),
            block_copies=[BlockCopy(copy.src, copy.dst) for copy in self._kv.take_copies()],
            blocks_to_zero=self._kv.take_blocks_to_zero(),
            adapter_bindings=[AdapterBinding(slot, revision) for slot, revision in bindings],
            host_moves=self._roster.transfers.take_moves(),
        )
        return Planned(plan, draft.counts, draft.needs_result)

    def _in_adapter_order(self, draft: StepDraft) -> list[ScheduledSequence]:
        """The step's sequences; those of one adapter together, so that its weights are read once."""
        sequences = list(draft.scheduled.values())
        if self._adapters is not None and self._adapters.num_used:
            sequences.sort(key=lambda entry: entry.adapter_slot)
        return sequences

    def _mark_inflight(self, draft: StepDraft) -> list[NewSequence]:
        """The step is under way from here on; returns the sequences that the runner has not met."""
        unknown = []
        sequences = self._roster.sequences
        for seq_id, entry in draft.scheduled.items():
            seq = sequences[seq_id]
            seq.num_inflight_tokens += len(entry.token_ids)
            seq.num_inflight_drafts += entry.num_drafts
            for spec in entry.samples:
                sequences[spec.seq_id].num_draws = spec.output_idx + 1
            draft.needs_result |= bool(entry.samples) and needs_result(seq, speculates=self._speculates)
            if not seq.is_known_to_runner:
                unknown.append(seq)
                seq.is_known_to_runner = True
            for spec in entry.samples:
                drawn = sequences[spec.seq_id]
                if not drawn.is_known_to_runner:
                    unknown.append(drawn)
                    drawn.is_known_to_runner = True
        return [new_sequence(seq) for seq in unknown]
