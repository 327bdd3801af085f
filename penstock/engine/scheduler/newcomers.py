"""Waiting requests that start to run: in the policy's order, as far as tokens, seats, slots and blocks go.

It begins each with what the prefix tree and the offload tier have of it. Called by `planner`, after all that
runs already has got its part of the step.
"""

from penstock.core.ports import Clock
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import EMPTY_MATCH, KvManager
from penstock.engine.kv.prefix_tree import PrefixMatch
from penstock.engine.lora.slots import AdapterSlots, Readiness
from penstock.engine.scheduler.placement import Placement
from penstock.engine.scheduler.plan import SequenceFailure
from penstock.engine.scheduler.preemption import Preemption
from penstock.engine.scheduler.prefix_wait import is_held_back
from penstock.engine.scheduler.request import GroupState, SequenceGroup
from penstock.engine.scheduler.roster import Roster
from penstock.engine.scheduler.step_draft import StepDraft


class Newcomers:
    """See the module."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        roster: Roster,
        kv: KvManager,
        clock: Clock,
        adapters: AdapterSlots | None,
        placement: Placement,
        preemption: Preemption,
    ) -> None:
        self._config = config
        self._roster = roster
        self._kv = kv
        self._clock = clock
        self._adapters = adapters
        self._placement = placement
        self._preemption = preemption

    def admit(self, draft: StepDraft) -> None:
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
                continue
            num_tokens = group.target(leader) - match.num_blocks * self._kv.block_size
            fits = self._placement.fits_step(draft, num_tokens=num_tokens)
            if not (fits and self._find_room(draft, group, match)):
                held_back.append(group)
                break
            self._start(draft, group, match)
            if draft.num_promised_blocks is not None:
                draft.num_promised_blocks += self._roster.running.num_promised(group)
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
            self._preemption.preempt(draft, victim)
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
        self._placement.place(draft, leader, num_tokens=min(gap, draft.num_tokens_left))

    def _count_start(self, draft: StepDraft, group: SequenceGroup, *, num_hit: int) -> None:
        draft.started.append(group)
        draft.counts.num_prefix_query_tokens += group.num_prompt_tokens
        draft.counts.num_prefix_hit_tokens += num_hit
        group.first_scheduled_s = self._clock.monotonic()
        group.num_cached_tokens = num_hit
        self._roster.policy.charge(group, num_prompt_tokens=group.num_prompt_tokens - num_hit)
