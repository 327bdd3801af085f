"""Filters keep a prefix of the ordered row; lengths by hand."""

import numpy as np
import pytest

from penstock.engine.sampling.filters import EVERYTHING, min_p_lengths, top_k_lengths, top_p_lengths

WEIGHTS = np.array([[1.0, 0.5, 0.25, 0.25]])  # shares 0.5, 0.25, 0.125, 0.125
MASS = np.cumsum(WEIGHTS, axis=1)


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, 1), (3, 3), (4, EVERYTHING), (9, EVERYTHING), (0, EVERYTHING), (-1, EVERYTHING)]
)
def test_top_k_keeps_k_and_zero_and_minus_one_and_more_than_the_vocabulary_keep_all(top_k, kept):
    assert top_k_lengths(np.array([top_k]), vocab_size=4).tolist() == [kept]


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.001, 1), (0.5, 1), (0.51, 2), (0.75, 2), (0.8, 3), (0.99, 4), (1.0, EVERYTHING)]
)
def test_top_p_keeps_the_shortest_prefix_that_reaches_the_share(top_p, kept):
    lengths = top_p_lengths(MASS, totals=MASS[:, -1], top_p=np.array([top_p]))
    assert lengths.tolist() == [kept]


def test_top_p_does_not_tell_when_the_candidates_hold_too_little_mass():
    lengths = top_p_lengths(MASS, totals=np.array([100.0]), top_p=np.array([0.5]))
    assert lengths.tolist() == [EVERYTHING]


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, EVERYTHING), (0.25, EVERYTHING), (0.26, 2), (0.5, 2), (1.0, 1)]
)
def test_min_p_keeps_what_is_at_least_that_fraction_of_the_likeliest(min_p, kept):
    assert min_p_lengths(WEIGHTS, min_p=np.array([min_p])).tolist() == [kept]
