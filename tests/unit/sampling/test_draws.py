"""Draws follow the softmax of what the filters keep; statistical tests with fixed seeds."""

import numpy as np
import pytest

from penstock.engine.sampling.draw import DrawParams, draw
from penstock.engine.sampling.uniform import uniforms

N = 20_000


def params(uniform_numbers, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    n = len(uniform_numbers)
    return DrawParams(
        temperatures=np.full(n, temperature, np.float64),
        top_k=np.full(n, top_k, np.int64),
        top_p=np.full(n, top_p, np.float64),
        min_p=np.full(n, min_p, np.float64),
        uniforms=np.asarray(uniform_numbers, np.float64),
    )


def draws(row, n=N, **kwargs):
    logits = np.tile(np.asarray(row, np.float32), (n, 1))
    numbers = uniforms(list(range(n)), output_idxs=[3] * n)
    return draw(logits, highest=logits.max(axis=1), params=params(numbers, **kwargs))


def expected(row, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    """Straightforward float64 definition: probabilities after all filters."""
    scaled = np.asarray(row, np.float64) / temperature
    weights = np.exp(scaled - scaled.max())
    order = np.lexsort((np.arange(len(row)), -scaled))
    keep = order[: top_k if top_k > 0 else len(row)]
    mass = np.cumsum(weights[keep])
    if top_p < 1.0:
        keep = keep[: 1 + int((mass < top_p * mass[-1]).sum())]
    keep = [i for i in keep if weights[i] >= min_p]
    shares = np.zeros(len(row))
    shares[keep] = weights[keep] / weights[keep].sum()
    return shares


ROW = [1.0, 0.3, -0.5, 2.0, 0.0, -1.0, 1.5, 0.3, -3.0, 0.9]


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 4},
        {"top_p": 0.8},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 6, "top_p": 0.9},
        {"temperature": 0.7, "top_p": 0.95, "min_p": 0.1},
        {"top_k": 5, "min_p": 0.3},
    ],
    ids=str,
)
def test_draws_follow_the_filtered_softmax(kwargs):
    """Chi-square; the 99.99 % point for at most 9 degrees of freedom is below 34."""
    shares = expected(ROW, **kwargs)
    counts = np.bincount(draws(ROW, **kwargs), minlength=len(ROW))
    assert (counts[shares == 0] == 0).all()
    alive = shares > 0
    assert ((counts[alive] - N * shares[alive]) ** 2 / (N * shares[alive])).sum() < 34


@pytest.mark.parametrize("vocab_size", [10_000, 40_000])
@pytest.mark.parametrize(
    "kwargs",
    [
        {"top_k": 50},
        {"top_k": 1000},
        {"top_k": 3000, "top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.5},
    ],
    ids=str,
)
def test_large_vocabularies_keep_the_same_tokens_by_every_way_of_finding_them(vocab_size, kwargs):
    """The extreme draws are the first token and none outside what the definition keeps."""
    rng = np.random.default_rng(vocab_size)
    row = (rng.standard_normal(vocab_size) * 1.5).astype(np.float32)
    shares = expected(row, **kwargs)
    numbers = [0.0, 0.25, 0.5, 0.9, 0.999, 1 - 2.0**-53]
    logits = np.tile(row, (len(numbers), 1))
    tokens = draw(logits, highest=logits.max(axis=1), params=params(numbers, **kwargs))
    assert (shares[tokens] > 0).all()
    assert len(set(tokens.tolist())) > 1


def test_a_confident_row_of_a_large_vocabulary_is_drawn_from_the_likeliest_down():
    row = np.full(20_000, -20.0, np.float32)
    row[[11, 5, 19_999]] = [4.0, 3.0, 2.0]
    logits = np.tile(row, (3, 1))
    tokens = draw(logits, highest=logits.max(axis=1), params=params([0.0, 0.7, 0.99], top_p=0.95))
    assert tokens.tolist() == [11, 5, 19_999]


@pytest.mark.parametrize("kwargs", [{}, {"top_k": 3}, {"top_p": 0.999}])
def test_a_token_of_weight_zero_is_never_drawn_at_either_end(kwargs):
    row = np.array([-np.inf, 0.0, -np.inf, 0.0, -np.inf, -1e9], np.float32)
    ends = [0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
    logits = np.tile(row, (4, 1))
    tokens = draw(logits, highest=np.zeros(4, np.float32), params=params(ends, **kwargs))
    assert set(tokens.tolist()) == {1, 3}


def test_a_tiny_temperature_takes_the_likeliest():
    assert set(draws(ROW, n=100, temperature=1e-6).tolist()) == {3}


@pytest.mark.parametrize("kwargs", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_the_strictest_filters_leave_the_likeliest(kwargs):
    assert set(draws(ROW, n=100, **kwargs).tolist()) == {3}
