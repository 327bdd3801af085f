"""Logprobs of a prompt's own tokens, in pieces: the logits of a long chunk would fill the memory.

The runner calls it once per pass; it keeps nothing. Whole rows go through numpy, a few at a time; see
`sampling/logprobs` for what a logprob and a rank are.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Final

import torch

from penstock.core.text import TokenLogprobs
from penstock.engine.sampling.logprobs import logprobs_of_tokens
from penstock.engine.scheduler.plan import PromptLogprobs, ScheduledSequence
from penstock.kernels.transfer import on_host

MAX_ELEMENTS: Final = 1 << 22
"""Logits held at a time, 16 MiB: 27 rows of a vocabulary of 152k, so that the head is read rarely."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""A model's head: [rows, hidden_size] to [rows, scores] float32, one score a token of the vocabulary or a
label."""


def prompt_logprobs(
    sequences: Iterable[tuple[ScheduledSequence, int]],
    *,
    hidden: torch.Tensor,
    logits: Logits,
    vocab: int,
) -> list[PromptLogprobs]:
    """What the plan's `prompt_targets` ask for.

    Args:
        sequences: some of the pass, each with one past its last row, which is finite as all of its rows are;
            those without targets cost nothing.
        hidden: [num_tokens, hidden_size], the rows of the pass.
        logits: scores the vocabulary.
        vocab: number of columns that it returns.
    """
    return [
        PromptLogprobs(
            seq.seq_id,
            seq.start + 1,
            tuple(
                _scores(seq, first_row=end - len(seq.token_ids), hidden=hidden, logits=logits, vocab=vocab)
            ),
        )
        for seq, end in sequences
        if seq.prompt_targets
    ]


def _scores(
    seq: ScheduledSequence, *, first_row: int, hidden: torch.Tensor, logits: Logits, vocab: int
) -> Iterator[TokenLogprobs]:
    targets, num_rows = seq.prompt_targets, max(1, MAX_ELEMENTS // vocab)
    for start in range(0, len(targets), num_rows):
        part = targets[start : start + num_rows]
        first = first_row + start
        rows = on_host(logits(hidden[first : first + len(part)]))
        yield from logprobs_of_tokens(rows, token_ids=part, num_top=seq.num_prompt_logprobs)
