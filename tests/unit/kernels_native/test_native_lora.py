"""The adapters' operation on every instruction set: right sums, its own rows only, and bits of the row alone."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.adapters import LowRankPair
from penstock.kernels.cpu import _native
from penstock.kernels.cpu.adapters import pack_adapter
from tests.unit.kernels_native.dense_case import (
    DTYPES,
    ISAS,
    POOLS,
    assert_close,
    guard_is_whole,
    guarded,
    random,
)

Run = tuple[int, int, _native.Adapter]


def pair(rank: int, in_features: int, out_features: int, *, seed: int) -> LowRankPair:
    a = random(seed, rank, in_features, dtype=torch.bfloat16, scale=0.1)
    b = random(seed + 1, out_features, rank, dtype=torch.bfloat16, scale=0.1)
    return LowRankPair(a=a, b=b, scale=0.75)


def run(isa: str, x: Tensor, y: Tensor, runs: list[Run], *, threads: int = 2) -> None:
    program = _native.Program(POOLS[threads], isa, deterministic=False)
    x_ref = program.add_external(DTYPES[x.dtype], x.shape[1])
    y_ref = program.add_external(DTYPES[y.dtype], y.shape[1])
    _native.add_lora(program, x=x_ref, sites=[0], outs=[y_ref])
    places = [(each.data_ptr(), each.stride(0) * each.itemsize) for each in (x, y)]
    program.run(x.shape[0], places, [], runs)


def expected(x: Tensor, y: Tensor, first: int, num: int, low: LowRankPair) -> Tensor:
    out = y.double()
    rows = slice(first, first + num)
    out[rows] += low.scale * (x[rows].double() @ low.a.double().t()) @ low.b.double().t()
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(1, 17, 5), (8, 96, 33), (16, 896, 128), (9, 200, 95)])
def test_a_product_of_any_size_is_right_and_writes_nothing_else(
    isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> None:
    rank, in_features, out_features = sizes
    low = pair(rank, in_features, out_features, seed=3)
    packed = pack_adapter({0: low}, num_sites=1)
    x = random(1, 23, in_features, dtype=torch.bfloat16)
    y = guarded(23, out_features, dtype).copy_(random(2, 23, out_features, dtype=dtype))
    wanted = expected(x, y, 2, 19, low)
    run(isa, x, y, [(2, 19, packed.adapter)])
    assert_close(y, wanted)
    assert guard_is_whole(y)


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_and_among_others(isa: str) -> None:
    lows = [pair(rank, 200, 95, seed=rank) for rank in (4, 13)]
    packed = [pack_adapter({0: low}, num_sites=1) for low in lows]
    x = random(1, 30, 200, dtype=torch.bfloat16)
    together = torch.zeros(30, 95)
    run(isa, x, together, [(0, 11, packed[0].adapter), (11, 18, packed[1].adapter)])
    for row in (0, 7, 10, 11, 15, 28):
        alone = torch.zeros(1, 95)
        run(isa, x[row : row + 1], alone, [(0, 1, packed[row >= 11].adapter)], threads=1)
        assert torch.equal(alone[0], together[row])
    assert not together[29].any()


def test_a_site_that_the_adapter_lacks_is_left_alone() -> None:
    packed = pack_adapter({}, num_sites=1)
    y = torch.ones(2, 5)
    run(ISAS[-1], torch.ones(2, 8, dtype=torch.bfloat16), y, [(0, 2, packed.adapter)])
    assert torch.equal(y, torch.ones(2, 5))


def test_wrong_places_are_refused() -> None:
    program = _native.Program(POOLS[1], ISAS[0], deterministic=False)
    wide = program.add_buffer(_native.DType.f32, 8)
    with pytest.raises(ValueError, match="must be bf16"):
        _native.add_lora(program, x=wide, sites=[0], outs=[wide])
    with pytest.raises(ValueError, match="no such site"):
        _native.Adapter(1).set_site(1, a=0, b=0, rank=1, scale=1.0)
