"""Warm-up runs the largest steps within the limits and leaves nothing behind."""

import pytest
from fake_model import make_runner

from penstock.engine.runner.warmup import WarmUpLimits, largest_steps
from penstock.engine.scheduler.cost import StepLoad

pytestmark = pytest.mark.usefixtures("is_queued")


def warmed(
    *, layer_windows=(None,), num_blocks=64, max_num_seqs=8, max_num_batched_tokens=40, max_model_len=1000
):
    runner, model = make_runner(layer_windows=layer_windows, num_blocks=num_blocks)
    held = runner.buffer_bytes
    runner.warm_up(
        max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens, max_model_len=max_model_len
    )
    return runner, model, held


def shapes(model):
    return [(len(batch.groups[0].seq_lens), len(batch.token_ids)) for batch in model.batches]


def test_the_largest_chunk_the_largest_decode_batch_and_a_decode_run_once_each():
    _, model, _ = warmed()
    assert shapes(model) == [(1, 40), (8, 8), (1, 1)]


def test_it_says_what_each_step_was_and_how_long_it_took():
    runner, _ = make_runner(layer_windows=(None,), num_blocks=64)
    steps = runner.warm_up(max_num_seqs=8, max_num_batched_tokens=40, max_model_len=1000)
    assert [step.load for step in steps] == [
        StepLoad(40, 1, 40, 1600),
        StepLoad(8, 8, 8 * runner._pool.block_size),
        StepLoad(1, 1, runner._pool.block_size),
    ]
    assert min(step.step_time_s for step in steps) > 0


def test_where_kernels_are_compiled_each_step_runs_before_it_is_timed_and_short_chunks_run_too():
    runner, model = make_runner(num_blocks=64)
    runner._rehearsal._compiles = True
    steps = runner.warm_up(max_num_seqs=8, max_num_batched_tokens=20, max_model_len=1000)
    largest, short = [(1, 20), (8, 8), (1, 1)], [(1, 2), (1, 4), (1, 8), (1, 16)]
    assert shapes(model) == [*largest, *short, *largest]
    assert [step.load.num_tokens for step in steps] == [20, 8, 1]
    assert not runner._pool._storage.any()
    assert runner._sampler.num_sequences == 0


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({"max_model_len": 10}, [(1, 10), (8, 8), (1, 1)]),
        ({"num_blocks": 4, "max_num_batched_tokens": 999}, [(1, 16), (4, 4), (1, 1)]),
        ({"num_blocks": 9, "layer_windows": (None, 4, 4, 4)}, [(1, 8), (2, 2), (1, 1)]),
    ],
    ids=str,
)
def test_steps_are_cut_to_the_context_and_to_the_pool(limits, expected):
    _, model, _ = warmed(**limits)
    assert shapes(model) == expected


def test_the_pool_is_clean_and_no_sequence_is_remembered():
    runner, _, held = warmed(layer_windows=(None, 4))
    assert not runner._pool._storage.any()
    assert runner._sampler.num_sequences == 0
    assert runner.buffer_bytes <= held + 12 * 2 * 64


def test_sequences_of_one_step_share_no_block():
    limits = WarmUpLimits(max_num_seqs=5, max_num_tokens=30, num_groups=3, num_blocks=20, block_size=4)
    for plan in largest_steps(limits):
        blocks = [block for seq in plan.sequences for table in seq.block_tables for block in table]
        assert len(blocks) == len(set(blocks))
        assert max(blocks) < 20


class CountedMemory:
    """A device whose peak is what the model's passes are told to have taken."""

    def __init__(self, model, *, bytes_per_token):
        self._model, self._bytes_per_token = model, bytes_per_token
        self._first = 0
        self.allocated_bytes = 1000

    def reset_peak(self):
        self._first = len(self._model.batches)

    @property
    def peak_bytes(self):
        tokens = [len(batch.token_ids) for batch in self._model.batches[self._first :]]
        return self.allocated_bytes + self._bytes_per_token * max(tokens)


@pytest.mark.parametrize(
    ("max_num_seqs", "max_num_batched_tokens", "max_model_len", "chunks"),
    [(8, 40, 1000, [33]), (4, 40, 16, [16, 16, 7]), (2, 2, 50, [1]), (3, 100, 20, [20, 20, 20])],
)
def test_the_heaviest_steps_have_all_tokens_all_draws_and_long_contexts(
    max_num_seqs, max_num_batched_tokens, max_model_len, chunks
):
    """On a pool that could never hold them, and leaving no sequence behind."""
    runner, model = make_runner(num_blocks=4)
    held = runner._sampler.num_bytes
    peaks = runner.measure_peaks(
        CountedMemory(model, bytes_per_token=10),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
    )
    first, second = (batch.groups[0] for batch in model.batches)
    ones = [1] * (max_num_seqs - len(chunks))
    assert list(first.query_lens_host) == [*chunks, *ones]
    assert list(second.query_lens_host) == [1] * max_num_seqs
    assert set(second.seq_lens_host) == {max_model_len}
    assert peaks == (10 * sum([*chunks, *ones]), 10 * max_num_seqs)
    assert runner._sampler.num_bytes == held
