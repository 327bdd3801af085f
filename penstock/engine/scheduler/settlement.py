"""What came of a step: tokens, endings, failures, full blocks, and what the cost model learns from it.

It moves what was in flight to computed, gives answers their tokens and ends those that are over. It plans
nothing. Called by `scheduler`, once for each plan, in order.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Final

import msgspec

from penstock.core.ids import SequenceId
from penstock.core.text import FinishReason
from penstock.core.tokens import StepStats, TokenDelta
from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.answer import GRAMMAR_ERROR, Gain, beam_deltas, take_tokens, token_delta
from penstock.engine.scheduler.beam_sequences import regroup
from penstock.engine.scheduler.computed_blocks import settle_blocks
from penstock.engine.scheduler.cost import CostModel
from penstock.engine.scheduler.draft_ledger import DraftLedger
from penstock.engine.scheduler.drafting import Drafting
from penstock.engine.scheduler.figures import StepCounts, step_stats
from penstock.engine.scheduler.memory_pressure import MAX_TRIES, MemoryPressure
from penstock.engine.scheduler.plan import (
    OUT_OF_MEMORY,
    ForcedTokens,
    SampledToken,
    ScheduledSequence,
    SequenceFailure,
    StepPlan,
    StepResult,
)
from penstock.engine.scheduler.request import Sequence, SequenceGroup
from penstock.engine.scheduler.roster import NUMERICAL_ERROR, Roster

MAX_UNNOTICED_CATCH_UP: Final = 32
"""A step in which a draft model read more than so many old tokens says nothing about what steps take."""


class StepOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What a step gave to the world."""

    deltas: list[TokenDelta]
    stats: StepStats


