"""The random number of a draw is a pure function of (seed, token index)."""

import numpy as np

from penstock.engine.sampling.uniform import GOLDEN_GAMMA, _mix, uniforms


def test_the_mixer_is_splitmix64():
    """First three outputs of the published generator for seed 0."""
    states = np.arange(1, 4, dtype=np.uint64) * GOLDEN_GAMMA
    assert [hex(z) for z in _mix(states).tolist()] == [
        "0xe220a8397b1dcdaf",
        "0x6e789e6aa1b965f4",
        "0x6c45d188009454f",
    ]


def test_a_number_does_not_depend_on_its_neighbours_or_its_place():
    together = uniforms([7, 8, 7, -1], output_idxs=[0, 5, 3, 2])
    alone = [uniforms([s], output_idxs=[i])[0] for s, i in [(7, 0), (8, 5), (7, 3), (-1, 2)]]
    assert together.tolist() == alone


def test_numbers_are_in_the_half_open_unit_interval_for_extreme_seeds():
    seeds = [0, 1, -1, 2**63 - 1, -(2**63), 2**64 - 1] * 200
    numbers = uniforms(seeds, output_idxs=list(range(len(seeds))))
    assert (numbers >= 0).all()
    assert (numbers < 1).all()


def test_numbers_along_an_answer_and_across_neighbouring_seeds_are_spread_evenly():
    """Chi-square over 64 bins; 99.99 % point for 63 degrees of freedom is 111."""
    n = 20_000
    along = uniforms([42] * n, output_idxs=list(range(n)))
    across = uniforms(list(range(n)), output_idxs=[0] * n)
    for numbers in (along, across):
        counts = np.histogram(numbers, bins=64, range=(0, 1))[0]
        assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 111


def test_neighbouring_seeds_are_not_correlated():
    a = uniforms([1] * 5000, output_idxs=list(range(5000)))
    b = uniforms([2] * 5000, output_idxs=list(range(5000)))
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.05
