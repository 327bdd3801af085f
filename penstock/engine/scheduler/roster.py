"""Who is in the engine: requests and their sequences, from arrival to the last delta, and how they leave.

It knows who waits, who runs and who has ended but is still in a step; it holds the deltas on their way out
and what the runner must hear with the next plan. It plans nothing and reads no result: `planner` and
`settlement` do, and tell it who starts, who goes back and who has ended.
"""

from collections.abc import Iterable
from typing import Final

from penstock.core.ids import RequestId, SequenceId
from penstock.core.ports import Clock, KvConnector
from penstock.core.text import FinishReason, TokenLogprobs
from penstock.core.tokens import RequestStats, TokenDelta
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.lora.slots import AdapterSlots
from penstock.engine.scheduler.answer import NO_TOKEN_ALLOWED, closing_delta, failure_delta
from penstock.engine.scheduler.computed_blocks import settle_blocks
from penstock.engine.scheduler.constraint import Constraint
from penstock.engine.scheduler.drafting import Drafting
from penstock.engine.scheduler.figures import QueueGauges
from penstock.engine.scheduler.plan import ForcedTokens, SequenceFailure
from penstock.engine.scheduler.policy import make_policy
from penstock.engine.scheduler.request import GroupState, Sequence, SequenceGroup
from penstock.engine.scheduler.running_set import RunningSet
from penstock.engine.scheduler.transfers import KvTransfers

MEAN_WEIGHT: Final = 0.05
"""Of the newest answer in the running mean of answer lengths."""
NUMERICAL_ERROR: Final = "numerical_error"
"""`SequenceFailure.code` of NaN logits: the only one after which the KV itself is bad."""