class Settlement:
    """See the module."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        roster: Roster,
        kv: KvManager,
        cost: CostModel,
        drafting: Drafting | None,
        pressure: MemoryPressure,
    ) -> None:
        self._config = config
        self._roster = roster
        self._kv = kv
        self._cost = cost
        self._drafting = drafting
        self._pressure = pressure

    def settle(self, plan: StepPlan, result: StepResult, counts: StepCounts) -> StepOutput:
        """Take in what a step produced.

        Args:
            plan: of the step.
            result: what the runner made of it.
            counts: of its planning; they grow.

        Returns:
            The deltas of the step (and those made since the last one), and its figures.
        """
        counts.host_traffic = result.host_traffic
        self._roster.transfers.end_moves(result.host_traffic.ended)
        failures = {failure.seq_id: failure for failure in result.failures}
        counts.num_out_of_memory = result.num_out_of_memory
        lost = self._find_lost(plan, failures)
        for entry in plan.sequences:
            self._advance(entry, counts, has_failed=entry.seq_id in failures or entry.seq_id in lost)
        if lost:
            result = self._without_lost(result, lost)
            failures = {failure.seq_id: failure for failure in result.failures}
        self._note_pressure(result, counts)
        self._roster.fail(failures.values())
        for entry in plan.sequences:
            seq = self._roster.sequences.get(entry.seq_id)
            if seq is not None:
                settle_blocks(seq, kv=self._kv, transfers=self._roster.transfers)
        self._take_prompt_outputs(plan, result)
        for seq_id, drawn in groupby(result.tokens, key=lambda sampled: sampled.seq_id):
            self._take_tokens(seq_id, drawn, counts)
        if self._drafting:
            has_drafts = any(entry.num_drafts for entry in plan.sequences)
            if has_drafts:
                self._settle_drafts(self._drafting, plan, result, counts)
            _account(self._drafting.ledger, counts, step_time_s=result.step_time_s, has_drafts=has_drafts)
        self._roster.free_closed()
        is_usual = not failures and not lost and result.num_caught_up_tokens <= MAX_UNNOTICED_CATCH_UP
        if counts.num_seqs and is_usual:
            self._cost.observe(counts.load, step_time_s=result.step_time_s)
        return StepOutput(deltas=self._roster.take_deltas(), stats=self._stats(counts, result.step_time_s))

    def void_draws(self, plan: StepPlan) -> frozenset[SequenceId]:
        """Sequences for which a step under way is to draw nothing, by all that has been applied since.

        Their answer has ended, or has gained the token already: its grammar forced it.
        """
        sequences = self._roster.sequences
        return frozenset(
            spec.seq_id
            for entry in plan.sequences
            for spec in entry.samples
            if (seq := sequences.get(spec.seq_id)) is None
            or seq.finish_reason is not None
            or seq.num_outputs != spec.output_idx
            or sequences[entry.seq_id].is_retrying
        )

    def output_of_no_step(self) -> StepOutput:
        """What there is to tell when no step has ended."""
        return StepOutput(deltas=self._roster.take_deltas(), stats=self._stats(StepCounts(), 0.0))

    # -- not enough memory ---------------------------------------------------------------------------------

    def _find_lost(
        self, plan: StepPlan, failures: Mapping[SequenceId, SequenceFailure]
    ) -> dict[SequenceId, ScheduledSequence]:
        """What the step did not compute for want of memory, or computed behind such a gap."""
        sequences = self._roster.sequences
        return {
            entry.seq_id: entry
            for entry in plan.sequences
            if (
                (seq := sequences[entry.seq_id]).num_computed_tokens != entry.start
                or (failures and _is_short_of_memory(entry, failures))
            )
            and seq.finish_reason is None
        }

    def _without_lost(self, result: StepResult, lost: Mapping[SequenceId, ScheduledSequence]) -> StepResult:
        """Let what was lost be planned again; returns the outcome without what was drawn behind a gap.

        NaN is told even of that: it lies in the sequence's blocks.
        """
        void: set[SequenceId] = set()
        given_up: list[SequenceFailure] = []
        for entry in lost.values():
            seq = self._roster.sequences[entry.seq_id]
            seq.is_retrying = seq.num_inflight_tokens > 0
            if not seq.is_retrying:
                self._kv.free_tail(seq.blocks, num_tokens=seq.num_computed_tokens)
            owners = {entry.seq_id, *(spec.seq_id for spec in entry.samples)}
            for seq_id in owners & self._roster.sequences.keys():
                drawn = self._roster.sequences[seq_id]
                drawn.num_draws = drawn.num_outputs
            if entry.start != seq.num_computed_tokens:
                void |= owners
            elif self._is_given_up(entry, seq):
                given_up.append(_too_large(entry))
        return msgspec.structs.replace(
            result,
            tokens=[each for each in result.tokens if each.seq_id not in void],
            failures=given_up
            + [
                each
                for each in result.failures
                if each.code == NUMERICAL_ERROR or (each.seq_id not in void and each.code != OUT_OF_MEMORY)
            ],
            prompt_logprobs=[each for each in result.prompt_logprobs if each.seq_id not in void],
            pooled=[each for each in result.pooled if each.seq_id not in void],
        )

    def _is_given_up(self, entry: ScheduledSequence, seq: Sequence) -> bool:
        """True if there is no smaller step in which it could be computed."""
        is_least = len(entry.token_ids) <= self._kv.block_size or not self._config.enable_chunked_prefill
        seq.num_memory_failures += is_least
        return seq.num_memory_failures >= MAX_TRIES

    def _note_pressure(self, result: StepResult, counts: StepCounts) -> None:
        if result.num_out_of_memory:
            self._pressure.note_failure(num_tokens=counts.num_tokens)
        elif counts.num_seqs and self._pressure.is_high:
            self._pressure.note_success()

    def _advance(self, entry: ScheduledSequence, counts: StepCounts, *, has_failed: bool) -> None:
        """Move what the step computed of one sequence from in flight to computed."""
        seq = self._roster.sequences[entry.seq_id]
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
            seq.num_memory_failures = 0

    def _take_prompt_outputs(self, plan: StepPlan, result: StepResult) -> None:
        """Collect what was asked of prompts, and end the requests that asked for nothing else."""
        for part in result.prompt_logprobs:
            seq = self._roster.sequences.get(part.seq_id)
            told = None if seq is None else seq.group.prompt_logprobs
            if told is not None:
                del told[part.start - 1 :]  # of a computation before a preemption
                told.extend(part.logprobs)
        pooled = {each.seq_id: each.values for each in result.pooled}
        for entry in plan.sequences:
            seq = None if entry.samples else self._roster.sequences.get(entry.seq_id)
            if seq is None or seq.finish_reason is not None or not seq.group.ends_with_prompt:
                continue
            if seq.num_computed_tokens == seq.num_prompt_tokens:
                self._end_with_prompt(seq.group, pooled=pooled.get(seq.seq_id))

    def _end_with_prompt(self, group: SequenceGroup, *, pooled: tuple[float, ...] | None) -> None:
        assert (pooled is None) == (group.request.pooling is None), "the runner pools what it is asked to"
        reason = FinishReason.LENGTH if pooled is None else FinishReason.STOP
        told = group.take_prompt_logprobs()
        self._roster.close(group, reason, pooled=pooled, prompt_logprobs=told)

    def _take_tokens(self, seq_id: SequenceId, drawn: Iterable[SampledToken], counts: StepCounts) -> None:
        """Append what was drawn for an answer, and what its grammar forces after it; end it if it is over."""
        seq = self._roster.sequences.get(seq_id)
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
            self._roster.fail([SequenceFailure(seq_id, GRAMMAR_ERROR, gain.failure)])
            return
        self._count_gain(seq, gain, counts)
        is_last = gain.ending.finish_reason is not None and len(group.live) == 1
        stats = self._roster.stats(group) if is_last or is_first else None
        self._roster.tell(
            token_delta(
                seq,
                gain,
                stats=stats if is_last else None,
                stats_so_far=stats if is_first else None,
                prompt_logprobs=group.take_prompt_logprobs() if seq.index == 0 else None,
            )
        )
        if gain.ending.finish_reason is not None:
            self._roster.end_answer(seq, gain.ending.finish_reason)

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
        self._roster.policy.charge(group, num_output_tokens=len(beams))
        for left_over in regroup(group, beams, kv=self._kv):
            self._roster.give_up(left_over)

    def _end_search(self, group: SequenceGroup) -> None:
        assert group.beams is not None
        best = group.beams.finished[: group.request.params.n]
        group.num_generated_tokens = sum(len(answer.token_ids) for answer in best)
        for delta in beam_deltas(group, stats=self._roster.stats(group)):
            self._roster.tell(delta)
        self._roster.end(group, FinishReason.STOP)

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
            seq = self._roster.sequences.get(entry.seq_id)
            if seq is None or seq.finish_reason is not None:
                continue
            drafting.learn(seq.seq_id, num_drafts=num_drafts, num_right=num_right)
            settle_blocks(seq, kv=self._kv, transfers=self._roster.transfers)
            self._kv.free_tail(seq.blocks, num_tokens=seq.num_computed_tokens)

    def _count_gain(self, seq: Sequence, gain: Gain, counts: StepCounts) -> None:
        num_tokens = len(gain.token_ids)
        counts.num_generated_tokens += num_tokens
        counts.num_forced_tokens += gain.num_forced
        if gain.num_forced:
            self._roster.note_forced(ForcedTokens(seq.seq_id, tuple(gain.token_ids[-gain.num_forced :])))
        if num_tokens:
            seq.group.num_generated_tokens += num_tokens
            self._roster.policy.charge(seq.group, num_output_tokens=num_tokens)

    def _stats(self, counts: StepCounts, step_time_s: float) -> StepStats:
        return step_stats(
            counts,
            gauges=self._roster.gauges(),
            kv=self._kv,
            running=self._roster.running,
            step_time_s=step_time_s,
        )


def _account(ledger: DraftLedger, counts: StepCounts, *, step_time_s: float, has_drafts: bool) -> None:
    """Tell the ledger of a step of decodes alone; one with a prompt's chunk says nothing about drafts."""
    num_seqs = counts.num_seqs
    if not num_seqs or counts.num_chunk_pairs or counts.num_tokens != num_seqs:
        return
    if has_drafts:
        num_drawn = counts.num_generated_tokens - counts.num_forced_tokens
        ledger.note_drafted(num_seqs=num_seqs, num_tokens=num_drawn, step_time_s=step_time_s)
    else:
        ledger.note_plain(num_seqs=num_seqs, step_time_s=step_time_s)


def _is_short_of_memory(entry: ScheduledSequence, failures: Mapping[SequenceId, SequenceFailure]) -> bool:
    owners = (entry.seq_id, *(spec.seq_id for spec in entry.samples))
    return any(seq_id in failures and failures[seq_id].code == OUT_OF_MEMORY for seq_id in owners)


def _too_large(entry: ScheduledSequence) -> SequenceFailure:
    return SequenceFailure(
        entry.seq_id,
        OUT_OF_MEMORY,
        f"not enough memory to compute {len(entry.token_ids)} tokens behind {entry.start} others, though "
        "no other request was computed with them",
    )
