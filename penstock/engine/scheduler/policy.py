"""The order in which waiting requests are admitted: fcfs, priority, or fair among tenants.

A policy holds the waiting groups and says who is next; it decides neither whether there is room nor what a
step computes. Called by `scheduler`. All operations are O(log n) amortised but `remove`, which is O(n).
"""

import heapq
from typing import Final, Literal, Protocol

from penstock.core.ids import TenantId
from penstock.engine.scheduler.request import SequenceGroup

PROMPT_WEIGHT: Final = 1.0
OUTPUT_WEIGHT: Final = 2.0
"""An output token costs a whole pass of its own; a prompt token shares one. As in the VTC paper."""
MAX_IDLE_TENANTS: Final = 4096
MAX_STALE_ENTRIES: Final = 64


class ArrivalQueue:
    """Groups by order of arrival; a group put back after a preemption regains its old place."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, SequenceGroup]] = []
        self._members: set[int] = set()

    def push(self, group: SequenceGroup) -> None:
        """Add a group that is not in the queue."""
        assert group.arrival_idx not in self._members, "the group waits already"
        self._members.add(group.arrival_idx)
        heapq.heappush(self._heap, (group.arrival_idx, group))

    def peek(self) -> SequenceGroup | None:
        """The oldest group, or None."""
        return self._heap[0][1] if self._heap else None

    def pop(self) -> SequenceGroup | None:
        """Take the oldest group out, or None."""
        group = self.peek()
        if group is not None:
            heapq.heappop(self._heap)
            self._members.discard(group.arrival_idx)
        return group

    def remove(self, group: SequenceGroup) -> None:
        """Take a group out, wherever it stands; no-op if it is not there. O(length)."""
        if group.arrival_idx not in self._members:
            return
        self._members.discard(group.arrival_idx)
        self._heap = [entry for entry in self._heap if entry[0] in self._members]
        heapq.heapify(self._heap)


class Policy(Protocol):
    """What the scheduler asks of an order."""

    def tier_of(self, priority: int) -> int:
        """The tier that counts for this policy; lower is served first."""
        ...

    def add(self, group: SequenceGroup) -> None:
        """A new request arrived; it waits from now on."""
        ...

    def push(self, group: SequenceGroup) -> None:
        """A known request waits again."""
        ...

    def pop(self) -> SequenceGroup | None:
        """Take out the request that is next, or None."""
        ...

    def remove(self, group: SequenceGroup) -> None:
        """A waiting request was aborted."""
        ...

    def charge(self, group: SequenceGroup, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """The request received this much service."""
        ...

    def end(self, group: SequenceGroup) -> None:
        """The request is over."""
        ...


class FcfsPolicy:
    """First come, first served; tiers are ignored."""

    def __init__(self) -> None:
        self._queue = ArrivalQueue()

    def tier_of(self, priority: int) -> int:
        """All requests are in one tier."""
        del priority
        return 0

    def add(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        self._queue.push(group)

    push = add

    def pop(self) -> SequenceGroup | None:
        """See `Policy`."""
        return self._queue.pop()

    def remove(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        self._queue.remove(group)

    def charge(self, group: SequenceGroup, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Service received does not matter here."""

    def end(self, group: SequenceGroup) -> None:
        """Nothing is kept about a request."""


