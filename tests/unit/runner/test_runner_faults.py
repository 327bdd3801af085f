"""One sequence's fault stays with it: NaN, exceptions in the model, exceptions in the sampler."""

import logging
import math

import pytest
import torch
from fake_model import make_runner

from penstock.core.errors import EngineDeadError
from penstock.core.params import SamplingParams
from penstock.engine.bisection import isolate
from penstock.engine.scheduler.plan import BlockCopy, NewSequence, SampleSpec, ScheduledSequence, StepPlan

pytestmark = pytest.mark.usefixtures("is_queued")


class Faults:
    """Scripted faults: which sequences raise where, which rows become NaN."""

    def __init__(self, *, forward=(), sample=(), nan=(), always=False):
        self.forward, self.sample, self.nan, self.always = set(forward), set(sample), set(nan), always
        self.passes = []

    def before_forward(self, seq_ids):
        self.passes.append(list(seq_ids))
        if self.always or self.forward & set(seq_ids):
            raise RuntimeError("no such kernel; prompt: secret")

    def after_logits(self, logits, seq_ids):
        for row, seq_id in enumerate(seq_ids):
            if seq_id in self.nan:
                logits[row, 3] = math.nan

    def before_sample(self, seq_ids):
        if self.sample & set(seq_ids):
            raise IndexError("bad row")


def plan(num_seqs, *, step_id=0, unsampled=(), **kwargs):
    params = SamplingParams(temperature=1.0, logprobs=1)
    return StepPlan(
        step_id=step_id,
        sequences=[
            ScheduledSequence(i, [i, i + 1], 0, ([i],), () if i in unsampled else (SampleSpec(i, 0),))
            for i in range(num_seqs)
        ],
        new_sequences=[
            NewSequence(seq_id=i, params=params, seed=i, prompt_token_ids=[i, i + 1]) for i in range(num_seqs)
        ],
        **kwargs,
    )


def step(faults, num_seqs=8, **kwargs):
    runner, _ = make_runner(faults=faults)
    return runner.collect(runner.launch(plan(num_seqs, **kwargs)))


def codes(result):
    return {failure.seq_id: failure.code for failure in result.failures}


def test_nan_logits_end_their_row_and_leave_the_neighbours_bit_identical():
    clean = step(None)
    result = step(Faults(nan=[2, 5]))
    assert codes(result) == {2: "numerical_error", 5: "numerical_error"}
    assert result.tokens == [token for token in clean.tokens if token.seq_id not in {2, 5}]


