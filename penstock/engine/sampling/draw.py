"""One draw per row by inverse CDF: filters decide what stays, one uniform number decides what comes.

Rows are drawn by the cheapest way that gives the exact answer: without top-k and top-p by one pass of
weights, with top-k from a bounded number of candidates, with top-p from candidates where those hold the
nucleus and else from whole rows. Which way a row takes depends on that row alone, and so does every sum, so
the neighbours never matter. `sampler` calls it.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from penstock.engine.sampling.filters import EVERYTHING, min_p_lengths, top_k_lengths, top_p_lengths
from penstock.engine.sampling.nucleus import keep_nucleus
from penstock.engine.sampling.vocabulary import (
    LANES,
    Candidates,
    Doubles,
    Floats,
    Ints,
    column_sums,
    softmax_weights,
    top_candidates,
)

FEW_CANDIDATES: Final = 128
"""Looked at first: they hold the usual top-k and the nucleus of a confident model."""
MANY_CANDIDATES: Final = 2048
"""Looked at next for a larger top-k, where finding them is much cheaper than sorting the row."""
SMALL_VOCAB: Final = 8192
"""Up to here a nucleus is found faster in the whole row than among candidates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawParams:
    """The numbers of each row, all [rows]."""

    temperatures: Doubles
    """Greater than 0."""
    top_k: Ints
    top_p: Doubles
    min_p: Doubles
    uniforms: Doubles
    """In [0, 1)."""

    def take(self, rows: Ints) -> "DrawParams":
        """The numbers of some rows."""
        return DrawParams(
            temperatures=self.temperatures[rows],
            top_k=self.top_k[rows],
            top_p=self.top_p[rows],
            min_p=self.min_p[rows],
            uniforms=self.uniforms[rows],
        )


def draw(logits: Floats, *, highest: Floats, params: DrawParams) -> Ints:
    """Draw one token per row.

    The CDF of a row that is drawn from candidates runs from the likeliest token down (equal logits: lowest id
    first), that of any other over the ids in a fixed order.

    Args:
        logits: [rows, vocab] float32, no NaN; not changed.
        highest: [rows], each row's maximum, finite.
        params: the rows' numbers.

    Returns:
        [rows] token ids; a token of weight 0 is never drawn.
    """
    has_top_k = top_k_lengths(params.top_k, vocab_size=logits.shape[1]) < EVERYTHING
    has_nucleus = ~has_top_k & (params.top_p < 1.0)
    ways = (
        (has_top_k, _draw_with_top_k),
        (has_nucleus, _draw_with_top_p),
        (~has_top_k & ~has_nucleus, _draw_from_all),
    )
    tokens = np.empty(len(logits), np.int64)
    for select, way in ways:
        rows = np.flatnonzero(select)
        if len(rows) == len(logits):
            return way(logits, highest=highest, params=params)
        if len(rows):
            tokens[rows] = way(logits[rows], highest=highest[rows], params=params.take(rows))
    return tokens


def _targets(uniforms: Doubles, *, totals: Doubles) -> Doubles:
    """Points on the CDF, below its end even where the product is rounded up to it."""
    return np.minimum(uniforms * totals, np.nextafter(totals, 0.0))


def _first_above(running: Doubles, *, targets: Doubles) -> Ints:
    """[rows]: index of the first running sum greater than the target."""
    indices: Ints = (running <= targets[:, None]).sum(axis=1)
    return indices


def _draw_from_all(logits: Floats, *, highest: Floats, params: DrawParams) -> Ints:
    """Neither top-k nor top-p: whole rows."""
    weights = softmax_weights(logits, highest=highest, temperatures=params.temperatures)
    return _draw_by_weights(weights, params=params)


def _draw_with_top_p(logits: Floats, *, highest: Floats, params: DrawParams) -> Ints:
    """Top-p without top-k: from a few candidates if they hold the nucleus, else from whole rows."""
    vocab_size = logits.shape[1]
    weights = softmax_weights(logits, highest=highest, temperatures=params.temperatures)
    if vocab_size <= SMALL_VOCAB:
        keep_nucleus(weights, top_p=params.top_p)
        return _draw_by_weights(weights, params=params)
    candidates = top_candidates(logits, k=FEW_CANDIDATES)
    totals = column_sums(weights).sum(axis=1)
    kept = _keep(candidates, totals=totals, params=params, vocab_size=vocab_size)
    tokens = _pick(candidates, kept=kept, uniforms=params.uniforms)
    rows = np.flatnonzero(kept.lengths > candidates.num)
    if len(rows):
        spread = weights[rows]
        keep_nucleus(spread, top_p=params.top_p[rows])
        tokens[rows] = _draw_by_weights(spread, params=params.take(rows))
    return tokens


