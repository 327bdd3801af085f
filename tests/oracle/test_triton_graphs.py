"""Recorded decode steps on the Triton kernels: launches that know a rung's lengths alone.

Interpreted, where a recording launches everything anew; as CUDA graphs where `benchmarks.device` runs this on a
device.
"""

import os
from pathlib import Path

import torch

from penstock.core.params import SamplingParams
from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.cuda_graphs import CudaRecorder, DecodeGraphs, GraphLimits, Rung
from penstock.engine.runner.runner import Runner
from penstock.engine.runner.samplers import device_sampler
from penstock.engine.scheduler.plan import (
    AdapterBinding,
    NewSequence,
    SampleSpec,
    ScheduledSequence,
    StepPlan,
)
from penstock.kernels import ops
from penstock.kernels.adapters import AdapterLimits, LowRankPair
from penstock.kernels.options import KernelOptions
from penstock.models.loader import load_model
from tests.oracle.checkpoints import tiny_checkpoint

DEVICE = torch.device(os.environ.get("PENSTOCK_TEST_DEVICE", "cpu"))
"""`cuda` where `benchmarks.device` runs the tests on a device, without the interpreter."""


class Again:
    """Records nothing and launches everything anew at each replay, with the arguments of the recording."""

    num_bytes = 0

    def __init__(self, run=None):
        self.run = run

    def record(self, run):
        run()
        return Again(run)

    def replay(self):
        self.run()


def recorder():
    return CudaRecorder(DEVICE) if DEVICE.type == "cuda" else Again()


def sequence(seq_id, token_ids, start, tables):
    return ScheduledSequence(seq_id, token_ids, start, tables, (SampleSpec(seq_id, 0),))


def test_a_padded_step_of_a_rung_draws_what_the_same_step_draws_alone(tmp_path: Path) -> None:
    """Grouped heads and a window, with lengths on the host that are those of no sequence."""
    loaded = load_model(
        tiny_checkpoint("mistral", tmp_path),
        dtype="float32",
        kernels="triton",
        device=DEVICE,
        max_model_len=48,
    )
    layout = make_cache_layout(loaded.model.layer_windows)

    def make(pool):
        limits = GraphLimits(
            max_num_seqs=2, max_model_len=48, block_size=16, scratch_block=pool.scratch_block
        )
        return DecodeGraphs(
            model=loaded.model, kernels=loaded.kernels, limits=limits, device=DEVICE, recorder=recorder()
        )

    runner = Runner(
        loaded,
        layout=layout,
        num_blocks=16,
        block_size=16,
        device_sampler=device_sampler(loaded),
        make_graphs=make,
    )
    tables = [
        tuple([8 * group + 2 * row, 8 * group + 2 * row + 1] for group in range(len(layout.groups)))
        for row in range(2)
    ]
    prompts = [sequence(1, [5, 9, 4], 0, tables[0]), sequence(2, list(range(3, 20)), 0, tables[1])]
    new = [
        NewSequence(seq_id=i, params=SamplingParams(temperature=0.0), seed=0, prompt_token_ids=[])
        for i in (1, 2)
    ]
    first = {
        t.seq_id: t.token_id
        for t in runner.collect(
            runner.launch(StepPlan(step_id=1, sequences=prompts, new_sequences=new))
        ).tokens
    }
    decodes = [sequence(1, [first[1]], 3, tables[0]), sequence(2, [first[2]], 17, tables[1])]
    with torch.inference_mode():
        alone = runner._forward.run(decodes, may_replay=True).logits
        assert runner.record_next(), "the rung that was missed"
        replayed = runner._forward.run(decodes, may_replay=True).logits
    assert runner._recordings.graphs.rungs == list(runner._recordings.graphs._missed) == [Rung(48, 2)]
    assert replayed.data_ptr() == runner._recordings.graphs._output.logits.data_ptr()
    torch.testing.assert_close(replayed, alone)


def random_adapter(loaded, *, rank, seed):
    """On the first and the last product of the model."""
    generator = torch.Generator().manual_seed(seed)
    pairs = {
        site.index: LowRankPair(
            a=torch.randn(rank, site.in_features, generator=generator) / 4,
            b=torch.randn(site.out_features, rank, generator=generator) / 4,
            scale=0.5,
        )
        for site in (loaded.sites.sites[0], loaded.sites.sites[-1])
    }
    return ops.prepare_adapter(loaded.kernels, pairs, num_sites=len(loaded.sites.sites), dtype=loaded.dtype)


def test_adapters_that_come_and_go_between_replays_act_on_their_own_rows(tmp_path: Path) -> None:
    """One recording; slots are bound, bound anew and left, and the first version's memory is gone by then."""
    loaded = load_model(
        tiny_checkpoint("llama", tmp_path),
        dtype="float32",
        kernels="triton",
        device=DEVICE,
        max_model_len=32,
        options=KernelOptions(enable_lora=True),
    )
    limits = AdapterLimits(max_rows=2, max_adapters=2, max_rank=8)
    tables = loaded.kernels.adapter_tables(limits, num_sites=len(loaded.sites.sites), dtype=loaded.dtype)

    def make(pool):
        sizes = GraphLimits(max_num_seqs=2, max_model_len=32, block_size=16, scratch_block=pool.scratch_block)
        return DecodeGraphs(
            model=loaded.model,
            kernels=loaded.kernels,
            limits=sizes,
            device=DEVICE,
            recorder=recorder(),
            adapters=tables,
        )

    versions = {name: random_adapter(loaded, rank=rank, seed=rank) for name, rank in (("a", 8), ("b", 3))}
    runner = Runner(
        loaded,
        layout=make_cache_layout(loaded.model.layer_windows),
        num_blocks=4,
        block_size=16,
        device_sampler=device_sampler(loaded),
        make_graphs=make,
        num_adapter_slots=2,
        adapter_weights=versions.__getitem__,
    )

    def logits(slots, *, may_replay):
        rows = [
            ScheduledSequence(i, [7], 0, ([i],), (SampleSpec(i, 0),), adapter_slot=slot)
            for i, slot in enumerate(slots)
        ]
        with torch.inference_mode():
            return runner._forward.run(rows, may_replay=may_replay).logits

    runner._adapters.bind([AdapterBinding(0, "a"), AdapterBinding(1, "b")])
    first = logits([0, 1], may_replay=True)
    assert not torch.equal(first[0], first[1])
    assert runner.record_next(), "the largest without adapters"
    assert runner.record_next(), "the rung that was missed"
    assert Rung(32, 2, has_adapters=True) in runner._recordings.graphs.rungs
    torch.testing.assert_close(logits([0, 1], may_replay=True), first)
    versions["a"].pairs.clear()
    versions["a"] = random_adapter(loaded, rank=5, seed=9)
    runner._adapters.bind([AdapterBinding(0, "a")])
    replayed = logits([-1, 0], may_replay=True)
    assert replayed.data_ptr() == runner._recordings.graphs._output.logits.data_ptr()
    torch.testing.assert_close(replayed, logits([-1, 0], may_replay=False))
    assert not torch.equal(replayed[1], first[0])