class PriorityPolicy:
    """Tier, then arrival."""

    def __init__(self) -> None:
        self._queues: dict[int, ArrivalQueue] = {}

    def tier_of(self, priority: int) -> int:
        """The request's own tier."""
        return priority

    def add(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        self._queues.setdefault(group.tier, ArrivalQueue()).push(group)

    push = add

    def pop(self) -> SequenceGroup | None:
        """See `Policy`."""
        for tier in sorted(self._queues):
            group = self._queues[tier].pop()
            if group is not None:
                return group
        return None

    def remove(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        self._queues[group.tier].remove(group)

    def charge(self, group: SequenceGroup, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """Service received does not matter here."""

    def end(self, group: SequenceGroup) -> None:
        """Nothing is kept about a request."""


class FairPolicy:
    """Tier, then least service received among tenants, then arrival.

    Each tenant has a virtual counter of the tokens it was served, weighted. A tenant that comes back after
    being idle is lifted to the least counter of the active ones, so that it neither is punished for the past
    of others nor saves up credit.

    Bound: while two tenants of one tier both have requests waiting, their counters differ by at most
    `PROMPT_WEIGHT * longest prompt + OUTPUT_WEIGHT * (tokens that all running sequences may still produce)`,
    doubled.

    **Source:** Sheng et al., "Fairness in serving large language models", OSDI 2024, section 4 (VTC).
    """

    def __init__(self) -> None:
        self._queues: dict[tuple[int, TenantId], ArrivalQueue] = {}
        self._served: dict[TenantId, float] = {}
        self._num_requests: dict[TenantId, int] = {}
        # One valid entry for each queue that is not empty: (tier, served, arrival of head, version, tenant).
        self._order: list[tuple[int, float, int, int, TenantId]] = []
        self._versions: dict[tuple[int, TenantId], int] = {}
        self._last_version = 0
        self._level_at_rest = 0.0
        """Counter of the last tenant that became idle: where a newcomer starts if nobody is active."""

    def tier_of(self, priority: int) -> int:
        """The request's own tier."""
        return priority

    def served(self, tenant_id: TenantId) -> float:
        """Weighted tokens on the tenant's counter."""
        return self._served.get(tenant_id, 0.0)

    def add(self, group: SequenceGroup) -> None:
        """See `Policy`; lifts the counter of a tenant that was idle."""
        tenant_id = group.request.tenant_id
        if tenant_id not in self._num_requests:
            self._lift(tenant_id)
        self._num_requests[tenant_id] = self._num_requests.get(tenant_id, 0) + 1
        self.push(group)

    def _lift(self, tenant_id: TenantId) -> None:
        least = min((self._served[tenant] for tenant in self._num_requests), default=self._level_at_rest)
        self._served[tenant_id] = max(self._served.pop(tenant_id, 0.0), least)

    def push(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        key = (group.tier, group.request.tenant_id)
        self._queues.setdefault(key, ArrivalQueue()).push(group)
        self._renew_entry(key)

    def _renew_entry(self, key: tuple[int, TenantId]) -> None:
        head = self._queues[key].peek()
        if head is None:
            del self._queues[key]
            self._versions.pop(key, None)
            return
        self._last_version += 1
        self._versions[key] = self._last_version
        tier, tenant_id = key
        entry = (tier, self._served[tenant_id], head.arrival_idx, self._last_version, tenant_id)
        heapq.heappush(self._order, entry)
        if len(self._order) > 2 * len(self._queues) + MAX_STALE_ENTRIES:
            self._drop_stale_entries()

    def _drop_stale_entries(self) -> None:
        # Entries of a low tier never come to the top while a higher one has work.
        self._order = [entry for entry in self._order if self._versions.get((entry[0], entry[4])) == entry[3]]
        heapq.heapify(self._order)

    @property
    def num_entries(self) -> int:
        """Entries in the order, stale ones included; for checkers."""
        return len(self._order)

    def pop(self) -> SequenceGroup | None:
        """See `Policy`."""
        while self._order:
            tier, served, _, version, tenant_id = heapq.heappop(self._order)
            key = (tier, tenant_id)
            if self._versions.get(key) != version:
                continue
            if served < self._served[tenant_id]:
                self._renew_entry(key)
                continue
            group = self._queues[key].pop()
            self._renew_entry(key)
            return group
        return None

    def remove(self, group: SequenceGroup) -> None:
        """See `Policy`."""
        key = (group.tier, group.request.tenant_id)
        if key in self._queues:
            self._queues[key].remove(group)
            self._renew_entry(key)

    def charge(self, group: SequenceGroup, *, num_prompt_tokens: int = 0, num_output_tokens: int = 0) -> None:
        """See `Policy`."""
        cost = PROMPT_WEIGHT * num_prompt_tokens + OUTPUT_WEIGHT * num_output_tokens
        self._served[group.request.tenant_id] += cost

    def end(self, group: SequenceGroup) -> None:
        """See `Policy`; the counters of idle tenants are kept for the last `MAX_IDLE_TENANTS`."""
        tenant_id = group.request.tenant_id
        self._num_requests[tenant_id] -= 1
        if self._num_requests[tenant_id]:
            return
        del self._num_requests[tenant_id]
        self._level_at_rest = self._served.pop(tenant_id)
        self._served[tenant_id] = self._level_at_rest
        if len(self._served) - len(self._num_requests) > MAX_IDLE_TENANTS:
            oldest = next(tenant for tenant in self._served if tenant not in self._num_requests)
            del self._served[oldest]


def make_policy(name: Literal["fcfs", "priority", "fair"]) -> Policy:
    """The policy object for a name of `SchedulerConfig.policy`."""
    policies: dict[str, type[FcfsPolicy | PriorityPolicy | FairPolicy]] = {
        "fcfs": FcfsPolicy,
        "priority": PriorityPolicy,
        "fair": FairPolicy,
    }
    return policies[name]()
