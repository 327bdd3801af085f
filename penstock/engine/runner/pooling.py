"""What sequences give that generate nothing: a vector of the prompt, or scores of its last token.

`pool` reads a pass and changes nothing, so that a pass can be repeated; `Pools.take` adds up what came of it
when the step is collected. The runner calls both.

**Source:** Reimers and Gurevych, "Sentence-BERT" (2019), section 3, for mean pooling; last-token pooling and
the yes/no logits as in the Qwen3 Embedding report (2025), section 2.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from penstock.core.ids import SequenceId
from penstock.core.tokens import Pooling
from penstock.engine.runner.prompt_scores import Logits
from penstock.engine.scheduler.plan import Pooled, ScheduledSequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolPart:
    """What one chunk gives."""

    seq_id: SequenceId
    start: int
    """Position of its first token."""
    num_tokens: int
    is_sum: bool
    """The values of chunks are added up and divided by the number of tokens."""
    values: torch.Tensor
    """[n] float32, on the host"""


def pool(
    sequences: Iterable[tuple[ScheduledSequence, int]], *, hidden: torch.Tensor, logits: Logits
) -> list[PoolPart]:
    """What the plan's `pooling` asks for.

    Args:
        sequences: some of the pass, each with one past its last row, which is finite as all of its rows are;
            those that ask for nothing cost nothing.
        hidden: [num_tokens, hidden_size], the rows of the pass.
        logits: the model's head.
    """
    return [
        PoolPart(
            seq_id=seq.seq_id,
            start=seq.start,
            num_tokens=len(seq.token_ids),
            is_sum=seq.pooling.kind == "mean",
            values=_values(seq.pooling, hidden[end - len(seq.token_ids) : end], logits).cpu(),
        )
        for seq, end in sequences
        if seq.pooling is not None
    ]


def overflowing(parts: Iterable[PoolPart]) -> set[SequenceId]:
    """Sequences whose numbers are not finite although their hidden states are."""
    return {part.seq_id for part in parts if not bool(part.values.isfinite().all())}


def _values(pooling: Pooling, rows: torch.Tensor, logits: Logits) -> torch.Tensor:
    if pooling.kind == "mean":
        return rows.float().sum(dim=0)
    if pooling.kind == "last":
        return rows[-1].float()
    scores = logits(rows[-1:])[0].float()
    if pooling.kind == "classify":
        return scores.clone()
    assert pooling.kind == "logits", pooling.kind
    return scores[list(pooling.token_ids)]


class Pools:
    """Sums over the chunks of prompts that are not whole yet; one vector a sequence."""

    def __init__(self) -> None:
        self._sums: dict[SequenceId, tuple[int, torch.Tensor]] = {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the sums."""
        return sum(total.nbytes for _, total in self._sums.values())

    def forget(self, seq_ids: Iterable[SequenceId]) -> None:
        """Drop sequences; ids that were never met are ignored."""
        for seq_id in seq_ids:
            self._sums.pop(seq_id, None)

    def take(self, part: PoolPart) -> Pooled | None:
        """Add a chunk; the result is that of the prompt up to its end, None if a chunk before it failed."""
        if not part.is_sum:
            return Pooled(part.seq_id, tuple(part.values.tolist()))
        total, end = part.values, part.start + part.num_tokens
        if part.start:  # a prompt that is computed again, after a preemption, begins at 0 again
            known_end, known = self._sums.get(part.seq_id, (0, total))
            if known_end != part.start:
                return None
            total = known + total
        self._sums[part.seq_id] = (end, total)
        return Pooled(part.seq_id, tuple((total / end).tolist()))
