"""A step while it is being planned: what is in it, and what is left of its budget.

Made anew for each `schedule()`; becomes a `StepPlan`. It decides nothing.
"""

from dataclasses import dataclass, field

from msgspec.structs import replace

from penstock.core.ids import SequenceId
from penstock.core.params import SamplingParams
from penstock.core.tokens import Pooling
from penstock.engine.kv.prefix_tree import Namespace, TreeNode
from penstock.engine.scheduler.figures import StepCounts
from penstock.engine.scheduler.plan import PENDING_TOKEN, NewSequence, SampleSpec, ScheduledSequence
from penstock.engine.scheduler.request import Sequence, SequenceGroup

PrefixPlace = tuple[Namespace | TreeNode, bytes]
"""A block by where it will be in the prefix tree: its parent (the namespace for a first block) and edge."""


@dataclass(slots=True, kw_only=True)
class StepDraft:
    """See the module."""

    num_tokens_left: int
    """Token budget not yet handed out."""
    is_ahead: bool = False
    """Planned before the step under way is applied, and may go on with tokens that it draws."""
    needs_result: bool = False
    """The step must be applied before the next one is planned."""
    scheduled: dict[SequenceId, ScheduledSequence] = field(default_factory=dict)
    num_kv_tokens: int = 0
    """Sum of context lengths after the step, drafts not counted."""
    num_draft_tokens: int = 0
    decodes: set[SequenceId] = field(default_factory=set)
    """Those of `scheduled` that compute their one next token."""
    num_promised_blocks: int | None = None
    """Blocks that running groups will still take; None if not known."""
    counts: StepCounts = field(default_factory=StepCounts)
    started: list[SequenceGroup] = field(default_factory=list)
    """Groups that run for the first time."""
    owes_slot: bool = False
    """A group waits for an adapter's slot: those behind it must not keep the slots in use."""
    being_computed: dict[PrefixPlace, dict[SequenceId, int]] = field(default_factory=dict)
    """The blocks that sequences in this step fill next: who fills them, and in which tier each is."""

    def add(self, seq: Sequence, *, num_tokens: int, samples: tuple[SampleSpec, ...]) -> None:
        """Put the next `num_tokens` of `seq` into the step."""
        start = seq.next_position
        is_pending = start == seq.num_tokens
        token_ids = [PENDING_TOKEN] if is_pending else seq.token_ids[start : start + num_tokens]
        entry = ScheduledSequence(
            seq.seq_id, token_ids, start, seq.blocks.tables, samples, 0, seq.group.adapter_slot
        )
        if start < seq.num_prompt_tokens:
            entry = _with_prompt_outputs(entry, seq, end=start + num_tokens)
        self.scheduled[seq.seq_id] = entry
        self.num_tokens_left -= num_tokens
        self.num_kv_tokens += start + num_tokens

    def add_drafts(self, seq: Sequence, drafts: list[int]) -> None:
        """Let `seq`, which is in the step as a decode, carry `drafts`."""
        entry = self.scheduled[seq.seq_id]
        self.scheduled[seq.seq_id] = replace(
            entry, token_ids=[*entry.token_ids, *drafts], num_drafts=len(drafts)
        )
        self.num_tokens_left -= len(drafts)
        self.num_draft_tokens += len(drafts)

    def note_next_block(self, seq: Sequence, place: PrefixPlace) -> None:
        """`seq`, which is in the step, fills the block that will be at `place`."""
        self.being_computed.setdefault(place, {})[seq.seq_id] = seq.group.tier

    def tier_computing(self, place: PrefixPlace) -> int | None:
        """Best tier among the sequences in this step that fill the block at `place`; None if nobody does."""
        return min(self.being_computed.get(place, {}).values(), default=None)

    def remove(self, seq: Sequence) -> bool:
        """Take `seq` back out with all traces, if it is in; returns whether it was."""
        entry = self.scheduled.pop(seq.seq_id, None)
        if entry is None:
            return False
        num_tokens = len(entry.token_ids)
        self.num_tokens_left += num_tokens
        self.num_kv_tokens -= entry.start + num_tokens - entry.num_drafts
        self.num_draft_tokens -= entry.num_drafts
        self.decodes.discard(seq.seq_id)
        self._forget_next_block(seq)
        return True

    def _forget_next_block(self, seq: Sequence) -> None:
        for place, tiers in self.being_computed.items():
            if tiers.pop(seq.seq_id, None) is not None:
                if not tiers:
                    del self.being_computed[place]
                return


def _with_prompt_outputs(entry: ScheduledSequence, seq: Sequence, *, end: int) -> ScheduledSequence:
    """The chunk [entry.start, end) of a prompt, with what is asked of it."""
    targets, pooling = prompt_targets(seq, start=entry.start, end=end), pooling_of(seq, end=end)
    if not targets and pooling is None:
        return entry
    num_top = seq.group.request.params.prompt_logprobs or 0
    return replace(entry, prompt_targets=targets, num_prompt_logprobs=num_top, pooling=pooling)


def pooling_of(seq: Sequence, *, end: int) -> Pooling | None:
    """What is asked of the chunk that ends at `end`: a mean needs all of them, the others the last."""
    pooling = seq.group.request.pooling
    if pooling is None or pooling.kind == "mean":
        return pooling
    return pooling if end == seq.num_prompt_tokens else None


def prompt_targets(seq: Sequence, *, start: int, end: int) -> tuple[int, ...]:
    """The prompt tokens whose logprobs the chunk [start, end) of `seq` can tell and has to."""
    group = seq.group
    if not group.lacks_prompt_logprobs:
        return ()
    return tuple(seq.token_ids[start + 1 : min(end + 1, group.num_prompt_tokens)])


def _sampling_of(group: SequenceGroup) -> SamplingParams:
    """A search draws nothing: it asks for the likeliest continuations of each of its beams."""
    if group.beams is None:
        return group.request.params
    return replace(group.request.params, temperature=0.0, logprobs=group.beams.num_candidates)


def new_sequence(seq: Sequence) -> NewSequence:
    """What the runner's sampler must know of a sequence that it meets for the first time."""
    request = seq.group.request
    banned: tuple[int, ...] = ()
    if request.params.min_tokens:
        eos = () if request.params.ignore_eos else request.eos_token_ids
        banned = tuple(dict.fromkeys((*eos, *request.params.stop_token_ids)))
    return NewSequence(
        seq_id=seq.seq_id,
        params=_sampling_of(seq.group),
        seed=seq.seed,
        prompt_token_ids=request.prompt_token_ids,
        banned_until_min_tokens=banned,
        banned_sequences=request.banned_sequences,
        dry_breaker_ids=request.dry_breaker_ids,
    )
