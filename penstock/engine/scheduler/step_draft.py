"""A step while it is being planned: what is in it, and what is left of its budget.

Made anew for each `schedule()`; becomes a `StepPlan`. It decides nothing.
"""

from dataclasses import dataclass, field

from penstock.core.ids import SequenceId
from penstock.engine.kv.prefix_tree import Namespace, TreeNode
from penstock.engine.scheduler.figures import StepCounts
from penstock.engine.scheduler.plan import NewSequence, SampleSpec, ScheduledSequence
from penstock.engine.scheduler.request import Sequence, SequenceGroup

PrefixPlace = tuple[Namespace | TreeNode, bytes]
"""A block by where it will be in the prefix tree: its parent (the namespace for a first block) and edge."""


@dataclass(slots=True, kw_only=True)
class StepDraft:
    """See the module."""

    num_tokens_left: int
    """Token budget not yet handed out."""
    scheduled: dict[SequenceId, ScheduledSequence] = field(default_factory=dict)
    num_kv_tokens: int = 0
    """Sum of context lengths after the step."""
    num_decodes: int = 0
    num_promised_blocks: int | None = None
    """Blocks that running groups will still take; None if not known."""
    counts: StepCounts = field(default_factory=StepCounts)
    started: list[SequenceGroup] = field(default_factory=list)
    """Groups that run for the first time."""
    being_computed: dict[PrefixPlace, int] = field(default_factory=dict)
    """Next block of each sequence in this step, and the best tier among those that compute it."""

    def add(self, seq: Sequence, *, num_tokens: int, samples: tuple[SampleSpec, ...]) -> None:
        """Put the next `num_tokens` of `seq` into the step."""
        start = seq.next_position
        token_ids = seq.token_ids[start : start + num_tokens]
        self.scheduled[seq.seq_id] = ScheduledSequence(
            seq.seq_id, token_ids, start, seq.blocks.tables, samples
        )
        self.num_tokens_left -= num_tokens
        self.num_kv_tokens += start + num_tokens

    def remove(self, seq: Sequence) -> bool:
        """Take `seq` back out, if it is in; returns whether it was."""
        entry = self.scheduled.pop(seq.seq_id, None)
        if entry is None:
            return False
        num_tokens = len(entry.token_ids)
        self.num_tokens_left += num_tokens
        self.num_kv_tokens -= entry.start + num_tokens
        return True


def new_sequence(seq: Sequence) -> NewSequence:
    """What the runner's sampler must know of a sequence that it meets for the first time."""
    request = seq.group.request
    banned: tuple[int, ...] = ()
    if request.params.min_tokens:
        eos = () if request.params.ignore_eos else request.eos_token_ids
        banned = tuple(dict.fromkeys((*eos, *request.params.stop_token_ids)))
    return NewSequence(
        seq_id=seq.seq_id,
        params=request.params,
        seed=seq.seed,
        prompt_token_ids=request.prompt_token_ids,
        banned_until_min_tokens=banned,
    )