def test_nan_in_a_prefill_chunk_is_seen_although_nothing_is_sampled_from_it():
    """Otherwise its full blocks would be in the prefix tree before the last chunk shows the NaN."""
    runner, model = make_runner()
    forward = model.forward

    def poisoned(batch):
        hidden = forward(batch)
        hidden[2, 0] = math.inf  # first row of the second sequence
        return hidden

    model.forward = poisoned
    result = runner.collect(runner.launch(plan(3, unsampled=[1])))
    assert codes(result) == {1: "numerical_error"}
    assert [token.seq_id for token in result.tokens] == [0, 2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_largest_finite_numbers_are_no_numerical_error(dtype):
    """Their sum is infinite in the model's dtype; no single one is."""
    runner, model = make_runner()
    forward = model.forward

    def huge(batch):
        hidden = forward(batch).to(dtype)
        hidden[:, :2] = torch.finfo(dtype).max
        hidden[0, :2] *= -1
        return hidden

    model.forward = huge
    result = runner.collect(runner.launch(plan(3)))
    assert (codes(result), len(result.tokens)) == ({}, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_every_kind_of_bad_number_is_seen(bad):
    runner, model = make_runner()
    forward = model.forward

    def poisoned(batch):
        hidden = forward(batch)
        hidden[2, 1] = bad
        return hidden

    model.forward = poisoned
    assert codes(runner.collect(runner.launch(plan(3)))) == {1: "numerical_error"}


def test_all_answers_that_share_a_failed_row_fail():
    specs = (SampleSpec(0, 0), SampleSpec(7, 0))
    new = [NewSequence(seq_id=i, params=SamplingParams(), seed=i, prompt_token_ids=[1]) for i in (0, 7, 1)]
    sequences = [
        ScheduledSequence(0, [1], 0, ([1],), specs),
        ScheduledSequence(1, [1], 0, ([2],), (SampleSpec(1, 0),)),
    ]
    for faults in (Faults(nan=[0]), Faults(forward=[0])):
        runner, _ = make_runner(faults=faults)
        result = runner.collect(runner.launch(StepPlan(step_id=0, sequences=sequences, new_sequences=new)))
        assert set(codes(result)) == {0, 7}
        assert [token.seq_id for token in result.tokens] == [1]


@pytest.mark.parametrize("culprits", [{0}, {7}, {3}, {2, 3}, {0, 4, 7}, {1, 2, 3, 4, 5, 6, 7}])
def test_an_exception_in_the_model_is_traced_to_its_sequences_and_the_others_go_on(culprits):
    clean = step(None)
    result = step(Faults(forward=culprits))
    assert codes(result) == dict.fromkeys(culprits, "step_error")
    assert result.tokens == [token for token in clean.tokens if token.seq_id not in culprits]


def test_a_prefill_chunk_that_raises_is_named_itself():
    assert codes(step(Faults(forward=[4]), unsampled=[4])) == {4: "step_error"}


def test_one_culprit_costs_few_repeats():
    faults = Faults(forward=[37])
    runner, _ = make_runner(faults=faults)
    runner.launch(plan(64))
    assert len(faults.passes) <= 2 * 6 + 1


@pytest.mark.parametrize("culprits", [{0}, {3, 6}, set(range(8))])
def test_an_exception_in_the_sampler_is_traced_without_running_the_model_again(culprits):
    clean = step(None)
    faults = Faults(sample=culprits)
    result = step(faults)
    assert codes(result) == dict.fromkeys(culprits, "step_error")
    assert result.tokens == [token for token in clean.tokens if token.seq_id not in culprits]
    assert len(faults.passes) == 1


def test_a_failure_names_the_kind_of_error_and_not_its_text(caplog):
    with caplog.at_level(logging.ERROR):
        result = step(Faults(forward=[1]))
    assert "RuntimeError" in result.failures[0].message
    assert "secret" not in result.failures[0].message
    assert "sequence 1" in caplog.text


def test_blocks_are_copied_once_however_often_the_pass_is_repeated():
    """Block 40 is copied to 41, then the pass writes 41: a second copy would undo it for the retry."""
    faults = Faults(forward=[5])
    runner, _ = make_runner(faults=faults)
    slab = runner._pool.slabs[0]
    slab.keys[40] = 9.0
    copies = []
    copy_blocks = runner._pool.copy_blocks
    runner._pool.copy_blocks = lambda blocks: copies.append(list(blocks)) or copy_blocks(blocks)
    runner.launch(plan(8, block_copies=[BlockCopy(40, 41)]))
    assert len(copies) == 1
    assert (slab.keys[41] == 9.0).all()


def test_a_sequence_that_is_alone_in_its_step_fails_alone_while_our_canary_lives():
    faults = Faults(forward=[0])
    runner, _ = make_runner(faults=faults)
    assert codes(runner.collect(runner.launch(plan(1)))) == {0: "step_error"}
    assert faults.passes[-1] == [], "the canary ran"


def test_a_model_that_fails_for_the_canary_too_is_an_engine_fault():
    runner, _ = make_runner(faults=Faults(always=True))
    with pytest.raises(EngineDeadError, match="all 3 sequences"):
        runner.launch(plan(3))


@pytest.mark.parametrize("num_seqs", [1, 3])
def test_no_number_of_poisoned_requests_ends_the_engine_while_the_canary_lives(num_seqs):
    runner, _ = make_runner(faults=Faults(forward=range(num_seqs)))
    for step_id in range(20):
        result = runner.collect(runner.launch(plan(num_seqs, step_id=step_id)))
        assert codes(result) == dict.fromkeys(range(num_seqs), "step_error")


def test_a_fault_that_needs_two_members_at_once_blames_nobody():
    def attempt(part):
        if {1, 6} <= set(part):
            raise RuntimeError
        return list(part)

    done = isolate(range(8), attempt=attempt)
    assert (done.parts, done.culprits) == ([[0, 1, 2, 3], [4, 5, 6, 7]], [])


def test_the_canary_touches_no_block_of_the_scheduler():
    runner, _ = make_runner(faults=Faults(forward=[0]), num_blocks=8)
    storage = runner._pool._storage
    before = storage[:8].clone()
    runner.launch(plan(1))
    assert torch.equal(storage[:8], before)


class Shortage:
    """Memory for so many sequences in a pass, and for so many draws at once."""

    def __init__(self, *, most=99, draws=99, error=None):
        self.most, self.draws = most, draws
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    def before_forward(self, seq_ids):
        if len(seq_ids) > self.most:
            raise self.error

    def after_logits(self, logits, seq_ids):
        pass

    def before_sample(self, seq_ids):
        if len(seq_ids) > self.draws:
            raise self.error


def outcome(result):
    return [(each.seq_id, each.token_id) for each in result.tokens]


@pytest.mark.parametrize("shortage", [Shortage(most=2), Shortage(draws=2)], ids=["pass", "draws"])
def test_a_step_that_lacks_memory_is_done_in_halves_with_the_same_tokens(shortage):
    result = step(shortage)
    assert outcome(result) == outcome(step(None))
    assert result.failures == []
    assert result.num_out_of_memory == 3  # eight, and twice four


@pytest.mark.parametrize("shortage", [Shortage(most=0), Shortage(draws=0)], ids=["pass", "draws"])
@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: not enough memory: you tried")], ids=repr
)
def test_who_lacks_memory_alone_is_told_so_and_the_engine_lives(shortage, error):
    shortage.error = error
    result = step(shortage, 2)
    assert codes(result) == {0: "out_of_memory", 1: "out_of_memory"}
    assert result.num_out_of_memory > 0


def test_without_memory_for_the_logits_all_draws_of_the_step_are_told_so(monkeypatch):
    runner, _ = make_runner()
    handle = runner.launch(plan(3))
    monkeypatch.setattr(runner._draws, "start", _fails)
    runner.draw(handle)
    monkeypatch.undo()
    result = runner.collect(handle)
    assert codes(result) == dict.fromkeys(range(3), "out_of_memory")
    again = runner.collect(runner.launch(plan(3, step_id=1)))
    assert len(again.tokens) == 3


def _fails(*_, **__):
    raise MemoryError