class Roster:
    """See the module. Every request that is added ends in exactly one terminal delta."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        kv: KvManager,
        clock: Clock,
        connector: KvConnector | None,
        adapters: AdapterSlots | None,
        drafting: Drafting | None,
    ) -> None:
        self._kv = kv
        self._clock = clock
        self._adapters = adapters
        self._drafting = drafting
        self.policy = make_policy(config.policy)
        """Holds those that wait."""
        self.running = RunningSet(config, kv=kv, adapters=adapters)
        self.transfers = KvTransfers(connector, kv=kv)
        self.sequences: dict[SequenceId, Sequence] = {}
        """Of all groups, those that have ended and are in a step included."""
        self.constraints: dict[SequenceId, Constraint] = {}
        """Of the answers that have not ended, for the masks of a step."""
        self.num_waiting_tokens = 0
        """Of the prompts that wait."""
        self.num_outputs_mean = 0.0
        """Running mean of answer lengths."""
        self.must_recheck_paths = False
        """Blocks that were computed with NaN have left the tree; others may have shared them."""
        self._groups: dict[RequestId, SequenceGroup] = {}
        self._closing: list[SequenceGroup] = []
        self.leaving: list[Sequence] = []
        """Answers that have ended while a step computes for them, and whose group goes on."""
        self._deltas: list[TokenDelta] = []
        self._finished_seq_ids: list[SequenceId] = []
        self._forced_tokens: list[ForcedTokens] = []

    # -- who is there --------------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """True while any request has not ended, a delta has not been taken, or blocks are being copied."""
        return bool(self._groups or self._closing or self._deltas or self.transfers.are_under_way)

    @property
    def is_quiet(self) -> bool:
        """True if no request holds blocks and nothing is being copied."""
        return not len(self.running) and not self._closing and not self.transfers.are_under_way

    @property
    def num_waiting(self) -> int:
        """Requests that are not running."""
        return len(self._groups) - len(self.running)

    @property
    def open_groups(self) -> list[SequenceGroup]:
        """Requests that have not ended, oldest first."""
        return list(self._groups.values())

    @property
    def groups(self) -> list[SequenceGroup]:
        """All that hold or may hold blocks; not to be changed."""
        return [*self._groups.values(), *self._closing]

    def find(self, request_id: RequestId) -> SequenceGroup | None:
        """The request of that id, or None if it is not there or has ended."""
        return self._groups.get(request_id)

    def gauges(self) -> QueueGauges:
        """Who runs and who waits, in numbers."""
        adapters = self._adapters
        return QueueGauges(
            num_running=len(self.running),
            num_waiting=self.num_waiting,
            num_waiting_tokens=self.num_waiting_tokens,
            num_adapters_running=0 if adapters is None else adapters.num_used,
            num_adapters_waiting=0 if adapters is None else adapters.num_waiting,
            host_bytes_used=self.transfers.host_bytes_used,
        )

    # -- what is told --------------------------------------------------------------------------------------

    def tell(self, delta: TokenDelta) -> None:
        """Put a delta on its way out."""
        self._deltas.append(delta)

    def take_deltas(self) -> list[TokenDelta]:
        """What is to go out; clears the list."""
        deltas, self._deltas = self._deltas, []
        return deltas

    def note_forced(self, forced: ForcedTokens) -> None:
        """The runner must count tokens that it did not draw."""
        self._forced_tokens.append(forced)

    def take_forced_tokens(self) -> list[ForcedTokens]:
        """For the next plan; clears the list."""
        forced, self._forced_tokens = self._forced_tokens, []
        return forced

    def take_finished_seq_ids(self) -> list[SequenceId]:
        """Sequences that the runner may forget, for the next plan; clears the list."""
        finished, self._finished_seq_ids = self._finished_seq_ids, []
        return finished

    # -- coming, starting, going back ----------------------------------------------------------------------

    def add(self, group: SequenceGroup) -> None:
        """A new group; it waits."""
        request = group.request
        self._groups[request.request_id] = group
        for seq in group.sequences:
            self.sequences[seq.seq_id] = seq
            if seq.constraint is not None:
                self.constraints[seq.seq_id] = seq.constraint
        self.num_waiting_tokens += group.num_prompt_tokens
        self.policy.add(group)
        if self._adapters is not None and request.adapter_revision:
            self._adapters.enter(request.adapter_revision)

    def start(self, group: SequenceGroup) -> None:
        """A group that the policy gave out takes its seats."""
        for seq in group.live:
            seq.own_tokens()
        self.running.join(group)
        self.num_waiting_tokens -= group.num_prompt_tokens

    def requeue(self, group: SequenceGroup, *, taint: bool) -> None:
        """Free all that a running group holds and let it wait at its old place; it is recomputed later."""
        for seq in group.live:
            if taint:
                self.transfers.forget(seq)
            self._kv.free(seq.blocks, taint=taint)
            seq.restart()
        group.is_forked = False
        if group.beams is not None:
            group.beams.forget_offers()
        self.running.leave(group)
        group.move_to(GroupState.WAITING)
        self.num_waiting_tokens += group.num_prompt_tokens
        self.policy.push(group)

    # -- endings -------------------------------------------------------------------------------------------

    def stats(self, group: SequenceGroup) -> RequestStats:
        """What is told with the last delta of a request, as of now."""
        return group.stats(now_s=self._clock.monotonic())

    def close(
        self,
        group: SequenceGroup,
        reason: FinishReason,
        *,
        pooled: tuple[float, ...] | None = None,
        prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None,
    ) -> None:
        """End a request whose open answers gain no further token.

        Args:
            group: it has not ended.
            reason: of all its open answers.
            pooled: told with each of them.
            prompt_logprobs: told with the first of them.
        """
        first, *_ = indices = group.open_answers
        for index in indices:
            self.tell(
                closing_delta(
                    group,
                    reason,
                    index=index,
                    stats=self.stats(group) if index == indices[-1] else None,
                    prompt_logprobs=prompt_logprobs if index == first else None,
                    pooled=pooled,
                )
            )
        self.end(group, reason)

    def fail(self, failures: Iterable[SequenceFailure]) -> None:
        """End the requests of sequences that cannot go on, each as a whole, with one delta."""
        for failure in failures:
            seq = self.sequences.get(failure.seq_id)
            if seq is None:
                continue
            group = seq.group
            # Also of a request that has ended meanwhile: its blocks are yet to be freed.
            group.is_tainted |= failure.code == NUMERICAL_ERROR
            if seq.finish_reason is not None or self._ends_whole(seq, failure):
                continue
            # a beam is not an answer: a search with fewer answers than beams has no such index
            index = seq.index if group.beams is None else 0
            self.tell(failure_delta(group, failure, index=index))
            self.end(group, FinishReason.ERROR)

    def _ends_whole(self, seq: Sequence, failure: SequenceFailure) -> bool:
        """End an answer that its grammar lets end where `min_tokens` or a ban leaves nothing else to draw."""
        if failure.code != NO_TOKEN_ALLOWED or seq.constraint is None or not seq.constraint.may_end:
            return False
        stats = self.stats(seq.group) if len(seq.group.live) == 1 else None
        self.tell(closing_delta(seq.group, FinishReason.STOP, index=seq.index, stats=stats))
        self.end_answer(seq, FinishReason.STOP)
        return True

    def end_answer(self, seq: Sequence, reason: FinishReason) -> None:
        """One answer is over, its delta told; the request with it if it was the last."""
        group = seq.group
        settle_blocks(seq, kv=self._kv, transfers=self.transfers)
        self.num_outputs_mean += MEAN_WEIGHT * (seq.num_outputs - self.num_outputs_mean)
        if len(group.live) == 1:
            self.end(group, reason)
            return
        seq.finish_reason = reason
        group.live.remove(seq)
        self.give_up(seq)

    def end(self, group: SequenceGroup, reason: FinishReason) -> None:
        """The request is over, its deltas told: free all now, or once the step or load under way is done."""
        for seq in group.live:
            seq.finish_reason = reason
        if group.state is GroupState.WAITING:
            self.policy.remove(group)
            self.num_waiting_tokens -= group.num_prompt_tokens
        else:
            self.running.leave(group)
        if self._adapters is not None and group.request.adapter_revision:
            self._adapters.exit(group.request.adapter_revision)
        group.move_to(GroupState.FINISHED)
        del self._groups[group.request.request_id]
        self.policy.end(group)
        self._closing.append(group)
        self.free_closed()

    def free_closed(self) -> None:
        """Free what requests and answers hold that have ended and are in no step or load any more."""
        if self.leaving:
            over = [seq for seq in self.leaving if not seq.num_inflight_tokens]
            self.leaving = [seq for seq in self.leaving if seq.num_inflight_tokens]
            for seq in over:
                self._forget(seq)
        if not self._closing:
            return
        ended = [group for group in self._closing if not group.is_busy]
        self._closing = [group for group in self._closing if group.is_busy]
        for group in ended:
            for seq in group.live:
                self._forget(seq)
            group.live.clear()
            self.must_recheck_paths |= group.is_tainted

    def give_up(self, seq: Sequence) -> None:
        """Free the seat of a sequence that its group, which goes on, does not have any more.

        All else is freed too, once no step computes for it.
        """
        self.running.num_seqs -= 1
        if seq.num_inflight_tokens:
            self.leaving.append(seq)
        else:
            self._forget(seq)

    def _forget(self, seq: Sequence) -> None:
        if seq.group.is_tainted:
            self.transfers.forget(seq)
        self._kv.free(seq.blocks, taint=seq.group.is_tainted)
        del self.sequences[seq.seq_id]
        self.constraints.pop(seq.seq_id, None)
        if self._drafting:
            self._drafting.forget(seq.seq_id)
        if seq.is_known_to_runner:
            self._finished_seq_ids.append(seq.seq_id)
