"""Segmented LoRA in Triton: large ranks, inputs in chunks, rows alone and among other adapters, moved weights."""

import gc
import weakref

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import (
    AdapterLimits,
    AdapterRows,
    AdapterWeights,
    LoraSite,
    LoraSites,
    LowRankPair,
)
from penstock.kernels.triton.adapter_tables import FixedTables, TritonAdapter
from penstock.kernels.triton.kernel_set import TritonKernels
from tests.unit.kernels.device_home import on_test_device

INPUTS, OUTPUTS = 1100, 140
"""More than a chunk and more than a block of outputs."""


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_site(*, inputs: int = INPUTS, outputs: int = OUTPUTS) -> LoraSite:
    return LoraSites().add("module", in_features=inputs, out_features=outputs)


def make_pair(rank: int, *, inputs: int = INPUTS, outputs: int = OUTPUTS) -> LowRankPair:
    return LowRankPair(
        a=rand(rank, inputs, seed=rank) / 33, b=rand(outputs, rank, seed=rank + 1) / 9, scale=1.7
    )


def run(
    kernels: ops.KernelSet, x: Tensor, y: Tensor, site: LoraSite, rows: list[tuple[int, int, AdapterWeights]]
) -> Tensor:
    site.active.rows = tuple(AdapterRows(first_row=a, num_rows=n, weights=w) for a, n, w in rows)
    return ops.lora(kernels, x, y.clone(), site)


def test_ranks_beyond_a_block_and_rows_beyond_a_tile() -> None:
    kernels, site, pairs = on_test_device(TritonKernels()), make_site(), [make_pair(rank) for rank in (65, 5)]
    weights = [ops.prepare_adapter(kernels, {0: pair}, num_sites=1, dtype=torch.float32) for pair in pairs]
    x, y = rand(22, INPUTS, seed=1), rand(22, OUTPUTS, seed=2)
    got = run(kernels, x, y, site, [(1, 17, weights[0]), (18, 1, weights[1]), (20, 2, weights[0])])
    expected = y.double()
    for rows, pair in ((slice(1, 18), pairs[0]), (slice(18, 19), pairs[1]), (slice(20, 22), pairs[0])):
        expected[rows] += pair.scale * (x[rows].double() @ pair.a.double().t()) @ pair.b.double().t()
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(got[[0, 19]], y[[0, 19]])


def test_a_row_is_the_same_alone_and_beside_an_adapter_of_larger_rank() -> None:
    """Bit for bit: tiles and chunks do not depend on the step."""
    kernels, site = on_test_device(TritonKernels()), make_site()
    small, large = (
        ops.prepare_adapter(kernels, {0: make_pair(rank)}, num_sites=1, dtype=torch.bfloat16)
        for rank in (8, 40)
    )
    x, y = rand(21, INPUTS, seed=1).bfloat16(), rand(21, OUTPUTS, seed=2).bfloat16()
    whole = run(kernels, x, y, site, [(0, 18, small), (18, 3, large)])
    assert torch.equal(run(kernels, x[17:18], y[17:18], site, [(0, 1, small)])[0], whole[17])


def test_matrices_that_were_moved_are_found_again() -> None:
    """As after a sleep."""
    kernels, site = on_test_device(TritonKernels()), make_site()
    weights = ops.prepare_adapter(kernels, {0: make_pair(4)}, num_sites=1, dtype=torch.float32)
    x, y = rand(2, INPUTS, seed=1), rand(2, OUTPUTS, seed=2)
    before = run(kernels, x, y, site, [(0, 2, weights)])
    assert isinstance(weights, TritonAdapter)
    storage = weights.pairs[0].a.untyped_storage()
    kept = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).clone()
    storage.resize_(0)
    taken = torch.full_like(kept, 7)  # so that the matrices come to lie elsewhere
    storage.resize_(kept.nbytes)
    torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).copy_(kept)
    weights.anchor = torch.zeros_like(weights.anchor)
    assert torch.equal(run(kernels, x, y, site, [(0, 2, weights)]), before)
    del taken


def test_a_step_without_matrices_launches_nothing() -> None:
    kernels, site = on_test_device(TritonKernels()), make_site()
    empty = ops.prepare_adapter(kernels, {}, num_sites=1, dtype=torch.float32)
    y = rand(2, OUTPUTS, seed=2)
    assert torch.equal(run(kernels, rand(2, INPUTS, seed=1), y, site, [(0, 2, empty)]), y)


