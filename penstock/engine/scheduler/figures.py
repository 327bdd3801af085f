"""What is told about steps and requests: plain numbers, no decisions. Called by `scheduler`."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from penstock.core.tokens import RequestReport, StepStats
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.cost import StepLoad
from penstock.engine.scheduler.plan import NO_TRAFFIC, HostTraffic
from penstock.engine.scheduler.request import GroupState, SequenceGroup


@dataclass(slots=True)
class StepCounts:
    """Counters of one step, gathered by `schedule` and `apply`."""

    host_time_s: float = 0.0
    num_seqs: int = 0
    num_tokens: int = 0
    num_kv_tokens: int = 0
    num_chunk_pairs: int = 0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0
    num_forced_tokens: int = 0
    num_prefix_query_tokens: int = 0
    num_prefix_hit_tokens: int = 0
    num_preemptions: int = 0
    num_loaded_tokens: int = 0
    """That came back from host memory before the step."""
    host_traffic: HostTraffic = NO_TRAFFIC
    num_out_of_memory: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: list[int] = field(default_factory=list)
    """At each position of a draft."""

    @property
    def load(self) -> StepLoad:
        """What the step's time depends on."""
        return StepLoad(
            self.num_tokens, self.num_seqs, self.num_kv_tokens, self.num_chunk_pairs, self.num_draft_tokens
        )

    def count_draft(self, *, num_tokens: int, num_accepted: int) -> None:
        """Add one sequence's drafts, of which the first `num_accepted` stood."""
        self.num_drafts += num_tokens > 0
        self.num_draft_tokens += num_tokens
        missing = num_accepted - len(self.num_accepted_tokens)
        self.num_accepted_tokens.extend([0] * missing)
        for place in range(num_accepted):
            self.num_accepted_tokens[place] += 1


@dataclass(slots=True, kw_only=True)
class QueueGauges:
    """Who runs and who waits."""

    num_running: int
    """Sequences."""
    num_waiting: int
    """Requests."""
    num_waiting_tokens: int
    num_adapters_running: int = 0
    num_adapters_waiting: int = 0
    host_bytes_used: int = 0
    """Of the offload tier."""


def num_unused_slots(kv: KvManager, groups: Iterable[SequenceGroup]) -> int:
    """Slots in owned blocks without a token yet; a partial block shared by forks counts once.

    Cost: O(running sequences).
    """
    num_unused = 0
    shared: dict[int, int] = {}
    for group in groups:
        for seq in group.active:
            if seq.blocks.is_forked:
                kv.add_unused_slots(shared, seq.blocks, num_computed_tokens=seq.num_computed_tokens)
            else:
                num_unused += kv.num_unused_slots(seq.blocks, num_computed_tokens=seq.num_computed_tokens)
    return num_unused + sum(shared.values())


def step_stats(
    counts: StepCounts,
    *,
    gauges: QueueGauges,
    kv: KvManager,
    running: Iterable[SequenceGroup],
    step_time_s: float,
) -> StepStats:
    """The figures of one step, after it."""
    usage = kv.usage()
    num_slots_owned = usage.num_owned * kv.block_size
    return StepStats(
        step_time_s=step_time_s,
        host_time_s=counts.host_time_s,
        num_seqs=counts.num_seqs,
        num_batched_tokens=counts.num_tokens,
        num_prompt_tokens=counts.num_prompt_tokens,
        num_generated_tokens=counts.num_generated_tokens,
        num_forced_tokens=counts.num_forced_tokens,
        num_prefix_query_tokens=counts.num_prefix_query_tokens,
        num_prefix_hit_tokens=counts.num_prefix_hit_tokens,
        num_preemptions=counts.num_preemptions,
        num_drafts=counts.num_drafts,
        num_draft_tokens=counts.num_draft_tokens,
        num_accepted_tokens=tuple(counts.num_accepted_tokens),
        num_running=gauges.num_running,
        num_waiting=gauges.num_waiting,
        num_waiting_tokens=gauges.num_waiting_tokens,
        num_adapters_running=gauges.num_adapters_running,
        num_adapters_waiting=gauges.num_adapters_waiting,
        num_out_of_memory=counts.num_out_of_memory,
        num_offload_hit_tokens=counts.num_loaded_tokens,
        offload_saved_bytes=counts.host_traffic.saved_bytes,
        offload_loaded_bytes=counts.host_traffic.loaded_bytes,
        offload_time_s=counts.host_traffic.time_s,
        offload_used_bytes=gauges.host_bytes_used,
        num_blocks=usage.num_blocks,
        num_blocks_free=usage.num_free,
        num_blocks_cached=usage.num_cached,
        num_blocks_owned=usage.num_owned,
        num_slots_owned=num_slots_owned,
        num_slots_used=num_slots_owned - num_unused_slots(kv, running),
    )


def request_report(group: SequenceGroup, *, now_s: float) -> RequestReport:
    """One line of `/admin/requests`; never the text."""
    has_blocks = group.state is not GroupState.WAITING
    return RequestReport(
        request_id=group.request.request_id,
        tenant_id=group.request.tenant_id,
        priority=int(group.request.priority),
        state=group.state.value,
        num_prompt_tokens=group.num_prompt_tokens,
        num_computed_tokens=sum(seq.num_computed_tokens for seq in group.live),
        num_generated_tokens=group.num_generated_tokens,
        num_blocks=sum(seq.blocks.num_held_blocks for seq in group.live) if has_blocks else 0,
        num_preemptions=group.num_preemptions,
        age_s=now_s - group.arrival_s,
    )
