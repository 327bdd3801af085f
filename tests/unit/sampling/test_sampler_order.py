"""The sampler's written order: each test has a case where another order, or a neighbour, would show."""

import math

import numpy as np
import pytest

from penstock.core.params import SamplingParams
from penstock.core.text import TokenLogprob
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.plan import NewSequence, SampledToken, SampleSpec, SequenceFailure

pytestmark = pytest.mark.usefixtures("every_sampler")


def new(seq_id, *, seed=0, prompt=(), banned=(), **params):
    return NewSequence(
        seq_id=seq_id,
        params=SamplingParams(**params),
        seed=seed,
        prompt_token_ids=list(prompt),
        banned_until_min_tokens=tuple(banned),
    )


def sample(rows, sequences, *, output_idx=0, masks=None):
    sampler = Sampler()
    sampler.add(sequences)
    logits = np.array(rows, np.float32)
    specs = [SampleSpec(sequence.seq_id, output_idx) for sequence in sequences]
    return sampler.sample(logits, specs=specs, masks=masks)


def token(row, *, output_idx=0, masks=None, **kwargs):
    (outcome,) = sample([row], [new(1, **kwargs)], output_idx=output_idx, masks=masks)
    assert isinstance(outcome, SampledToken)
    return outcome.token_id


def mask(*allowed):
    return np.array([[sum(1 << i for i in allowed)]], np.int32)


def test_greedy_takes_the_highest_logit_and_the_lowest_id_among_equals():
    assert token([1, 5, 5, 0], temperature=0.0) == 1


def test_a_mask_leaves_only_its_tokens():
    assert token([9, 1, 2, 3], temperature=0.0, masks=mask(1, 2)) == 2


def test_end_tokens_are_banned_before_min_tokens_and_allowed_from_then_on():
    kwargs = {"temperature": 0.0, "min_tokens": 2, "max_tokens": 9, "banned": (0,)}
    assert token([9, 1], output_idx=1, **kwargs) == 1
    assert token([9, 1], output_idx=2, **kwargs) == 0


def test_bias_comes_after_bans_and_cannot_undo_them():
    kwargs = {"temperature": 0.0, "min_tokens": 1, "banned": (0,), "logit_bias": {0: 100.0}}
    assert token([9, 1], **kwargs) == 1


def test_bias_comes_before_the_repetition_penalty():
    """2 + 4 = 6, halved is 3 < 3.5; penalised first it would be 1 + 4 = 5 > 3.5."""
    kwargs = {"temperature": 0.0, "prompt": (0,), "repetition_penalty": 2.0, "logit_bias": {0: 4.0}}
    assert token([2, 3.5], **kwargs) == 1


def test_penalties_apply_to_greedy_rows_too():
    assert token([3, 2], temperature=0.0, prompt=(0,), repetition_penalty=2.0) == 1


def test_repetition_reads_prompt_and_answer_presence_and_frequency_the_answer_only():
    sampler = Sampler()
    sampler.add([new(1, temperature=0.0, prompt=(0,), presence_penalty=2.0)])
    logits = np.array([[3, 2, 1.5]], np.float32)
    spec = [SampleSpec(1, 0)]
    (first,) = sampler.sample(logits, specs=spec)
    assert first.token_id == 0, "the prompt's token 0 is not penalised"
    sampler.commit([first])
    (second,) = sampler.sample(logits, specs=spec)
    assert second.token_id == 1, "3 - 2 = 1 is below 2"


def test_frequency_penalty_grows_with_each_committed_token():
    sampler = Sampler()
    sampler.add([new(1, temperature=0.0, frequency_penalty=1.0)])
    logits = np.array([[2.5, 0]], np.float32)
    tokens = []
    for _ in range(5):
        outcomes = sampler.sample(logits, specs=[SampleSpec(1, len(tokens))])
        sampler.commit(outcomes)
        tokens.append(outcomes[0].token_id)
    assert tokens == [0, 0, 0, 1, 0]  # 2.5, 1.5, 0.5, -0.5 < 0, then -0.5 > -1


def test_sampling_changes_neither_logits_nor_states_so_it_can_be_repeated():
    sampler = Sampler()
    sampler.add(
        [new(1, seed=5, logit_bias={0: 1.0}, repetition_penalty=1.5, prompt=(1,), frequency_penalty=1.0)]
    )
    logits = np.array([[1, 2, 3, 4]], np.float32)
    before = logits.copy()
    spec = [SampleSpec(1, 7)]
    assert sampler.sample(logits, specs=spec) == sampler.sample(logits, specs=spec)
    assert (logits == before).all()


