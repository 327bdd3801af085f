"""Tokens of a running sequence put into the step: with slots for them, and with the draws behind them.

It makes room by preemption where there is no block. Called by `planner` and `newcomers`.
"""

from penstock.engine.config import SchedulerConfig
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.scheduler.plan import SampleSpec
from penstock.engine.scheduler.preemption import Preemption
from penstock.engine.scheduler.prefix_wait import next_place
from penstock.engine.scheduler.request import Sequence, SequenceGroup
from penstock.engine.scheduler.step_draft import StepDraft


class Placement:
    """See the module."""

    def __init__(self, config: SchedulerConfig, *, kv: KvManager, preemption: Preemption) -> None:
        self._config = config
        self._kv = kv
        self._preemption = preemption

    def fits_step(self, draft: StepDraft, *, num_tokens: int) -> bool:
        """True if the step has room for the rest of a prompt, or may compute a part of it.

        Without chunked prefill it waits for a step with enough room: running answers end, and the budget is
        at least `max_model_len`.
        """
        return self._config.enable_chunked_prefill or num_tokens <= draft.num_tokens_left

    def place(self, draft: StepDraft, seq: Sequence, *, num_tokens: int) -> int:
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
        """Allocate blocks for as many of `num_tokens` as `place` says; returns for how many."""
        kv, blocks = self._kv, seq.blocks
        kv.free_behind_window(blocks, num_computed_tokens=seq.num_computed_tokens)
        num_fit = kv.num_tokens_allocatable(blocks, start=start, num_tokens=num_tokens)
        num_least = 1 if self._config.enable_chunked_prefill else num_tokens
        while num_fit < num_least:
            if not self._preemption.make_room(draft, seq.group):
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
