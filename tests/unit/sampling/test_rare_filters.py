"""typical_p, top_n_sigma, XTC, mirostat, DRY, bad words, allowed ids: each against its definition or transformers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.params import SamplingParams
from penstock.engine.sampling.rare_filters import draw_rare
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.sampling.token_history import dry_penalties
from penstock.engine.scheduler.plan import (
    ForcedTokens,
    NewSequence,
    SampledToken,
    SampleSpec,
    SequenceFailure,
)

processors = pytest.importorskip("transformers.generation.logits_process")
NUM_QUANTILES = 4000
VOCAB = 60


def row_of(seed, *, vocab=VOCAB, scale=2.5):
    return (np.random.default_rng(seed).standard_normal(vocab) * scale).astype(np.float32)


def shares(row, params, *, xtc_uniform=1.0, max_surprise=math.inf):
    """How much of the quantiles each token gets."""
    counts = np.zeros(len(row))
    for quantile in (np.arange(NUM_QUANTILES) + 0.5) / NUM_QUANTILES:
        drawn = draw_rare(
            row, params=params, uniform=quantile, xtc_uniform=xtc_uniform, max_surprise=max_surprise
        )
        counts[drawn.token_id] += 1
    return counts / NUM_QUANTILES


def close(got, expected):
    """A share is exact to one quantile on either side."""
    np.testing.assert_allclose(got, expected, atol=2 / NUM_QUANTILES)


@pytest.mark.parametrize("mass", [0.2, 0.7, 0.95])
@pytest.mark.parametrize("temperature", [0.6, 1.3])
def test_typical_sampling_equals_transformers(mass, temperature):
    row = row_of(int(mass * 100))
    scores = processors.TemperatureLogitsWarper(temperature)(None, torch.tensor(row)[None])
    expected = processors.TypicalLogitsWarper(mass)(None, scores)[0].softmax(-1).numpy()
    close(shares(row, SamplingParams(temperature=temperature, typical_p=mass)), expected)


def test_the_usual_filters_mean_the_same_beside_a_rare_one():
    row, chain = row_of(5), torch.tensor(row_of(5))[None]
    for processor in (
        processors.TemperatureLogitsWarper(0.8),
        processors.TopKLogitsWarper(30),
        processors.TypicalLogitsWarper(0.9),
        processors.TopPLogitsWarper(0.8),
        processors.MinPLogitsWarper(0.05),
    ):
        chain = processor(torch.zeros((1, 1), dtype=torch.long), chain)
    params = SamplingParams(temperature=0.8, top_k=30, typical_p=0.9, top_p=0.8, min_p=0.05)
    close(shares(row, params), chain[0].softmax(-1).numpy())


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.5])
def test_top_n_sigma_keeps_what_is_within_n_deviations_of_the_highest_logit(sigma):
    row = row_of(7)
    kept = row >= row.max() - sigma * row.astype(np.float64).std()
    assert 1 < kept.sum() < VOCAB or sigma == 0.5
    weights = np.where(kept, np.exp((row - row.max()) / 1.5), 0)
    close(shares(row, SamplingParams(temperature=1.5, top_n_sigma=sigma)), weights / weights.sum())


def test_xtc_leaves_only_the_least_likely_of_the_top_choices():
    row = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05], np.float32))
    params = SamplingParams(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.12)
    close(shares(row, params, xtc_uniform=0.49), np.array([0, 0, 0.15, 0.1, 0.05]) / 0.3)
    close(shares(row, params, xtc_uniform=0.5), np.exp(row))
    alone = SamplingParams(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.35)
    close(shares(row, alone, xtc_uniform=0.0), np.exp(row))


def test_xtc_acts_as_often_as_it_is_asked_to():
    sampler, num = Sampler(), 2000
    params = SamplingParams(temperature=1.0, xtc_probability=0.3, xtc_threshold=0.19)
    sampler.add([NewSequence(seq_id=1, params=params, seed=99, prompt_token_ids=[0])])
    row = np.log(np.array([[0.5, 0.3, 0.2]], np.float32))
    drawn = [sampler.sample(row, specs=[SampleSpec(1, index)])[0].token_id for index in range(num)]
    acted = 0.3  # then token 2 comes for sure, else with 0.2
    expected = acted + (1 - acted) * 0.2
    assert drawn.count(2) / num == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / num))


@pytest.mark.parametrize("mode", [1, 2])
def test_mirostat_steers_the_mean_surprise_to_tau(mode):
    """The law that its authors state; version 1 estimates and is less exact."""
    tau, rng, sampler = 3.0, np.random.default_rng(3), Sampler()
    params = SamplingParams(temperature=1.0, mirostat=mode, mirostat_tau=tau, mirostat_eta=0.1)
    sampler.add([NewSequence(seq_id=1, params=params, seed=5, prompt_token_ids=[0])])
    zipf = -1.1 * np.log(np.arange(1, 2001))
    surprises = []
    for index in range(800):
        row = (zipf + rng.normal(size=2000) * 0.3).astype(np.float32)[None]
        (token,) = sampler.sample(row, specs=[SampleSpec(1, index)])
        surprises.append(sampler._states[1].last_surprise)
        sampler.commit([token])
    assert np.mean(surprises[200:]) == pytest.approx(tau, abs=0.15 if mode == 2 else 0.6)


def test_mirostat_two_bounds_each_surprise():
    row = row_of(11)
    probs = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
    expected = np.where(-np.log2(probs) <= 3.0, probs, 0)
    params = SamplingParams(temperature=1.0, mirostat=2)
    close(shares(row, params, max_surprise=3.0), expected / expected.sum())
    assert shares(row, params, max_surprise=-5.0)[row.argmax()] == 1


def dry_by_definition(history, params, breakers):
    """Every token, every suffix, by hand."""
    if params.dry_penalty_last_n >= 0:
        history = history[len(history) - min(params.dry_penalty_last_n, len(history)) :]
    found = {}
    for place in range(1, len(history)):
        length = 0
        while (
            length < place
            and history[place - 1 - length] == history[-1 - length]
            and history[-1 - length] not in breakers
        ):
            length += 1
        token = history[place]
        if length >= params.dry_allowed_length and token not in breakers:
            found[token] = max(found.get(token, 0), length)
    return {
        token: params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
        for token, length in found.items()
    }


@given(
    history=st.lists(st.integers(0, 4), min_size=1, max_size=40),
    breakers=st.sets(st.integers(0, 4), max_size=2),
    allowed=st.integers(1, 4),
    last_n=st.sampled_from([-1, 0, 3, 10]),
)
@settings(max_examples=200, derandomize=True)
def test_dry_penalises_what_its_definition_says(history, breakers, allowed, last_n):
    params = SamplingParams(dry_multiplier=0.8, dry_allowed_length=allowed, dry_penalty_last_n=last_n)
    got = dry_penalties(np.array(history), params=params, breakers=breakers)
    assert got == pytest.approx(dry_by_definition(history, params, breakers))


def test_a_very_long_repetition_has_a_finite_penalty():
    params = SamplingParams(dry_multiplier=100.0, dry_base=8.0)
    (penalty,) = dry_penalties(np.zeros(5000, np.int64), params=params, breakers=()).values()
    assert math.isfinite(penalty)


def draws_of(sampler, params, *, row, history, prompt=(0,), **rules):
    """Three tokens of `history` are committed, then one is drawn greedily."""
    greedy = SamplingParams(temperature=0.0, **params)
    sampler.add([NewSequence(seq_id=1, params=greedy, seed=1, prompt_token_ids=list(prompt), **rules)])
    sampler.commit([SampledToken(1, token) for token in history])
    return sampler.sample(row[None], specs=[SampleSpec(1, len(history))])[0]


def test_bad_words_ban_the_token_that_would_complete_them(every_sampler):
    row = np.array([0, 5, 4, 3], np.float32)
    for history, token in (([2], 1), ([3], 2), ([2, 3], 2), ([3, 2], 1)):
        drawn = draws_of(Sampler(), {}, row=row, history=history, banned_sequences=((3, 1), (9, 9, 2)))
        assert drawn.token_id == token
    assert draws_of(Sampler(), {}, row=row, history=[], banned_sequences=((1,),)).token_id == 2


def test_a_bad_word_that_began_in_the_prompt_is_no_bad_word(every_sampler):
    row = np.array([0, 5, 4, 3], np.float32)
    drawn = draws_of(Sampler(), {}, row=row, history=[], prompt=(3,), banned_sequences=((3, 1),))
    assert drawn.token_id == 1


def test_no_token_but_the_allowed_ones_comes(every_sampler):
    row = row_of(3, vocab=100)
    allowed = (1, 31, 32, 63, 64, 99)
    drawn = draws_of(Sampler(), {"allowed_token_ids": allowed}, row=row, history=[])
    assert drawn.token_id == max(allowed, key=lambda token: row[token])
    for token in allowed:
        only = draws_of(Sampler(), {"allowed_token_ids": (token,)}, row=row, history=[])
        assert only.token_id == token


def test_allowed_tokens_and_a_grammars_mask_both_hold(every_sampler):
    sampler, row = Sampler(), row_of(3, vocab=64)
    params = SamplingParams(temperature=0.0, allowed_token_ids=(5, 6, 40))
    sampler.add([NewSequence(seq_id=1, params=params, seed=1, prompt_token_ids=[0])])
    mask = np.array([1 << 6, 0], np.int32)
    assert sampler.sample(row[None], specs=[SampleSpec(1, 0)], masks=[mask])[0].token_id == 6
    none = sampler.sample(row[None], specs=[SampleSpec(1, 0)], masks=[np.array([1 << 7, 0], np.int32)])[0]
    assert isinstance(none, SequenceFailure)
    assert none.code == "no_token_allowed"


def test_dry_changes_a_greedy_choice(every_sampler):
    row = np.array([0, 1, 5, 4.9], np.float32)
    rules = {"dry_multiplier": 1.0, "dry_allowed_length": 1}
    assert draws_of(Sampler(), rules, row=row, history=[1, 2, 1]).token_id == 3
    assert draws_of(Sampler(), {}, row=row, history=[1, 2, 1]).token_id == 2


def test_a_rare_row_changes_nothing_for_its_neighbours(every_sampler):
    rows = np.stack([row_of(seed) for seed in range(4)])
    plain = SamplingParams(temperature=1.0)
    rare = SamplingParams(temperature=1.0, typical_p=0.5, logprobs=2)
    specs = [SampleSpec(index, 0) for index in range(4)]

    def drawn(kinds):
        sampler = Sampler()
        sampler.add(
            NewSequence(seq_id=i, params=kind, seed=i, prompt_token_ids=[0]) for i, kind in enumerate(kinds)
        )
        return sampler.sample(rows, specs=specs)

    mixed, alone = drawn([plain, rare, plain, rare]), drawn([plain] * 4)
    assert [mixed[0], mixed[2]] == [alone[0], alone[2]]
    assert mixed[1].seq_id == 1
    assert len(mixed[1].logprobs.top) == 2


def test_tokens_that_came_without_a_draw_count(every_sampler):
    """A grammar forces tokens; penalties and bad words know them all the same."""
    row, sampler = np.array([0, 5, 4.9, 0], np.float32), Sampler()
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    sampler.add([NewSequence(seq_id=1, params=params, seed=1, prompt_token_ids=[7, 7])])
    assert sampler.sample(row[None], specs=[SampleSpec(1, 0)])[0].token_id == 1
    sampler.commit([SampledToken(1, 3)])
    sampler.commit_forced([ForcedTokens(1, (1, 1))])
    assert sampler.sample(row[None], specs=[SampleSpec(1, 3)])[0].token_id == 2
