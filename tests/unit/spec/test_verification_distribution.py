"""Tokens behind drafts have the model's distribution: by frequency, against exact probabilities."""

import numpy as np

from penstock.core.ids import SequenceId
from penstock.core.params import SamplingParams
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.plan import NewSequence, SampledToken, SampleSpec
from penstock.engine.spec.verify import DraftRun, Draw, verify

VOCAB = 4
NUM_ANSWERS = 4000
FIRST = np.log(np.array([0.1, 0.5, 0.15, 0.25]))
NEXT = np.log(
    np.array([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1], [0.25, 0.25, 0.25, 0.25], [0.4, 0.3, 0.2, 0.1]])
)
LIMIT = 42.0
"""Chi-square with 15 degrees of freedom exceeds it with a chance of 2 in 10,000; the seeds are fixed."""


def pair_of_tokens(sampler: Sampler, seq_id: SequenceId, *, draft: int, is_free: bool) -> tuple[int, int]:
    """Two tokens of a model that knows its last token, the second verified behind a draft or drawn later."""
    logits = np.stack([FIRST, NEXT[draft]]).astype(np.float32)

    def draw(draws):
        return sampler.sample(logits[[each.row for each in draws]], specs=[each.spec for each in draws])

    run = DraftRun(first=Draw(spec=SampleSpec(seq_id, 0), row=0), drafts=[draft], is_free_of_history=is_free)
    tokens = [each.token_id for each in verify([run], draw=draw, commit=sampler.commit)]
    if len(tokens) == 1:
        row = NEXT[tokens[0] : tokens[0] + 1].astype(np.float32)
        (second,) = sampler.sample(row, specs=[SampleSpec(seq_id, 1)])
        assert isinstance(second, SampledToken)
        tokens.append(second.token_id)
    return tokens[0], tokens[1]


def test_pairs_behind_right_and_wrong_drafts_have_the_exact_frequencies():
    exact = np.exp(FIRST)[:, None] * np.exp(NEXT)
    for draft in (1, 2):
        sampler = Sampler()
        counts = np.zeros((VOCAB, VOCAB))
        for idx in range(NUM_ANSWERS):
            seq_id = SequenceId(idx)
            sampler.add(
                [NewSequence(seq_id=seq_id, params=SamplingParams(), seed=7 * idx, prompt_token_ids=[0])]
            )
            counts[pair_of_tokens(sampler, seq_id, draft=draft, is_free=idx % 2 == 0)] += 1
        expected = NUM_ANSWERS * exact
        assert ((counts - expected) ** 2 / expected).sum() < LIMIT


def test_a_draft_stands_exactly_if_it_is_what_is_drawn():
    """Half of the guesses of token 1 stand, since its probability is a half; with history and without."""
    for is_free in (True, False):
        sampler = Sampler()
        num_right = 0
        for idx in range(NUM_ANSWERS):
            seq_id = SequenceId(idx)
            sampler.add([NewSequence(seq_id=seq_id, params=SamplingParams(), seed=idx, prompt_token_ids=[0])])
            num_right += pair_of_tokens(sampler, seq_id, draft=1, is_free=is_free)[0] == 1
        assert abs(num_right / NUM_ANSWERS - 0.5) < 0.03
