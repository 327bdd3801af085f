"""The native sampler: frequencies, large vocabularies, neighbours and threads, rows that are not numbers."""

import math

import numpy as np
import pytest
import torch

from penstock.core.params import SamplingParams
from penstock.engine.sampling.native_sampler import DrawStatus, NativeSampler
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.scheduler.plan import NewSequence
from penstock.kernels.cpu import _native

POOLS = {threads: _native.Pool(threads, [], 0) for threads in (1, 2, 3)}

every_isa = pytest.mark.parametrize("isa", _native.supported_isas())


def state(*, seed=0, **params):
    new = NewSequence(seq_id=seed, params=SamplingParams(**params), seed=seed, prompt_token_ids=[])
    return SequenceState(new)


def draws(logits, states, *, isa, threads=2, rows=None):
    """[(status, token id, logprobs)]."""
    sampler = NativeSampler(POOLS[threads], isa=isa)
    rows = range(len(logits)) if rows is None else rows
    found = sampler.sample(logits, rows=rows, states=states, output_idxs=[0] * len(states), masks=None)
    return list(zip(found.statuses, found.token_ids, found.logprobs, strict=True))


def tokens(logits, states, **kwargs):
    return [token_id for _, token_id, _ in draws(logits, states, **kwargs)]


def frequencies(row, *, isa, num=20000, **params):
    states = [state(seed=seed, **params) for seed in range(num)]
    found = tokens(np.array([row], np.float32), states, isa=isa, rows=[0] * num)
    return np.bincount(found, minlength=len(row)) / num


def kept(probabilities, names):
    mask = np.zeros(len(probabilities))
    mask[list(names)] = 1
    weights = probabilities * mask
    return weights / weights.sum()


@every_isa
@pytest.mark.parametrize(
    ("params", "names"),
    [
        ({}, range(6)),
        ({"top_k": 3}, (1, 3, 5)),
        ({"top_p": 0.7}, (1, 5)),
        ({"min_p": 0.3}, (1, 3, 5)),
        ({"top_k": 4, "top_p": 0.9}, (1, 3, 5)),
    ],
)
def test_tokens_come_as_often_as_their_probability_says(isa, params, names):
    """20,000 draws: six standard deviations of the commonest are 0.021."""
    probabilities = np.array([0.02, 0.4, 0.07, 0.16, 0.03, 0.32])
    found = frequencies(np.log(probabilities), isa=isa, **params)
    assert found == pytest.approx(kept(probabilities, names), abs=0.021)


@every_isa
def test_a_temperature_sharpens_and_flattens(isa):
    logits = np.array([0.0, 1.0, 2.0])
    for temperature in (0.5, 2.0):
        weights = np.exp(logits / temperature)
        found = frequencies(logits, isa=isa, temperature=temperature)
        assert found == pytest.approx(weights / weights.sum(), abs=0.021)


@every_isa
@pytest.mark.parametrize("vocab", [300, 9000, 70000])
def test_a_wide_nucleus_holds_exactly_the_first_tokens_of_the_sorted_row(isa, vocab):
    """Flat rows: hundreds or thousands of tokens, found by thresholds; half of the draws are beyond the 128 first."""
    row = np.random.default_rng(vocab).normal(size=vocab).astype(np.float32)
    order = np.argsort(-row, kind="stable")
    mass = np.cumsum(np.exp(row[order].astype(np.float64)))
    length = 1 + int((mass < 0.6 * mass[-1]).sum())
    states = [state(seed=seed, top_p=0.6) for seed in range(400)]
    found = tokens(row[None], states, isa=isa, rows=[0] * 400)
    # float32's sums may see the border a token earlier or later
    assert set(found) <= set(order[: length + 1].tolist())
    ranks = np.argsort(order)[found]
    assert ranks.max() > 0.8 * length
    assert ranks.mean() < length / 2


@every_isa
def test_equal_logits_at_the_border_of_a_nucleus_stay_by_lowest_id(isa):
    row = np.zeros((1, 9000), np.float32)
    states = [state(seed=seed, top_p=0.5) for seed in range(300)]
    found = tokens(row, states, isa=isa, rows=[0] * 300)
    assert max(found) <= 4500
    assert max(found) > 4300


