"""For any row and parameters: filters equal a sort-based definition, and neighbours never matter."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.params import SamplingParams
from penstock.engine.sampling.draw import DrawParams, draw
from penstock.engine.sampling.nucleus import keep_nucleus
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.plan import NewSequence, SampleSpec

LOGITS = st.one_of(st.integers(-4, 4).map(float), st.floats(-8, 8, width=32), st.just(-np.inf))


@st.composite
def rows(draw_from, *, max_size=40):
    row = draw_from(st.lists(LOGITS, min_size=1, max_size=max_size))
    row[draw_from(st.integers(0, len(row) - 1))] = draw_from(st.integers(-4, 4).map(float))
    return np.array(row, np.float32)


def oracle(row, *, temperature, top_k, top_p, min_p, uniform):
    """Sort the row, filter it step by step in float64, walk along the CDF."""
    order = np.lexsort((np.arange(len(row)), -(row + np.float32(0)).astype(np.float64)))
    values = row[order].astype(np.float64)
    weights = np.exp((values - values[0]) / temperature)
    if 0 < top_k < len(row):
        order, weights = order[:top_k], weights[:top_k]
    mass = np.cumsum(weights)
    if top_p < 1.0:
        length = 1 + int((mass < top_p * mass[-1]).sum())
        order, weights = order[:length], weights[:length]
    keep = weights >= min_p
    order, weights = order[keep], weights[keep]
    mass = np.cumsum(weights)
    target = min(uniform * mass[-1], np.nextafter(mass[-1], 0.0))
    return int(order[int((mass <= target).sum())])


@given(
    row=rows(),
    temperature=st.floats(0.01, 2.0),
    top_k=st.integers(1, 39),
    top_p=st.floats(0.01, 1.0),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    uniform=st.floats(0.0, 1.0, exclude_max=True),
)
@settings(max_examples=300, deadline=None)
def test_top_k_top_p_and_min_p_together_equal_the_sorted_definition(
    row, temperature, top_k, top_p, min_p, uniform
):
    """Exact: both sides do the same float64 arithmetic in the same order."""
    if top_k >= len(row):
        top_k = max(1, len(row) - 1)
    found = draw(
        row[None],
        highest=row.max(keepdims=True),
        params=DrawParams(
            temperatures=np.array([temperature]),
            top_k=np.array([top_k]),
            top_p=np.array([top_p]),
            min_p=np.array([min_p]),
            uniforms=np.array([uniform]),
        ),
    )
    if len(row) == 1:
        assert found.tolist() == [0]
    else:
        assert found.tolist() == [
            oracle(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, uniform=uniform)
        ]


@given(
    weights=st.lists(st.lists(st.integers(0, 64), min_size=8, max_size=8), min_size=1, max_size=5),
    top_p=st.integers(1, 32),
)
@settings(max_examples=300, deadline=None)
def test_a_nucleus_by_histogram_equals_the_sorted_definition(weights, top_p):
    """Weights and shares are multiples of powers of two, so every sum is exact and every tie is real."""
    values = np.array(weights, np.float32) / 64
    values[:, 0] = 1.0
    kept = values.copy()
    keep_nucleus(kept, top_p=np.full(len(values), top_p / 32))
    for row, found in zip(values, kept, strict=True):
        order = np.lexsort((np.arange(len(row)), -row))
        mass = np.cumsum(row[order].astype(np.float64))
        length = 1 + int((mass < top_p / 32 * mass[-1]).sum())
        expected = np.zeros_like(row)
        expected[order[:length]] = row[order[:length]]
        assert found.tolist() == expected.tolist()


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, -1, 1, 5, 150, 9999]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.0, 0.1]),
    presence_penalty=st.sampled_from([0.0, 0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3]),
    logit_bias=st.sampled_from([{}, {}, {3: 5.0}]),
    logprobs=st.sampled_from([None, None, 2]),
)


@given(
    params=st.lists(PARAMS, min_size=1, max_size=7),
    vocab_size=st.sampled_from([17, 300, 9001, 40_000]),
    seed=st.integers(0, 2**31),
    shuffled=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None)
def test_a_token_depends_on_no_neighbour_and_no_order(params, vocab_size, seed, shuffled):
    """Exact, logprobs included: the whole batch, the batch in another order, and every row alone."""
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal((len(params), vocab_size)) * 3).astype(np.float32)
    sampler = Sampler()
    sampler.add(
        NewSequence(seq_id=i, params=one, seed=seed + i, prompt_token_ids=[i, 3, 5])
        for i, one in enumerate(params)
    )
    specs = [SampleSpec(i, 4 * i) for i in range(len(params))]
    together = sampler.sample(logits, specs=specs)
    order = list(range(len(params)))
    shuffled.shuffle(order)
    again = sampler.sample(logits[order], specs=[specs[i] for i in order])
    alone = [sampler.sample(logits[i : i + 1], specs=[specs[i]])[0] for i in range(len(params))]
    assert [again[order.index(i)] for i in range(len(params))] == together == alone
