"""The ladder of recorded decode steps, with a recorder that runs the launches again at each replay."""

import numpy as np
import pytest
from fake_model import VOCAB, FakeLoaded, make_runner

from penstock.core.params import SamplingParams
from penstock.engine.runner.cuda_graphs import (
    RECORD_AT_START_S,
    DecodeGraphs,
    GraphLimits,
    Rung,
    length_ladder,
    row_ladder,
)
from penstock.engine.scheduler.plan import (
    PENDING_TOKEN,
    AdapterBinding,
    NewSequence,
    SampleSpec,
    ScheduledSequence,
    StepPlan,
)
from penstock.kernels.devices import CPU
from penstock.kernels.reference.kernel_set import ReferenceKernels


class Again:
    """A recording that launches everything anew."""

    def __init__(self, run):
        self.run = run
        self.num_replays = 0

    def replay(self):
        self.num_replays += 1
        self.run()


class FakeRecorder:
    def __init__(self):
        self.made = []

    @property
    def num_bytes(self):
        return 1000 * len(self.made)

    def record(self, run):
        run()
        self.made.append(Again(run))
        return self.made[-1]


@pytest.fixture
def recorded(monkeypatch):
    """A runner on a queue, its model, and its graphs: 8 sequences of at most 2,000 tokens."""
    monkeypatch.setattr(FakeLoaded, "is_queued_by_default", True)
    kept = []

    def make(model, pool):
        limits = GraphLimits(
            max_num_seqs=8, max_model_len=2000, block_size=4, scratch_block=pool.scratch_block
        )
        kept.append(
            DecodeGraphs(
                model=model, kernels=ReferenceKernels(), limits=limits, device=CPU, recorder=FakeRecorder()
            )
        )
        return kept[0]

    runner, model = make_runner(make_graphs=make)
    return runner, model, kept[0]


class FakeTables:
    """Remembers what it was filled with."""

    num_bytes = 7

    def __init__(self):
        self.filled = []

    def fill(self, rows, *, num_rows):
        self.filled.append((tuple((run.first_row, run.num_rows, run.weights) for run in rows), num_rows))


@pytest.fixture
def adapted(monkeypatch):
    """As `recorded`, with two slots for adapters and their tables."""
    monkeypatch.setattr(FakeLoaded, "is_queued_by_default", True)

    def make(model, pool):
        limits = GraphLimits(
            max_num_seqs=2, max_model_len=100, block_size=4, scratch_block=pool.scratch_block
        )
        return DecodeGraphs(
            model=model,
            kernels=ReferenceKernels(),
            limits=limits,
            device=CPU,
            recorder=FakeRecorder(),
            adapters=FakeTables(),
        )

    runner, model = make_runner(make_graphs=make, adapters={"a": "weights of a", "b": "weights of b"})
    return runner, model, runner._recordings.graphs


def new(seq_id):
    return NewSequence(seq_id=seq_id, params=SamplingParams(temperature=0.0), seed=0, prompt_token_ids=[])


def seq(seq_id, token_ids, start, table):
    return ScheduledSequence(seq_id, token_ids, start, (table,), (SampleSpec(seq_id, 0),))


def step(runner, *sequences, **plan):
    result = runner.collect(runner.launch(StepPlan(step_id=1, sequences=list(sequences), **plan)))
    assert not result.failures
    return {token.seq_id: token.token_id for token in result.tokens}


def test_the_ladders_end_where_the_limits_are():
    assert row_ladder(1) == (1,)
    assert row_ladder(20) == (1, 2, 4, 8, 16, 20)
    assert row_ladder(100)[-4:] == (64, 80, 96, 100)
    assert len(row_ladder(256)) == 23
    assert length_ladder(600) == (600,)
    assert length_ladder(4096) == (1024, 4096)
    assert length_ladder(131072) == (1024, 4096, 16384, 65536, 131072)


def test_a_step_of_decodes_takes_the_smallest_rung_and_answers_as_it_would_without(recorded):
    runner, model, graphs = recorded
    three = [seq(1, [3], 0, [1]), seq(2, [5], 0, [2]), seq(3, [7], 0, [4])]
    wanted = step(runner, *three, new_sequences=[new(1), new(2), new(3)])
    assert wanted == {1: 4, 2: 6, 3: 8}
    assert runner.record_next(), "the first is the largest"
    assert runner.record_next(), "then the rung that was missed"
    assert graphs.rungs == [Rung(1024, 4), Rung(1024, 8)]
    model.batches.clear()
    assert step(runner, *three) == wanted
    assert len(model.batches[-1].token_ids) == 4, "three rows and one that nobody owns"
    assert [each.num_replays for each in graphs.recorder.made] == [0, 1]


