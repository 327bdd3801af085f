"""Plans through the runner on the fake model: its token is (sum of `token + 1` so far) mod 16."""

import numpy as np
import pytest
from fake_model import VOCAB, make_runner

from penstock.core.params import SamplingParams
from penstock.engine.runner.rank_group import LocalRank
from penstock.engine.scheduler.plan import BlockCopy, NewSequence, SampleSpec, ScheduledSequence, StepPlan

pytestmark = pytest.mark.usefixtures("is_queued")

GREEDY = SamplingParams(temperature=0.0)


def new(seq_id, params=GREEDY, *, seed=0, prompt=()):
    return NewSequence(seq_id=seq_id, params=params, seed=seed, prompt_token_ids=list(prompt))


def seq(seq_id, token_ids, start, table, *, sample=True, specs=None):
    samples = specs if specs is not None else ((SampleSpec(seq_id, 0),) if sample else ())
    return ScheduledSequence(seq_id, token_ids, start, (table,), tuple(samples))


def run(runner, *sequences, masks=None, **plan):
    return runner.collect(runner.launch(StepPlan(step_id=1, sequences=list(sequences), **plan)), masks=masks)


def tokens(result):
    assert not result.failures
    return {token.seq_id: token.token_id for token in result.tokens}


def test_a_step_answers_every_sample_in_plan_order_with_its_step_id_and_time():
    runner, _ = make_runner()
    result = run(runner, seq(2, [1, 2], 0, [4]), seq(1, [5], 0, [3]), new_sequences=[new(1), new(2)])
    assert [(t.seq_id, t.token_id, t.logprobs) for t in result.tokens] == [(2, 5, None), (1, 6, None)]
    assert result.step_id == 1
    assert result.step_time_s > 0


def test_chunked_prefill_and_decode_read_what_earlier_steps_wrote():
    whole, _ = make_runner()
    expected = tokens(run(whole, seq(1, [1, 2, 3, 4, 5, 6], 0, [7, 2]), new_sequences=[new(1)]))
    runner, _ = make_runner()
    first = run(runner, seq(1, [1, 2], 0, [7], sample=False), new_sequences=[new(1)])
    assert (first.tokens, first.failures) == ([], [])
    run(runner, seq(1, [3, 4, 5], 2, [7, 2], sample=False))
    assert tokens(run(runner, seq(1, [6], 5, [7, 2]))) == expected == {1: (6 + 21) % VOCAB}


def test_only_rows_that_are_sampled_reach_the_vocabulary():
    runner, model = make_runner()
    seen = []
    score = model.logits
    model.logits = lambda hidden: seen.append(hidden[:, 1].tolist()) or score(hidden)
    run(runner, seq(1, [1, 2, 3], 0, [1]), seq(2, [9, 9], 0, [2], sample=False), seq(3, [4], 0, [3]),
        new_sequences=[new(1), new(3)])  # fmt: skip
    assert seen == [[2.0, 0.0]], "positions of the two sampled rows"


def test_answers_of_one_prompt_share_its_row_and_draw_by_their_own_seeds():
    runner, _ = make_runner()
    params = SamplingParams(temperature=2.0)
    specs = [SampleSpec(i, 0) for i in range(1, 9)]
    result = run(runner, seq(1, [1, 2], 0, [4], specs=specs),
                 new_sequences=[new(i, params, seed=i) for i in range(1, 9)])  # fmt: skip
    assert [t.seq_id for t in result.tokens] == list(range(1, 9))
    assert len({t.token_id for t in result.tokens}) > 1
    alone, _ = make_runner()
    lonely = run(alone, seq(5, [1, 2], 0, [9]), new_sequences=[new(5, params, seed=5)])
    assert lonely.tokens[0].token_id == result.tokens[4].token_id


def test_blocks_are_zeroed_and_copied_before_the_model_runs():
    runner, _ = make_runner()
    run(runner, seq(1, [1, 2], 0, [4], sample=False))
    forked = run(runner, seq(2, [3], 2, [6]), new_sequences=[new(2)], block_copies=[BlockCopy(4, 6)])
    assert tokens(forked) == {2: 2 + 3 + 4}
    cleared = run(runner, seq(3, [3], 2, [6]), new_sequences=[new(3)], blocks_to_zero=[6])
    assert tokens(cleared) == {3: 4}


def test_the_next_step_may_be_launched_before_this_one_is_collected():
    """Law 3; also the frequency penalty of step 2 counts step 1's token, as collects come in order."""
    runner, _ = make_runner()
    params = SamplingParams(temperature=0.0, frequency_penalty=2.0)
    table = [4]
    first = runner.launch(
        StepPlan(step_id=1, sequences=[seq(1, [4], 0, table)], new_sequences=[new(1, params)])
    )
    table.append(5)
    second = runner.launch(StepPlan(step_id=2, sequences=[seq(2, [4], 0, [9])], new_sequences=[new(2)]))
    assert tokens(runner.collect(first)) == {1: 5}
    assert tokens(runner.collect(second)) == {2: 5}


def test_a_finished_sequence_is_forgotten_and_its_id_is_not_needed_again():
    runner, _ = make_runner()
    run(
        runner,
        seq(1, [4], 0, [1]),
        new_sequences=[new(1, SamplingParams(repetition_penalty=2.0), prompt=[4])],
    )
    held = runner.buffer_bytes
    run(runner, finished_seq_ids=[1])
    assert runner.buffer_bytes < held


def test_a_sequence_that_ends_while_its_step_is_under_way_is_still_sampled_in_it():
    runner, _ = make_runner()
    first = runner.launch(StepPlan(step_id=1, sequences=[seq(1, [4], 0, [4])], new_sequences=[new(1)]))
    second = runner.launch(StepPlan(step_id=2, sequences=[], finished_seq_ids=[1]))
    assert tokens(runner.collect(first)) == {1: 5}
    runner.collect(second)
    assert runner._sampler.num_sequences == 0


class TableOfMasks:
    def __init__(self, tokens):
        self.tokens = tokens

    def row(self, seq_id, *, depth=0):
        return np.array([1 << self.tokens[seq_id]], np.int32) if seq_id in self.tokens else None


def test_a_mask_belongs_to_its_sequence_and_the_others_draw_freely():
    runner, _ = make_runner()
    masks = TableOfMasks({2: 7})
    sequences = [seq(1, [4], 0, [1]), seq(9, [4], 0, [2], sample=False), seq(2, [4], 0, [3])]
    assert tokens(run(runner, *sequences, new_sequences=[new(1), new(2)], masks=masks)) == {1: 5, 2: 7}


def test_a_plan_without_sequences_only_moves_blocks_and_forgets():
    runner, model = make_runner()
    result = run(runner, blocks_to_zero=[3])
    assert (result.tokens, result.failures, model.batches) == ([], [], [])


def test_the_local_rank_is_the_runner_behind_the_rank_group():
    runner, _ = make_runner(num_blocks=10, block_size=4)
    rank = LocalRank(runner)
    rank.warm_up(max_num_seqs=4, max_num_batched_tokens=8, max_model_len=32)
    plan = StepPlan(step_id=3, sequences=[seq(1, [5], 0, [3])], new_sequences=[new(1)])
    assert tokens(rank.collect(rank.launch(plan))) == {1: 6}
    assert rank.buffer_bytes == runner.buffer_bytes > 0
