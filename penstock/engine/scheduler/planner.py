"""What the next step computes: running decodes, then running prefills, then waiting requests.

It hands out the step's tokens and leaves a `StepPlan` and the counts so far:

```
decodes, prefills > placement > slots, draws; preemption where there is no block
waiting requests  > newcomers > seats, prefix hits; preemption of lower tiers; then placement
```

It ends nothing but requests whose adapter is gone. Called by `scheduler`.
"""

from typing import NamedTuple

from penstock.core.ports import Clock
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.lora.slots import AdapterSlots
from penstock.engine.scheduler.computed_blocks import settle_blocks
from penstock.engine.scheduler.cost import CostModel, StepLoad, step_target_s
from penstock.engine.scheduler.drafting import Drafting, Wanted, num_possible
from penstock.engine.scheduler.figures import StepCounts
from penstock.engine.scheduler.lookahead import can_go_ahead, needs_result
from penstock.engine.scheduler.memory_pressure import MemoryPressure
from penstock.engine.scheduler.newcomers import Newcomers
from penstock.engine.scheduler.placement import Placement
from penstock.engine.scheduler.plan import (
    AdapterBinding,
    BlockCopy,
    NewSequence,
    ScheduledSequence,
    StepPlan,
)
from penstock.engine.scheduler.preemption import Preemption
from penstock.engine.scheduler.request import GroupState, Sequence
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
        self._cost = cost
        self._drafting = drafting
        self._speculates = drafting is not None
        self._adapters = adapters
        self._pressure = pressure
        self._preemption = Preemption(roster=roster, kv=kv)
        self._placement = Placement(config, kv=kv, preemption=self._preemption)
        self._newcomers = Newcomers(
            config,
            roster=roster,
            kv=kv,
            clock=clock,
            adapters=adapters,
            placement=self._placement,
            preemption=self._preemption,
        )
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
            self._preemption.put_all_back(draft)
            return self._finish_plan(draft)
        if self._pressure.is_high:
            self._preemption.shed(draft)
        if self._roster.must_recheck_paths:
            self._preemption.restart_contaminated(draft)
        prefills = self._schedule_decodes(draft)
        if self._drafting and draft.decodes and not self._drafting.rests(len(draft.decodes)):
            self._add_drafts(draft, self._drafting)
        prefills.sort(key=lambda seq: (seq.group.tier, seq.group.arrival_idx))
        if prefills or self._roster.num_waiting:
            start = prefills[0].next_position if prefills else 0
            self._limit_chunks(draft, chunk_start=start, num_prefills=len(prefills))
        self._schedule_prefills(draft, prefills)
        self._newcomers.admit(draft)
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
                    continue
                is_decode = gap == 1 or self._goes_ahead(draft, seq)
                if is_decode and self._placement.place(draft, seq, num_tokens=1):
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
            if not self._placement.fits_step(draft, num_tokens=gap):
                draft.num_tokens_left = 0  # nobody behind it gets what it waits for
                return
            self._placement.place(draft, seq, num_tokens=min(gap, draft.num_tokens_left))

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