def test_rows_that_nobody_owns_write_to_the_scratch_block_alone(recorded):
    runner, _, _ = recorded
    while runner.record_next():
        pass
    before = runner._pool._storage[: runner._pool.num_blocks].clone()
    step(
        runner,
        seq(1, [3], 0, [1]),
        seq(2, [5], 0, [2]),
        seq(3, [7], 0, [4]),
        new_sequences=[new(1), new(2), new(3)],
    )
    changed = (runner._pool._storage[:-1] != before).flatten(1).any(dim=1)
    assert np.flatnonzero(changed).tolist() == [1, 2, 4]


def test_every_step_of_a_rung_has_its_own_inputs(recorded):
    runner, _, graphs = recorded
    while runner.record_next():
        pass
    assert graphs.rungs == [Rung(length, rows) for length in (1024, 2000) for rows in (1, 2, 4, 8)]
    assert step(runner, seq(1, [3], 0, [1]), new_sequences=[new(1), new(2)]) == {1: 4}
    assert step(runner, seq(1, [9], 1, [1])) == {1: (4 + 10) % VOCAB}
    assert step(runner, seq(2, [1], 0, [9])) == {2: 2}
    assert step(runner, seq(1, [2], 2, [1]), seq(2, [3], 1, [9])) == {1: (14 + 3) % VOCAB, 2: 6}


def test_tokens_that_the_step_before_draws_are_put_in_place_on_the_device(recorded):
    runner, _, _ = recorded
    while runner.record_next():
        pass
    first = runner.launch(
        StepPlan(
            step_id=1, sequences=[seq(1, [3], 0, [1]), seq(2, [5], 0, [2])], new_sequences=[new(1), new(2)]
        )
    )
    runner.draw(first)
    ahead = runner.launch(
        StepPlan(step_id=2, sequences=[seq(2, [PENDING_TOKEN], 1, [2]), seq(1, [PENDING_TOKEN], 1, [1])])
    )
    drawn = {token.seq_id: token.token_id for token in runner.collect(first).tokens}
    assert drawn == {1: 4, 2: 6}
    assert {t.seq_id: t.token_id for t in runner.collect(ahead).tokens} == {
        1: (4 + 5) % VOCAB,
        2: (6 + 7) % VOCAB,
    }


def test_chunks_and_longer_contexts_than_are_recorded_run_launch_by_launch(recorded):
    runner, _, graphs = recorded
    runner.record_next()
    assert graphs.rungs == [Rung(1024, 8)]
    assert step(runner, seq(1, [3, 4], 0, [1]), new_sequences=[new(1), new(2)]) == {1: 9}
    assert step(runner, seq(1, [1], 2, [1]), seq(2, [1], 0, [2])) == {1: 11, 2: 2}
    assert graphs.recorder.made[0].num_replays == 0


def test_the_start_records_for_a_bounded_time_and_memory_is_told(recorded):
    runner, _, graphs = recorded
    times = iter(np.arange(0, 100, RECORD_AT_START_S / 2.5))
    example = runner._inputs.build([runner._canary])
    bytes_before = runner.buffer_bytes
    graphs.record_at_start(example, clock=lambda: float(next(times)))
    assert len(graphs.rungs) == 2
    assert runner.buffer_bytes >= bytes_before + 2000
    graphs.clear()
    assert graphs.rungs == []


def test_a_rung_without_memory_is_given_up_and_its_steps_run_launch_by_launch(recorded):
    runner, _, graphs = recorded

    def fail(run):
        raise MemoryError

    graphs.recorder.record = fail
    assert runner.record_next()
    assert graphs.rungs == []
    assert step(runner, seq(1, [3], 0, [1]), new_sequences=[new(1)]) == {1: 4}
    while runner.record_next():
        pass