@every_isa
def test_greedy_takes_the_lowest_id_among_equals_in_every_place(isa):
    rng = np.random.default_rng(0)
    for vocab in (1, 3, 63, 64, 255, 257, 1023, 1024, 1025, 5000):
        row = np.round(rng.normal(size=(1, vocab)) * 2).astype(np.float32)
        assert tokens(row, [state(temperature=0.0)], isa=isa) == [int(row[0].argmax())]
    for place in (0, 700, 1023, 1024, 1999):
        row = np.full((1, 2000), -3, np.float32)
        row[0, [place, 1999]] = 5
        assert tokens(row, [state(temperature=0.0)], isa=isa) == [place]


MIX = [
    {},
    {"temperature": 0.0},
    {"top_p": 0.8},
    {"top_k": 40},
    {"min_p": 0.02},
    {"top_p": 0.99, "min_p": 0.001},
    {"temperature": 0.0, "logprobs": 3},
]


@every_isa
def test_neighbours_and_threads_never_matter(isa):
    logits = (np.random.default_rng(1).normal(size=(21, 9001)) * 2).astype(np.float32)
    states = [state(seed=i, **MIX[i % len(MIX)]) for i in range(21)]
    together = draws(logits, states, isa=isa, threads=2)
    assert draws(logits, states, isa=isa, threads=1) == together
    assert draws(logits, states, isa=isa, threads=3) == together
    for i in range(21):
        assert draws(logits[i : i + 1], states[i : i + 1], isa=isa, threads=1 + i % 3) == together[i : i + 1]
    backwards = draws(logits, states[::-1], isa=isa, rows=range(20, -1, -1))
    assert backwards == together[::-1]


@every_isa
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("place", [0, 5, 1023, 1500, 2046])
def test_a_number_that_is_not_finite_is_found_anywhere(isa, bad, place):
    logits = np.zeros((2, 2047), np.float32)
    logits[0, place] = bad
    found = draws(logits, [state(), state(temperature=0.0)], isa=isa)
    assert [status for status, _, _ in found] == [DrawStatus.NOT_FINITE, DrawStatus.DRAWN]


@every_isa
def test_a_row_of_minus_infinity_is_not_finite_and_one_finite_token_is_always_drawn(isa):
    logits = np.full((6, 9000), -np.inf, np.float32)
    logits[1:, 4321] = -7
    states = [
        state(**params)
        for params in ({}, {}, {"temperature": 0.0}, {"top_p": 0.5}, {"top_k": 9}, {"min_p": 1.0})
    ]
    found = draws(logits, states, isa=isa)
    assert found[0][0] == DrawStatus.NOT_FINITE
    assert [token_id for _, token_id, _ in found[1:]] == [4321] * 5


def test_scratch_grows_with_the_vocabulary_and_stays():
    sampler = NativeSampler(POOLS[2], isa="scalar")
    assert sampler.num_bytes == 0
    for vocab in (100, 5000, 100):
        logits = np.zeros((1, vocab), np.float32)
        sampler.sample(logits, rows=[0], states=[state()], output_idxs=[0], masks=None)
    assert 5000 * 30 < sampler.num_bytes < 5000 * 100


@every_isa
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rows_are_finite_finds_each_bad_row(isa, dtype):
    types = {torch.bfloat16: _native.DType.bf16, torch.float32: _native.DType.f32}
    for num_rows, cols in ((1, 1), (3, 17), (7, 64), (700, 97)):
        x = torch.full((num_rows, cols), torch.finfo(dtype).max, dtype=dtype)
        expected = torch.ones(num_rows, dtype=torch.uint8)
        for row in range(0, num_rows, 3):
            x[row, (row * 7) % cols] = (math.nan, math.inf, -math.inf)[row % 9 // 3]
            expected[row] = 0
        out = torch.full((num_rows,), 9, dtype=torch.uint8)
        _native.rows_are_finite(
            POOLS[2],
            isa=isa,
            data=x.data_ptr(),
            dtype=types[dtype],
            num_rows=num_rows,
            cols=cols,
            row_bytes=x.stride(0) * x.element_size(),
            out=out.data_ptr(),
        )
        assert torch.equal(out, expected)
