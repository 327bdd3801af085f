"""Segmented LoRA in Triton: large ranks, inputs in chunks, rows alone and among other adapters, moved weights."""

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, AdapterWeights, LoraSite, LoraSites, LowRankPair
from penstock.kernels.triton.adapters import TritonAdapter
from penstock.kernels.triton.kernel_set import TritonKernels

INPUTS, OUTPUTS = 1100, 140
"""More than a chunk and more than a block of outputs."""


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make_site() -> LoraSite:
    return LoraSites().add("module", in_features=INPUTS, out_features=OUTPUTS)


def make_pair(rank: int) -> LowRankPair:
    return LowRankPair(
        a=rand(rank, INPUTS, seed=rank) / 33, b=rand(OUTPUTS, rank, seed=rank + 1) / 9, scale=1.7
    )


def run(
    kernels: TritonKernels, x: Tensor, y: Tensor, site: LoraSite, rows: list[tuple[int, int, AdapterWeights]]
) -> Tensor:
    site.active.rows = tuple(AdapterRows(first_row=a, num_rows=n, weights=w) for a, n, w in rows)
    return ops.lora(kernels, x, y.clone(), site)


def test_ranks_beyond_a_block_and_rows_beyond_a_tile() -> None:
    kernels, site, pairs = TritonKernels(), make_site(), [make_pair(rank) for rank in (65, 5)]
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
    kernels, site = TritonKernels(), make_site()
    small, large = (
        ops.prepare_adapter(kernels, {0: make_pair(rank)}, num_sites=1, dtype=torch.bfloat16)
        for rank in (8, 40)
    )
    x, y = rand(21, INPUTS, seed=1).bfloat16(), rand(21, OUTPUTS, seed=2).bfloat16()
    whole = run(kernels, x, y, site, [(0, 18, small), (18, 3, large)])
    assert torch.equal(run(kernels, x[17:18], y[17:18], site, [(0, 1, small)])[0], whole[17])


def test_matrices_that_were_moved_are_found_again() -> None:
    """As after a sleep."""
    kernels, site = TritonKernels(), make_site()
    weights = ops.prepare_adapter(kernels, {0: make_pair(4)}, num_sites=1, dtype=torch.float32)
    x, y = rand(2, INPUTS, seed=1), rand(2, OUTPUTS, seed=2)
    before = run(kernels, x, y, site, [(0, 2, weights)])
    assert isinstance(weights, TritonAdapter)
    storage = weights.pairs[0].a.untyped_storage()
    kept = torch.empty(0, dtype=torch.uint8).set_(storage).clone()
    storage.resize_(0)
    taken = torch.full_like(kept, 7)  # so that the matrices come to lie elsewhere
    storage.resize_(kept.nbytes)
    torch.empty(0, dtype=torch.uint8).set_(storage).copy_(kept)
    weights.anchor = torch.zeros_like(weights.anchor)
    assert torch.equal(run(kernels, x, y, site, [(0, 2, weights)]), before)
    del taken


def test_a_step_without_matrices_launches_nothing() -> None:
    kernels, site = TritonKernels(), make_site()
    empty = ops.prepare_adapter(kernels, {}, num_sites=1, dtype=torch.float32)
    y = rand(2, OUTPUTS, seed=2)
    assert torch.equal(run(kernels, rand(2, INPUTS, seed=1), y, site, [(0, 2, empty)]), y)
