"""The largest steps within given limits, as plans, to be run once before the engine is ready.

What happens only once (allocations, kernels chosen per shape) then happens to nobody's request, and the cost
model has its first observations. The runner calls it.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

from penstock.core.ids import SequenceId
from penstock.core.params import SamplingParams
from penstock.engine.scheduler.cost import StepLoad
from penstock.engine.scheduler.plan import NewSequence, SampleSpec, ScheduledSequence, StepPlan

FIRST_SEQ_ID: Final = -2
"""Ids run down from here; the scheduler's are not negative."""
PROFILED_CONTEXT_TOKENS: Final = 1 << 19
"""Of all decodes of a profiled step together: more would take long and no other memory."""
SHORT_CHUNKS: Final = (2, 4, 8, 16, 32)
KINDS: Final = (
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(top_k=50, top_p=0.95),
    SamplingParams(presence_penalty=0.1, repetition_penalty=1.1, logprobs=0),
)


class StepPeaks(NamedTuple):
    """Bytes that steps take beside weights and KV, in the order of `heaviest_steps`."""

    chunk: int
    decodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmUpLimits:
    """How large a step can be."""

    max_num_seqs: int
    max_num_tokens: int
    """Of one chunk."""
    num_groups: int
    num_blocks: int
    block_size: int

    @property
    def num_tables(self) -> int:
        """Blocks per cache group."""
        return self.num_blocks // self.num_groups


def largest_steps(limits: WarmUpLimits) -> list[StepPlan]:
    """The longest chunk, the largest decode batch, and a decode alone; all fit the pool.

    Together they tell what a token, a sequence and a step cost, before the first request needs to know.
    """
    decodes = [
        _sequence(
            idx, num_tokens=1, start=limits.block_size - 1, limits=limits, first_block=idx, num_blocks=1
        )
        for idx in range(min(limits.max_num_seqs, limits.num_tables))
    ]
    return [_chunk(limits.max_num_tokens, limits), _plan(decodes), _plan(decodes[:1])]


def short_chunks(limits: WarmUpLimits) -> list[StepPlan]:
    """Chunks of a few tokens, as prefix hits and ends of prompts leave them, in the sizes of kernels."""
    return [_chunk(num, limits) for num in SHORT_CHUNKS if num <= limits.max_num_tokens]


def _chunk(num_tokens: int, limits: WarmUpLimits) -> StepPlan:
    """One sequence's first tokens, as many as the pool holds of them."""
    num_tokens = min(num_tokens, limits.num_tables * limits.block_size)
    num_blocks = -(-num_tokens // limits.block_size)
    return _plan(
        [_sequence(0, num_tokens=num_tokens, start=0, limits=limits, first_block=0, num_blocks=num_blocks)]
    )


def heaviest_steps(
    limits: WarmUpLimits, *, max_model_len: int, max_num_batched_tokens: int
) -> list[StepPlan]:
    """The steps that take the most memory beside KV: all tokens and all draws at once, and long decodes.

    Their sequences share a few blocks: what is computed is of no use, but takes as much memory.

    Args:
        limits: `max_num_seqs` and the pool, which may be far too small for these steps.
        max_model_len: tokens of the longest context.
        max_num_batched_tokens: tokens of the largest step.
    """
    num_seqs = limits.max_num_seqs
    num_long = max(1, -(-(max_num_batched_tokens - num_seqs) // max_model_len))
    lengths = [1] * num_seqs
    for idx in range(min(num_long, num_seqs)):
        lengths[idx] = min(max_model_len, max_num_batched_tokens - sum(lengths) + 1)
    context = min(max_model_len, max(limits.block_size, PROFILED_CONTEXT_TOKENS // num_seqs))
    return [
        _plan([_overlapping(idx, start=0, num_tokens=n, limits=limits) for idx, n in enumerate(lengths)]),
        _plan([_overlapping(idx, start=context - 1, num_tokens=1, limits=limits) for idx in range(num_seqs)]),
    ]


def load_of(plan: StepPlan) -> StepLoad:
    """What a plan of `largest_steps` asks of the machine, for the cost model."""
    lens = [len(seq.token_ids) for seq in plan.sequences]
    contexts = [seq.start + len(seq.token_ids) for seq in plan.sequences]
    pairs = sum(length * context for length, context in zip(lens, contexts, strict=True) if length > 1)
    return StepLoad(sum(lens), len(lens), sum(contexts), pairs)


def touched_blocks(plan: StepPlan) -> list[int]:
    """Blocks that the plan's sequences write to."""
    return sorted({block for seq in plan.sequences for table in seq.block_tables for block in table})


def _overlapping(idx: int, *, start: int, num_tokens: int, limits: WarmUpLimits) -> ScheduledSequence:
    """A sequence over blocks that it uses several times, and others too."""
    num_blocks = -(-(start + num_tokens) // limits.block_size)
    tables = tuple(
        [group * limits.num_tables + block % limits.num_tables for block in range(num_blocks)]
        for group in range(limits.num_groups)
    )
    seq_id = SequenceId(FIRST_SEQ_ID - idx)
    return ScheduledSequence(seq_id, [0] * num_tokens, start, tables, (SampleSpec(seq_id, 0),))


def _sequence(
    idx: int, *, num_tokens: int, start: int, limits: WarmUpLimits, first_block: int, num_blocks: int
) -> ScheduledSequence:
    tables = tuple(
        list(
            range(
                group * limits.num_tables + first_block, group * limits.num_tables + first_block + num_blocks
            )
        )
        for group in range(limits.num_groups)
    )
    seq_id = SequenceId(FIRST_SEQ_ID - idx)
    return ScheduledSequence(seq_id, [0] * num_tokens, start, tables, (SampleSpec(seq_id, 0),))


def _plan(sequences: list[ScheduledSequence]) -> StepPlan:
    seq_ids = [seq.seq_id for seq in sequences]
    new = [
        NewSequence(seq_id=seq_id, params=KINDS[idx % len(KINDS)], seed=idx, prompt_token_ids=[0])
        for idx, seq_id in enumerate(seq_ids)
    ]
    return StepPlan(step_id=-1, sequences=sequences, new_sequences=new, finished_seq_ids=seq_ids)
