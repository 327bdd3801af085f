"""The requests that run: their seats, who is protected among them, and whether one more has room.

It counts and answers; the scheduler decides who starts and who is preempted. Called by `scheduler`.
"""

from collections.abc import Iterator

from penstock.core.ids import RequestId
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.kv.prefix_tree import PrefixMatch
from penstock.engine.lora.slots import NO_SLOT, AdapterSlots
from penstock.engine.scheduler.request import GroupState, SequenceGroup
from penstock.engine.scheduler.step_draft import StepDraft


class RunningSet:
    """Groups that hold seats, loads included, in the order in which they started."""

    def __init__(
        self, config: SchedulerConfig, *, kv: KvManager, adapters: AdapterSlots | None = None
    ) -> None:
        self._config = config
        self._kv = kv
        self._adapters = adapters
        self._groups: dict[RequestId, SequenceGroup] = {}
        self._num_reserved_blocks = 0
        self.num_seqs = 0
        """Seats taken."""

    def __len__(self) -> int:
        return len(self._groups)

    def __iter__(self) -> Iterator[SequenceGroup]:
        return iter(self._groups.values())

    def join(self, group: SequenceGroup) -> None:
        """Give `group` its seats, its adapter's slot, and its reservation if it is protected."""
        self._groups[group.request.request_id] = group
        self.num_seqs += len(group.live)
        if self._adapters is not None and group.request.adapter_revision:
            group.adapter_slot = self._adapters.take(group.request.adapter_revision)
        if self.is_protected(group):
            group.reserved_blocks = group.num_blocks_max
            self._num_reserved_blocks += group.reserved_blocks

    def leave(self, group: SequenceGroup) -> None:
        """Take back what `join` gave, for the answers that still live."""
        del self._groups[group.request.request_id]
        self.num_seqs -= len(group.live)
        self._num_reserved_blocks -= group.reserved_blocks
        group.reserved_blocks = 0
        if self._adapters is not None and group.adapter_slot != NO_SLOT:
            self._adapters.leave(group.request.adapter_revision)
            group.adapter_slot = NO_SLOT

    # -- protection from preemption ------------------------------------------------------------------------

    def is_protected(self, group: SequenceGroup) -> bool:
        """True if it has been preempted as often as may be."""
        return group.num_preemptions >= self._config.max_preemptions

    def worst(self, *, even_busy: bool = False) -> SequenceGroup | None:
        """Lowest tier, then newest, of those that may be preempted: not protected, not in flight.

        Args:
            even_busy: also of those in flight, as if the steps under way were applied.
        """
        worst: SequenceGroup | None = None
        for group in self:
            is_worse = worst is None or (group.tier, group.arrival_idx) > (worst.tier, worst.arrival_idx)
            if is_worse and self._is_preemptible(group, even_busy=even_busy):
                worst = group
        return worst

    def _is_preemptible(self, group: SequenceGroup, *, even_busy: bool) -> bool:
        is_running = group.state is GroupState.RUNNING
        return is_running and (even_busy or not group.is_busy) and not self.is_protected(group)

    # -- room for one more ---------------------------------------------------------------------------------

    def can_reserve(self, group: SequenceGroup) -> bool:
        """A protected group starts only if all protected ones together fit the pool at their largest."""
        num_reserved = self._num_reserved_blocks + group.num_blocks_max
        return not self.is_protected(group) or num_reserved <= self._kv.pool.num_blocks

    def could_get_seats(self, group: SequenceGroup, *, even_busy: bool = False) -> bool:
        """True if preempting lower tiers can give `group` its seats: else it would hurt and not help."""
        num_others = sum(
            len(other.live)
            for other in self
            if other.tier <= group.tier or not self._is_preemptible(other, even_busy=even_busy)
        )
        return num_others + len(group.live) <= self._config.max_num_seqs

    def has_room(self, draft: StepDraft, group: SequenceGroup, match: PrefixMatch) -> bool:
        """True if there are seats for `group`, and blocks beside those that running ones will take."""
        if self.num_seqs + len(group.live) > self._config.max_num_seqs:
            return False
        num_known = max(seq.num_tokens for seq in group.live)
        num_needed = self._kv.num_blocks_needed(
            num_known, num_shared_tokens=group.num_prompt_tokens, n=len(group.live)
        )
        if draft.num_promised_blocks is None:
            draft.num_promised_blocks = sum(map(self.num_promised, self))
        num_spare = self._kv.num_available - draft.num_promised_blocks
        return num_needed <= num_spare or self._kv.num_missing(match, num_needed=num_needed) <= num_spare

    def num_promised(self, group: SequenceGroup) -> int:
        """Blocks that a running group will take for tokens known or being drawn, and for one more each."""
        return sum(
            self._kv.num_unallocated(seq.blocks, num_tokens=seq.num_tokens + seq.num_pending_tokens + 1)
            for seq in group.active
        )