SMALL = {"inputs": 40, "outputs": 24}
LIMITS = AdapterLimits(max_rows=4, max_adapters=2, max_rank=20)
Runs = list[tuple[int, int, AdapterWeights]]


def replay(tables: FixedTables, x: Tensor, y: Tensor, site: LoraSite, runs: Runs) -> Tensor:
    """What the launches that were recorded for 4 rows make of these runs."""
    tables.fill(tuple(AdapterRows(first_row=a, num_rows=n, weights=w) for a, n, w in runs), num_rows=len(x))
    site.active.rows, site.active.tables = (), tables
    try:
        return ops.lora(KERNELS, x, y.clone(), site)
    finally:
        site.active.tables = None


KERNELS = on_test_device(TritonKernels())


def prepared(rank: int) -> AdapterWeights:
    return ops.prepare_adapter(KERNELS, {0: make_pair(rank, **SMALL)}, num_sites=1, dtype=torch.float32)


def test_recorded_launches_follow_what_the_tables_say() -> None:
    """Bit for bit what launches of their own give: other rows, other adapters, a third one in two slots, none."""
    site, tables = make_site(**SMALL), KERNELS.adapter_tables(LIMITS, num_sites=1, dtype=torch.float32)
    x, y = rand(4, SMALL["inputs"], seed=1), rand(4, SMALL["outputs"], seed=2)
    first, second, third = prepared(3), prepared(20), prepared(7)
    steps: list[Runs] = [
        [(0, 1, first), (1, 3, second)],
        [(2, 1, first)],
        [(0, 1, third), (1, 1, first), (3, 1, third)],
        [(0, 4, second)],
        [],
    ]
    addresses = tables.staged.tiles.data_ptr(), tables.staged.places.data_ptr()
    for runs in steps:
        assert torch.equal(replay(tables, x, y, site, runs), run(KERNELS, x, y, site, runs)), runs
    assert addresses == (tables.staged.tiles.data_ptr(), tables.staged.places.data_ptr())
    assert torch.equal(replay(tables, x, y, site, []), y)


def test_an_adapter_that_is_gone_is_neither_held_nor_read() -> None:
    """Its place still tells where its matrices lay; they hold NaN by now, and the new one came to its slot."""
    site, tables = make_site(**SMALL), KERNELS.adapter_tables(LIMITS, num_sites=1, dtype=torch.float32)
    x, y = rand(4, SMALL["inputs"], seed=1), rand(4, SMALL["outputs"], seed=2)
    kept, gone = prepared(3), prepared(5)
    replay(tables, x, y, site, [(0, 1, kept), (1, 3, gone)])
    assert isinstance(gone, TritonAdapter)
    gone.pairs[0].a.fill_(float("nan"))
    gone.pairs[0].b.fill_(float("nan"))
    assert torch.equal(replay(tables, x, y, site, [(2, 1, kept)]), run(KERNELS, x, y, site, [(2, 1, kept)]))
    is_freed = weakref.ref(gone.pairs[0].a)
    del gone
    gc.collect()
    assert is_freed() is None
    new = prepared(6)
    runs: Runs = [(0, 2, new), (2, 2, kept)]
    assert torch.equal(replay(tables, x, y, site, runs), run(KERNELS, x, y, site, runs))


def test_places_are_sent_only_when_an_adapter_comes() -> None:
    """Two that share a slot push each other out, the one that was not used the longest first."""
    tables = KERNELS.adapter_tables(LIMITS, num_sites=1, dtype=torch.float32)
    first, second, third = prepared(1), prepared(2), prepared(3)

    def ranks(*weights: AdapterWeights) -> list[int]:
        tables.fill(
            tuple(AdapterRows(first_row=i, num_rows=1, weights=w) for i, w in enumerate(weights)), num_rows=4
        )
        return tables.staged.places[:, 0, 2].tolist()

    assert sorted(ranks(first, second)) == [1, 2]
    tables.staged.places[:] = 0
    assert ranks(first) == [0, 0], "nothing is sent again"
    assert sorted(ranks(third, first)) == [0, 3], "the second had to go"
