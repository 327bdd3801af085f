"""Filters that few requests ask for: typical_p, top_n_sigma, XTC, mirostat. One row at a time, sorted whole.

A row of 152,000 tokens costs 4 to 12 ms here, in its own steps; the usual filters need no sort
(`draw`). The order, after temperature: top-n-sigma, top-k, typical, top-p, min-p, XTC, mirostat, draw.
`sampler` calls it.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from penstock.core.params import SamplingParams
from penstock.engine.sampling.vocabulary import Doubles, Floats, Ints, top_candidates

MIROSTAT_M: Final = 100
"""Tokens from which mirostat 1 estimates the exponent of Zipf's law, as its authors do."""
LEAST: Final = 1e-300
"""Below every probability that counts: keeps logarithms finite."""


def is_rare(params: SamplingParams) -> bool:
    """True if one of these filters is on; greedy sampling has none."""
    if params.is_greedy:
        return False
    return bool(params.typical_p < 1 or params.top_n_sigma > 0 or params.xtc_probability or params.mirostat)


class RareDraw(NamedTuple):
    """What was drawn."""

    token_id: int
    surprise: float
    """-log2 of its probability among those that were left."""


@dataclass(slots=True)
class _Remaining:
    """The tokens still in, likeliest first, and their probabilities, which sum to 1."""

    ids: Ints
    probs: Doubles

    def keep(self, kept: Ints | slice) -> None:
        """Drop all but some (indices or a slice, in order)."""
        self.ids, self.probs = self.ids[kept], self.probs[kept]
        self.probs = self.probs / self.probs.sum()


def draw_rare(
    logits: Floats, *, params: SamplingParams, uniform: float, xtc_uniform: float, max_surprise: float
) -> RareDraw:
    """Draw one token.

    Args:
        logits: [vocab] float32 after penalties, no NaN, at least one finite; not changed.
        params: temperature and filters.
        uniform: in [0, 1), chooses the token.
        xtc_uniform: in [0, 1), decides whether XTC acts.
        max_surprise: mirostat's running bound, in bits.

    Returns:
        The token; one of probability 0 is never drawn.
    """
    left = _sorted(logits, params=params)
    if params.top_k > 0:
        left.keep(slice(params.top_k))
    _keep_typical(left, mass=params.typical_p)
    _keep_top_p(left, mass=params.top_p)
    left.keep(slice(max(1, int((left.probs >= params.min_p * left.probs[0]).sum()))))
    if xtc_uniform < params.xtc_probability:
        _exclude_top_choices(left, threshold=params.xtc_threshold)
    _bound_surprise(left, params=params, max_surprise=max_surprise)
    place = int((np.cumsum(left.probs) <= uniform).sum())
    place = min(place, int(np.flatnonzero(left.probs)[-1]))
    return RareDraw(int(left.ids[place]), float(-np.log2(left.probs[place])))


def _sorted(logits: Floats, *, params: SamplingParams) -> _Remaining:
    """All possible tokens at the temperature, within `top_n_sigma` standard deviations of the highest logit.

    **Source:** Tang et al., "Top-n-sigma: not all logits are you need" (2024), section 3.
    """
    candidates = top_candidates(logits[None], k=len(logits))
    values = candidates.values[0].astype(np.float64)
    values = values[np.isfinite(values)]
    if params.top_n_sigma > 0:
        values = values[values >= values[0] - params.top_n_sigma * values.std()]
    weights = np.exp((values - values[0]) / params.temperature)
    return _Remaining(candidates.ids[0][: len(weights)], weights / weights.sum())


def _keep_typical(left: _Remaining, *, mass: float) -> None:
    """Keep the tokens whose surprise is nearest to the expected one, up to a share of the mass.

    **Source:** Meister et al., "Locally typical sampling" (2023), section 4.
    """
    if mass >= 1.0:
        return
    surprises = -np.log(np.maximum(left.probs, LEAST))
    distance = np.abs(surprises - float(left.probs @ surprises))
    order = np.argsort(distance, kind="stable")
    num_kept = int((np.cumsum(left.probs[order]) < mass).sum()) + 1
    left.keep(np.sort(order[:num_kept]))


def _keep_top_p(left: _Remaining, *, mass: float) -> None:
    if mass < 1.0:
        left.keep(slice(int((np.cumsum(left.probs) < mass).sum()) + 1))


def _exclude_top_choices(left: _Remaining, *, threshold: float) -> None:
    """Of the tokens above the threshold keep only the least likely.

    **Source:** p-e-w, "Exclude Top Choices (XTC)" (text-generation-webui pull request 6335, 2024).
    """
    num_above = int((left.probs >= threshold).sum())
    if num_above >= 2:
        left.keep(slice(num_above - 1, None))


def _bound_surprise(left: _Remaining, *, params: SamplingParams, max_surprise: float) -> None:
    """Keep what mirostat's running bound allows; the likeliest token stays in any case.

    **Source:** Basu et al., "Mirostat: a neural text decoding algorithm that directly controls perplexity"
    (2021), algorithm 1 (mode 1) and its second version (mode 2).
    """
    if params.mirostat == 1:
        left.keep(slice(_zipf_top_k(left.probs, max_surprise=max_surprise)))
    elif params.mirostat == 2:
        surprises = -np.log2(np.maximum(left.probs, LEAST))
        left.keep(slice(max(1, int((surprises <= max_surprise).sum()))))


def _zipf_top_k(probs: Doubles, *, max_surprise: float) -> int:
    num = min(MIROSTAT_M, len(probs))
    heads = np.maximum(probs[:num], LEAST)
    if num < 2:
        return 1
    ranks = np.arange(1, num)
    steps, drops = np.log((ranks + 1) / ranks), np.log(heads[:-1] / heads[1:])
    exponent = float((steps * drops).sum() / (steps * steps).sum())
    excess = exponent - 1.0
    if abs(excess) < 1e-9 or exponent < 1e-9:
        return len(probs)
    spread = excess / (1.0 - len(probs) ** -excess)
    log_k = (max_surprise * np.log(2.0) + np.log(max(spread, LEAST))) / exponent
    return int(np.clip(np.exp(min(log_k, 40.0)), 1, len(probs)))
