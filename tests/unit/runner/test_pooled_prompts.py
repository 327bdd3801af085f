"""Vectors of prompts: sums over chunks, one fault in one request, nothing kept of what has ended."""

import math

import pytest
import torch
from fake_model import make_runner

from penstock.core.tokens import Pooling
from penstock.engine.runner.pooling import PoolPart, Pools
from penstock.engine.scheduler.plan import ScheduledSequence, StepPlan

pytestmark = pytest.mark.usefixtures("is_queued")

PROMPT = [3, 5, 2, 7, 1, 4]
CUMULATED = torch.tensor([4.0, 10.0, 13.0, 21.0, 23.0, 28.0])
"""Third number of each hidden state: sums of token + 1."""


def entry(seq_id, tokens, start, pooling):
    return ScheduledSequence(seq_id, tokens, start, ([2 * seq_id, 2 * seq_id + 1],), pooling=pooling)


def run(runner, *entries, finished=()):
    plan = StepPlan(step_id=0, sequences=list(entries), finished_seq_ids=list(finished))
    return runner.collect(runner.launch(plan))


def whole_mean():
    rows = torch.stack([torch.tensor(PROMPT), torch.arange(6), CUMULATED, torch.ones(6)], dim=1)
    return tuple(rows.mean(dim=0).tolist())


@pytest.mark.parametrize("cuts", [(6,), (2, 6), (1, 2, 3, 6)])
def test_a_mean_is_the_same_in_one_chunk_or_in_several(cuts):
    runner, _ = make_runner()
    start = 0
    for end in cuts:
        result = run(runner, entry(0, PROMPT[start:end], start, Pooling("mean")))
        start = end
    (pooled,) = result.pooled
    assert pooled.values == pytest.approx(whole_mean())


def test_last_and_logits_are_of_the_last_row_and_need_no_sample():
    runner, _ = make_runner()
    result = run(
        runner,
        entry(0, PROMPT, 0, Pooling("last")),
        entry(1, PROMPT, 0, Pooling("logits", (12, 0))),
        entry(2, PROMPT, 0, None),
    )
    last, logits = result.pooled
    assert last.values == (4.0, 5.0, 28.0, 1.0)
    assert logits.values == pytest.approx((4.0 - 0.12, 0.0), abs=1e-6)  # 28 % 16 = 12 is the favourite
    assert (result.tokens, result.failures) == ([], [])


def test_a_prompt_that_is_computed_again_starts_a_new_sum():
    """As after a preemption."""
    runner, _ = make_runner()
    run(runner, entry(0, PROMPT[:4], 0, Pooling("mean")))
    (pooled,) = run(runner, entry(0, PROMPT, 0, Pooling("mean"))).pooled
    assert pooled.values == pytest.approx(whole_mean())


def test_what_has_ended_is_forgotten():
    runner, _ = make_runner()
    before = runner.buffer_bytes
    pools = runner._pools
    run(runner, entry(0, PROMPT, 0, Pooling("mean")))
    assert pools.num_bytes == 16
    run(runner, entry(1, PROMPT, 0, None), finished=[0])
    assert pools.num_bytes == 0
    assert runner.buffer_bytes >= before


def test_a_chunk_after_one_that_failed_gives_nothing():
    pools = Pools()
    part = PoolPart(seq_id=0, start=4, num_tokens=2, is_sum=True, values=torch.ones(3))
    assert pools.take(part) is None
    assert pools.num_bytes == 0


def test_numbers_that_are_not_finite_end_their_request_alone():
    """Of the hidden states, and of the head over hidden states that are finite."""
    runner, model = make_runner()
    forward, head = model.forward, model.logits

    def bad_forward(batch):
        hidden = forward(batch)
        hidden[2, 0] = math.nan
        return hidden

    def bad_head(hidden):
        logits = head(hidden)
        logits[hidden[:, 0] == 9] = math.inf
        return logits

    model.forward, model.logits = bad_forward, bad_head
    result = run(
        runner,
        entry(0, PROMPT, 0, Pooling("mean")),
        entry(1, [1, 2, 9], 0, Pooling("logits", (3,))),
        entry(2, [1, 2, 4], 0, Pooling("logits", (3,))),
        entry(3, PROMPT, 0, Pooling("mean")),
    )
    assert {failure.seq_id: failure.code for failure in result.failures} == {
        0: "numerical_error",
        1: "numerical_error",
    }
    assert [pooled.seq_id for pooled in result.pooled] == [2, 3]
    assert result.pooled[1].values == pytest.approx(whole_mean())