def test_a_step_in_parts_replays_nothing_since_the_parts_would_share_their_outputs(monkeypatch):
    monkeypatch.setattr(FakeLoaded, "is_queued_by_default", True)

    class SecondFails:
        def before_forward(self, seq_ids):
            if 2 in seq_ids:
                raise ValueError

        def after_logits(self, logits, seq_ids):
            pass

        def before_sample(self, seq_ids):
            pass

    def make(model, pool):
        limits = GraphLimits(
            max_num_seqs=8, max_model_len=100, block_size=4, scratch_block=pool.scratch_block
        )
        return DecodeGraphs(
            model=model, kernels=ReferenceKernels(), limits=limits, device=CPU, recorder=FakeRecorder()
        )

    runner, _ = make_runner(make_graphs=make, faults=SecondFails())
    while runner.record_next():
        pass
    three = [seq(1, [3], 0, [1]), seq(2, [5], 0, [2]), seq(3, [7], 0, [4])]
    plan = StepPlan(step_id=1, sequences=three, new_sequences=[new(1), new(2), new(3)])
    result = runner.collect(runner.launch(plan))
    assert {token.seq_id: token.token_id for token in result.tokens} == {1: 4, 3: 8}
    assert [failure.seq_id for failure in result.failures] == [2]
    assert all(not each.num_replays for each in runner._recordings.graphs.recorder.made)


def test_the_largest_step_of_a_length_is_recorded_before_those_that_find_room_in_its_memory(recorded):
    runner, model, _ = recorded
    while runner.record_next():
        pass
    rows = [len(batch.token_ids) for batch in model.batches]
    assert rows == [8, 8, 1, 2, 4, 8, 1, 2, 4], "one run makes the outputs, each other is a recording's"


def test_what_all_recordings_write_to_is_not_counted_as_the_recorders(recorded):
    """It is there before the first recording begins, which would take its memory for its own."""
    runner, _, graphs = recorded
    seen = []

    def record(run):
        seen.append(graphs._output)
        run()
        return Again(run)

    graphs.recorder.record = record
    runner.record_next()
    assert seen[0] is not None


def test_recording_ends_where_its_memory_does(recorded):
    runner, _, graphs = recorded
    assert runner.record_next()
    graphs.max_bytes = graphs.num_bytes
    assert not runner.record_next()
    assert len(graphs.rungs) == 1


def adapted_seq(seq_id, start, slot, table):
    return ScheduledSequence(seq_id, [3], start, (table,), (SampleSpec(seq_id, 0),), adapter_slot=slot)


def test_steps_with_adapters_replay_a_recording_of_their_own(adapted):
    """Tables are filled before it; a plain step of the same size replays one that knows nothing of them."""
    runner, model, graphs = adapted
    while runner.record_next():
        pass
    assert graphs.rungs == [Rung(100, 1, False), Rung(100, 1, True), Rung(100, 2, False), Rung(100, 2, True)]
    told = [(len(batch.token_ids), batch.adapter_tables) for batch in model.batches[-4:]]
    tables = graphs.adapters
    assert told == [(2, None), (1, None), (2, tables), (1, tables)], "the usual steps come first"
    tables.filled.clear()
    bindings = [AdapterBinding(0, "a"), AdapterBinding(1, "b")]
    mixed = [adapted_seq(1, 0, -1, [1]), adapted_seq(2, 0, 1, [2])]
    wanted = step(runner, *mixed, new_sequences=[new(1), new(2)], adapter_bindings=bindings)
    assert wanted == {1: 4, 2: 4}
    assert tables.filled == [(((1, 1, "weights of b"),), 2)]
    step(runner, adapted_seq(1, 1, -1, [1]), adapted_seq(2, 1, -1, [2]))
    assert len(tables.filled) == 1
    rebound = [AdapterBinding(1, "a")]
    step(runner, adapted_seq(2, 2, 1, [2]), adapter_bindings=rebound)
    assert tables.filled[1:] == [(((0, 1, "weights of a"),), 1)]
    assert [each.num_replays for each in graphs.recorder.made] == [1, 0, 1, 1]


def test_without_tables_steps_with_adapters_run_launch_by_launch(adapted):
    runner, model, graphs = adapted
    graphs.adapters = None
    while runner.record_next():
        pass
    assert graphs.rungs == [Rung(100, 1), Rung(100, 2)]
    bindings = [AdapterBinding(0, "a")]
    step(runner, adapted_seq(1, 0, 0, [1]), new_sequences=[new(1)], adapter_bindings=bindings)
    assert [each.num_replays for each in graphs.recorder.made] == [0, 0]
    assert model.batches[-1].adapters[0].weights == "weights of a"
