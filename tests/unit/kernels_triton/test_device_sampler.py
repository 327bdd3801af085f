"""The sampler on the device, interpreted: the tokens that numpy draws, for every kind of draw it serves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.params import SamplingParams
from penstock.engine.sampling import sampler as numpy_sampler
from penstock.engine.sampling.device import TritonSampler
from penstock.engine.sampling.fast import DrawStatus, draws_of_table
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.sampling.uniform import uniforms
from penstock.engine.scheduler.plan import ForcedTokens, NewSequence, SampledToken, SampleSpec

NEAR = 1e-5
"""Of the mass beside a border, as `native` says: there float32 rounds differently."""
STATUS = {
    "numerical_error": DrawStatus.NOT_FINITE,
    "no_token_allowed": DrawStatus.NONE_ALLOWED,
}


def sampler_of(all_params, *, prompt=(), seed=0):
    sampler = Sampler()
    sampler.add(
        NewSequence(
            seq_id=i,
            params=SamplingParams(**params),
            seed=seed + i,
            prompt_token_ids=list(prompt),
            banned_until_min_tokens=(3, 5) if params.get("min_tokens") else (),
        )
        for i, params in enumerate(all_params)
    )
    return sampler


def on_device(sampler, logits, *, num, rows=None, output_idx=0, masks=None):
    """[(status, token id, logprobs)] of the sequences 0 to num - 1."""
    states = [sampler.state(i) for i in range(num)]
    table = TritonSampler().draw(
        logits if isinstance(logits, torch.Tensor) else torch.from_numpy(logits),
        rows=list(range(num)) if rows is None else rows,
        states=states,
        output_idxs=[output_idx] * num,
        masks=masks,
    )
    found = draws_of_table(table.numpy(), num_top=[state.params.logprobs for state in states])
    return list(zip(found.statuses, found.token_ids, found.logprobs, strict=True))


def by_numpy(sampler, logits, *, num, rows=None, output_idx=0, masks=None):
    specs = [SampleSpec(i, output_idx) for i in range(num)]
    return sampler.sample(logits, specs=specs, rows=rows, masks=masks)


def neighbours(monkeypatch, sampler, logits, **kwargs):
    """For each draw the tokens at both ends of the stretch of its uniform number that may round either way."""
    both = []
    for shift in (-NEAR, NEAR):

        def shifted(seeds, *, output_idxs, shift=shift):
            return np.clip(uniforms(seeds, output_idxs=output_idxs) + shift, 0.0, 1.0 - 2**-53)

        monkeypatch.setattr(numpy_sampler, "uniforms", shifted)
        both.append([getattr(each, "token_id", None) for each in by_numpy(sampler, logits, **kwargs)])
        monkeypatch.undo()
    return list(zip(*both, strict=True))


def check(monkeypatch, sampler, logits, **kwargs):
    """Token for token, failure for failure, logprob for logprob."""
    wanted = by_numpy(sampler, logits, **kwargs)
    near = neighbours(monkeypatch, sampler, logits, **kwargs)
    for (status, token_id, logprobs), want, others in zip(
        on_device(sampler, logits, **kwargs), wanted, near, strict=True
    ):
        if not isinstance(want, SampledToken):
            assert status == STATUS[want.kind]
            continue
        assert status == DrawStatus.DRAWN
        assert token_id in (want.token_id, *others)
        if token_id == want.token_id and want.logprobs is not None:
            assert logprobs.sampled.rank == want.logprobs.sampled.rank
            assert [each.token_id for each in logprobs.top] == [each.token_id for each in want.logprobs.top]
            both = zip(
                (logprobs.sampled, *logprobs.top), (want.logprobs.sampled, *want.logprobs.top), strict=True
            )
            for got, told in both:
                assert got.logprob == pytest.approx(told.logprob, abs=1e-5)


PARAMS = st.fixed_dictionaries(
    {"temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7])},
    optional={
        "top_k": st.sampled_from([1, 3, 40, 150, 250, 5000]),
        "top_p": st.sampled_from([0.03, 0.61, 0.97]),
        "min_p": st.sampled_from([0.013, 0.31, 1.0]),
        "repetition_penalty": st.sampled_from([0.7, 1.4]),
        "presence_penalty": st.sampled_from([-1.5, 0.7]),
        "frequency_penalty": st.sampled_from([-0.3, 1.1]),
        "logit_bias": st.sampled_from([{3: 7.0, 199: -100.0}, {0: -3.0}]),
        "min_tokens": st.just(4),
        "logprobs": st.sampled_from([0, 1, 7]),
    },
)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    all_params=st.lists(PARAMS, min_size=4, max_size=4),
    vocab=st.sampled_from([200, 333, 1000]),
    seed=st.integers(0, 2**31),
    grid=st.sampled_from([0.0, 1.0]),
)
def test_any_parameters_draw_what_numpy_draws(all_params, vocab, seed, grid):
    """Also where logits are whole numbers, so that equals lie at every border; with some tokens committed."""
    rng = np.random.default_rng(seed)
    logits = (rng.normal(size=(4, vocab)) * 3).astype(np.float32)
    logits = np.round(logits) if grid else logits
    sampler = sampler_of(all_params, prompt=[1, 7, 7, 190], seed=seed)
    sampler.commit(SampledToken(i, token, None) for i in range(4) for token in (2, 2, i, 190))
    mask = rng.integers(-(2**31), 2**31, -(-vocab // 32)).astype(np.int32)
    with pytest.MonkeyPatch.context() as patch:
        check(patch, sampler, logits, num=4, output_idx=3, masks=[None, mask, None, mask])
