"""The same kept sets and altered logits as the processors of transformers."""

import numpy as np
import pytest
import torch

from penstock.core.params import SamplingParams
from penstock.engine.sampling.draw import DrawParams, draw
from penstock.engine.sampling.sampler import alter_row
from penstock.engine.sampling.sequence_state import SequenceState
from penstock.engine.scheduler.plan import NewSequence

processors = pytest.importorskip("transformers.generation.logits_process")


def oracle_kept(row, *, temperature, top_k, top_p, min_p):
    scores = torch.tensor(row)[None]
    ids = torch.zeros((1, 1), dtype=torch.long)
    chain = [processors.TemperatureLogitsWarper(temperature)]
    if top_k:
        chain.append(processors.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(processors.TopPLogitsWarper(top_p))
    if min_p:
        chain.append(processors.MinPLogitsWarper(min_p))
    for processor in chain:
        scores = processor(ids, scores)
    return scores[0].softmax(-1).numpy()


@pytest.mark.parametrize("vocab_size", [50, 300, 9000])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p", "min_p"),
    [
        (0.7, 0, 0.9, 0.0),
        (1.0, 20, 1.0, 0.0),
        (1.4, 0, 1.0, 0.07),
        (0.8, 40, 0.85, 0.0),
        (1.2, 45, 0.95, 0.05),
    ],
)
def test_draws_at_every_quantile_are_those_of_the_warped_distribution(
    vocab_size, temperature, top_k, top_p, min_p
):
    """A CDF over any order of the kept tokens gives each the share of quantiles that is its probability."""
    rng = np.random.default_rng(vocab_size)
    row = (rng.standard_normal(vocab_size) * 3).astype(np.float32)
    shares = oracle_kept(row, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    n = 4000
    logits = np.broadcast_to(row, (n, vocab_size))[:: 1 if vocab_size < 1000 else 10]
    n = len(logits)
    params = DrawParams(
        temperatures=np.full(n, temperature),
        top_k=np.full(n, top_k),
        top_p=np.full(n, top_p),
        min_p=np.full(n, min_p),
        uniforms=(np.arange(n) + 0.5) / n,
    )
    logits = np.ascontiguousarray(logits)
    tokens = draw(logits, highest=logits.max(axis=1), params=params)
    found = np.bincount(tokens, minlength=vocab_size) / n
    assert np.abs(found - shares).max() < 1.5 / n + 1e-5
    assert (found[shares == 0] == 0).all()


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_the_repetition_penalty_is_theirs(penalty):
    rng = np.random.default_rng(1)
    row = (rng.standard_normal(60) * 3).astype(np.float32)
    prompt, answer = [3, 5, 5, 8], [8, 9, 9, 50]
    state = SequenceState(
        NewSequence(
            seq_id=1,
            params=SamplingParams(repetition_penalty=penalty),
            seed=0,
            prompt_token_ids=prompt,
        )
    )
    for token_id in answer:
        state.commit(token_id)
    theirs = processors.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([prompt + answer]), torch.tensor(row)[None]
    )
    alter_row(row, state=state, output_idx=len(answer))
    np.testing.assert_allclose(row, theirs[0].numpy(), rtol=1e-6)