def test_counts_beyond_the_first_capacity_are_all_penalised():
    sampler = Sampler()
    sampler.add([new(1, temperature=0.0, presence_penalty=2.0)])
    sampler.commit([SampledToken(1, i) for i in range(100)])
    logits = np.zeros((1, 101), np.float32)
    (outcome,) = sampler.sample(logits, specs=[SampleSpec(1, 100)])
    assert outcome.token_id == 100


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_row_with_a_number_that_is_not_finite_fails_alone_and_its_neighbours_do_not_change(bad):
    rows = [[1.0, 2, 3], [1, bad, 3], [3, 2, 1]]
    sequences = [new(i, seed=i, top_p=0.9) for i in range(3)]
    first, failed, last = sample(rows, sequences)
    assert (failed.seq_id, failed.code) == (1, "numerical_error")
    assert [first] == sample(rows[:1], sequences[:1])
    assert [last] == sample(rows[2:], sequences[2:])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_in_which_no_token_is_allowed_fails_by_name(temperature):
    outcomes = sample([[1, 2]], [new(1, temperature=temperature)], masks=mask())
    assert isinstance(outcomes[0], SequenceFailure)
    assert outcomes[0].code == "no_token_allowed"


def test_logprobs_are_of_the_raw_logits_whatever_penalties_and_temperature_do():
    row = [2.0, 1.0, 1.0, 0.0]
    (outcome,) = sample([row], [new(1, temperature=0.0, prompt=(0,), repetition_penalty=9.0, logprobs=3)])
    log_total = math.log(sum(math.exp(x) for x in row))
    assert outcome.token_id == 1
    assert outcome.logprobs.sampled == TokenLogprob(1, pytest.approx(1 - log_total, abs=1e-6), 2)
    assert [(top.token_id, top.rank) for top in outcome.logprobs.top] == [(0, 1), (1, 2), (2, 3)]
    assert [top.logprob for top in outcome.logprobs.top] == pytest.approx(
        [2 - log_total] + 2 * [1 - log_total], abs=1e-6
    )


def test_rank_of_the_sampled_token_counts_lower_ids_among_equals_first():
    (outcome,) = sample([[5, 1, 1, 1]], [new(1, temperature=0.0, logprobs=0, logit_bias={3: 10.0})])
    assert (outcome.logprobs.sampled.rank, outcome.logprobs.top) == (4, ())


def test_logprobs_are_none_where_nobody_asked():
    (outcome,) = sample([[1, 2]], [new(1)])
    assert outcome.logprobs is None


def test_a_forgotten_sequence_leaves_nothing_behind():
    sampler = Sampler()
    sampler.add([new(1, prompt=range(1000), repetition_penalty=2.0), new(2)])
    assert (sampler.num_sequences, sampler.num_bytes) == (2, 8000)
    sampler.forget([1, 2, 99])
    assert (sampler.num_sequences, sampler.num_bytes) == (0, 0)


def test_a_prompt_is_not_kept_where_no_penalty_reads_it():
    sampler = Sampler()
    sampler.add([new(1, prompt=range(1000), presence_penalty=1.0)])
    assert sampler.num_bytes == 0


def test_specs_may_share_a_row_and_leave_rows_out():
    sampler = Sampler()
    sampler.add(
        [new(1, temperature=0.0), new(2, temperature=0.0, logit_bias={0: 9.0}), new(3, temperature=0.0)]
    )
    logits = np.array([[1, 2], [math.nan, 0], [4, 3]], np.float32)
    outcomes = sampler.sample(
        logits, specs=[SampleSpec(1, 0), SampleSpec(2, 0), SampleSpec(3, 0)], rows=[0, 0, 2]
    )
    assert [outcome.token_id for outcome in outcomes] == [1, 0, 0]


def test_an_id_outside_the_vocabulary_raises_and_is_drawn_by_nobody():
    with pytest.raises(IndexError):
        sample([[1, 2]], [new(1, logit_bias={2: 1.0})])


def test_no_specs_give_no_tokens():
    assert Sampler().sample(np.zeros((0, 5), np.float32), specs=[]) == []
