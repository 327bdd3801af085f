"""Log-probabilities of the raw logits, before any penalty or temperature, for rows that ask.

Ranks follow the one order of tokens (logit falling, then id rising), 1 being the first. `sampler` calls it.
"""

from collections.abc import Sequence

import numpy as np

from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.sampling.vocabulary import (
    Candidates,
    Floats,
    column_sums,
    softmax_weights,
    top_candidates,
)


def _rank(row: Floats, *, token_id: int) -> int:
    value = row[token_id]
    higher = np.count_nonzero(row > value)
    return int(1 + higher + np.count_nonzero(row[:token_id] == value))


def token_logprobs(row: Floats, *, token_id: int, num_top: int) -> TokenLogprobs:
    """The chosen token's log-probability and rank, and the `num_top` likeliest tokens'.

    Args:
        row: [vocab] raw logits, finite or -inf, at least one finite.
        token_id: the token that was chosen.
        num_top: 0 or more.

    Returns:
        Natural logarithms; `-inf` cannot be chosen, so the chosen token's is finite.
    """
    (told,) = logprobs_of_tokens(row[None], token_ids=[token_id], num_top=num_top)
    return told


def logprobs_of_tokens(rows: Floats, *, token_ids: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """For each row the log-probability and rank of a token that was given, and the likeliest tokens'.

    Args:
        rows: [n, vocab] raw logits, finite or -inf, at least one finite.
        token_ids: [n].
        num_top: 0 or more.

    Returns:
        Natural logarithms; a given token may be impossible: its logprob is then `-inf`.
    """
    highest = rows.max(axis=1)
    weights = softmax_weights(rows, highest=highest, temperatures=np.ones(len(rows)))
    log_totals = highest.astype(np.float64) + np.log(column_sums(weights).sum(axis=1))
    top = top_candidates(rows, k=num_top) if num_top else None
    told = []
    for row, (token_id, log_total) in enumerate(zip(token_ids, log_totals.tolist(), strict=True)):
        logprob = float(rows[row, token_id]) - log_total
        given = TokenLogprob(token_id, logprob, _rank(rows[row], token_id=token_id))
        told.append(TokenLogprobs(given, () if top is None else _top(top, row=row, log_total=log_total)))
    return told


def _top(candidates: Candidates, *, row: int, log_total: float) -> tuple[TokenLogprob, ...]:
    logprobs = candidates.values[row].astype(np.float64) - log_total
    pairs = zip(candidates.ids[row].tolist(), logprobs.tolist(), strict=True)
    return tuple(TokenLogprob(i, lp, rank) for rank, (i, lp) in enumerate(pairs, 1))
