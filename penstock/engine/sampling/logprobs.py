"""Log-probabilities of the raw logits, before any penalty or temperature, for rows that ask.

Ranks follow the one order of tokens (logit falling, then id rising), 1 being the first. `sampler` calls it.
"""

import numpy as np

from penstock.core.text import TokenLogprob, TokenLogprobs
from penstock.engine.sampling.vocabulary import Floats, column_sums, softmax_weights, top_candidates


def _log_total(row: Floats) -> float:
    """log(sum(exp(row))), natural logarithm."""
    highest = row.max(keepdims=True)
    weights = softmax_weights(row[None], highest=highest, temperatures=np.ones(1))
    return float(highest[0] + np.log(column_sums(weights).sum()))


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
    log_total = _log_total(row)
    logprob = float(row[token_id]) - log_total
    sampled = TokenLogprob(token_id, logprob, _rank(row, token_id=token_id))
    if not num_top:
        return TokenLogprobs(sampled)
    top = top_candidates(row[None], k=num_top)
    pairs = zip(top.ids[0].tolist(), (top.values[0].astype(np.float64) - log_total).tolist(), strict=True)
    return TokenLogprobs(sampled, tuple(TokenLogprob(i, lp, rank) for rank, (i, lp) in enumerate(pairs, 1)))
