"""The native passes and numpy's draw the same tokens from the same seeds, whatever the parameters.

Examples are fixed: a uniform number within a rounding of a border may fall to either side (see
`native_sampler`), about once in 100,000 draws.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.params import SamplingParams
from penstock.engine.sampling.native_sampler import NativeSampler
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.plan import NewSequence, SampledToken, SampleSpec
from penstock.kernels.cpu import _native

SAMPLERS = {
    (isa, threads): NativeSampler(_native.Pool(threads, [], 0), isa=isa)
    for isa in _native.supported_isas()
    for threads in (1, 2)
}

VOCABS = [1, 2, 7, 31, 32, 33, 100, 1000, 8192, 8193, 20000, 70001]
"""Below and above the columns of 32, the strips of every instruction set, the whole-row nucleus, the sampled border."""


def maybe(values):
    return st.one_of(st.none(), st.sampled_from(values))


@st.composite
def params(draw):
    chosen = {
        "temperature": draw(st.sampled_from([0.0, 0.3, 1.0, 1.7])),
        "top_k": draw(maybe([-1, 1, 5, 50, 200, 3000])),
        "top_p": draw(maybe([0.05, 0.5, 0.9, 0.99])),
        "min_p": draw(maybe([0.001, 0.1, 1.0])),
        "repetition_penalty": draw(maybe([0.7, 1.3])),
        "presence_penalty": draw(maybe([1.0, -1.0])),
        "frequency_penalty": draw(maybe([0.3])),
        "logprobs": draw(maybe([0, 1, 5, 20])),
    }
    return SamplingParams(**{name: value for name, value in chosen.items() if value is not None})


def logits_of(rng, *, num_rows, vocab):
    rows = (rng.normal(size=(num_rows, vocab)) * rng.choice([0.1, 2, 8])).astype(np.float32)
    if rng.random() < 0.3:
        rows = np.round(rows)
    rows[rng.random(rows.shape) < rng.choice([0, 0.5])] = -np.inf
    rows[:, rng.integers(vocab)] = 1.0
    return rows


def outcomes(sampler, sequences, *, logits, masks):
    vocab = logits.shape[1]
    sampler.add(sequences)
    sampler.commit([SampledToken(seq.seq_id, token) for seq in sequences for token in (0, vocab // 2, 0)])
    return sampler.sample(logits, specs=[SampleSpec(seq.seq_id, 3) for seq in sequences], masks=masks)


def without_logprobs(outcome):
    return (outcome.seq_id, outcome.token_id) if isinstance(outcome, SampledToken) else outcome


def assert_same_logprobs(one, other):
    if not isinstance(one, SampledToken) or one.logprobs is None:
        return
    first, second = [one.logprobs.sampled, *one.logprobs.top], [other.logprobs.sampled, *other.logprobs.top]
    assert [(top.token_id, top.rank) for top in first] == [(top.token_id, top.rank) for top in second]
    assert [top.logprob for top in first] == pytest.approx([top.logprob for top in second], abs=1e-5)


@given(
    mixed=st.lists(params(), min_size=1, max_size=6),
    vocab=st.sampled_from(VOCABS),
    seed=st.integers(0, 2**32),
    has_masks=st.booleans(),
    home=st.sampled_from(list(SAMPLERS)),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_same_tokens_failures_and_logprobs(mixed, vocab, seed, has_masks, home):
    rng = np.random.default_rng(seed)
    logits = logits_of(rng, num_rows=len(mixed), vocab=vocab)
    masks = None
    if has_masks:
        shape = (len(mixed), -(-vocab // 32))
        words = rng.integers(-(2**31), 2**31, size=shape, dtype=np.int64).astype(np.int32)
        masks = [mask if seed + row & 1 else None for row, mask in enumerate(words)]
    sequences = [
        NewSequence(
            seq_id=i,
            params=each,
            seed=seed + i,
            prompt_token_ids=rng.integers(0, vocab, 20).tolist(),
            banned_until_min_tokens=(0,),
        )
        for i, each in enumerate(mixed)
    ]
    before = logits.copy()
    expected = outcomes(Sampler(), sequences, logits=logits, masks=masks)
    found = outcomes(Sampler(native=SAMPLERS[home]), sequences, logits=logits, masks=masks)
    assert np.array_equal(logits, before)
    assert [without_logprobs(each) for each in found] == [without_logprobs(each) for each in expected]
    for one, other in zip(found, expected, strict=True):
        assert_same_logprobs(one, other)