def _draw_with_top_k(logits: Floats, *, highest: Floats, params: DrawParams) -> Ints:
    """Top-k: from the likeliest tokens down, looking at more candidates while some rows need more."""
    del highest  # the first candidate
    vocab_size = logits.shape[1]
    tokens = np.empty(len(logits), np.int64)
    rows = np.arange(len(logits))
    for num_candidates in (FEW_CANDIDATES, MANY_CANDIDATES, vocab_size):
        candidates = top_candidates(logits[rows], k=num_candidates)
        # top-p takes its share of the k likeliest here, so the whole row's mass is not asked for
        kept = _keep(candidates, totals=np.zeros(len(rows)), params=params.take(rows), vocab_size=vocab_size)
        known = kept.lengths <= candidates.num
        tokens[rows[known]] = _pick(candidates, kept=kept, uniforms=params.uniforms[rows])[known]
        rows = rows[~known]
        if not len(rows):
            break
    return tokens


def _draw_by_weights(weights: Floats, *, params: DrawParams) -> Ints:
    """First the column that holds the target, then the token in it.

    Args:
        weights: [rows, width] from `softmax_weights`, 0 where a filter dropped a token; changed in place.
        params: the rows' numbers.
    """
    if params.min_p.any():
        weights *= weights >= params.min_p[:, None]
    sums = column_sums(weights)
    running = np.cumsum(sums, axis=1)
    targets = _targets(params.uniforms, totals=running[:, -1])
    columns = _first_above(running, targets=targets)
    rows = np.arange(len(weights))
    before = running[rows, columns] - sums[rows, columns]
    inside = np.cumsum(weights.reshape(len(weights), LANES, -1)[rows, :, columns], axis=1, dtype=np.float64)
    rest = np.clip(targets - before, 0.0, np.nextafter(inside[:, -1], 0.0))
    tokens: Ints = _first_above(inside, targets=rest) * sums.shape[1] + columns
    return tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """What the filters keep of each row."""

    lengths: Ints
    """[rows]; more than there are candidates where they do not tell."""
    mass: Doubles
    """[rows, candidates]: running sums of the weights."""


def _keep(candidates: Candidates, *, totals: Doubles, params: DrawParams, vocab_size: int) -> _Kept:
    """Apply top-k, top-p, min-p to the candidates, which may or may not be enough to tell."""
    weights = np.subtract(candidates.values, candidates.values[:, :1], dtype=np.float64)
    weights /= params.temperatures[:, None]
    np.exp(weights, out=weights)
    mass = np.cumsum(weights, axis=1)
    k_lengths = top_k_lengths(params.top_k, vocab_size=vocab_size)
    last = np.minimum(k_lengths, candidates.num) - 1
    totals = np.where(k_lengths < EVERYTHING, mass[np.arange(len(mass)), last], totals)
    p_lengths = top_p_lengths(mass, totals=totals, top_p=params.top_p)
    lengths = np.minimum(np.minimum(k_lengths, p_lengths), min_p_lengths(weights, min_p=params.min_p))
    if candidates.num == vocab_size:
        return _Kept(lengths=np.minimum(lengths, vocab_size), mass=mass)
    # The share of top-p is of the k likeliest, and not all of these are among the candidates.
    untold = (candidates.num < k_lengths) & (k_lengths < EVERYTHING) & (params.top_p < 1.0)
    return _Kept(lengths=np.where(untold, EVERYTHING, lengths), mass=mass)


def _pick(candidates: Candidates, *, kept: _Kept, uniforms: Doubles) -> Ints:
    """[rows]: token ids; meaningless where the length is not known."""
    rows = np.arange(len(uniforms))
    totals = kept.mass[rows, np.minimum(kept.lengths, candidates.num) - 1]
    picks = _first_above(kept.mass, targets=_targets(uniforms, totals=totals))
    return candidates.ids[rows, picks]
