"""bf16 products on every instruction set: float64 is the oracle, and a row's bits are its own."""

import itertools

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.linear_case import (
    ISAS,
    error_bound,
    multiply,
    packed,
    product,
    random_rows,
)

ROWS = [1, 2, 3, 4, 5, 6, 7, 11, 12, 13, 16, 25, 33, 70, 97, 100]
"""Below, at and above each kernel's tiles, and the driver's 96 rows."""

FEATURES = [1, 5, 31, 32, 33, 64, 70]
INPUTS = [1, 2, 3, 63, 64, 65, 130, 255, 257, 515]
"""Odd and even, below and above the padding of 64 and the kernels' chunks of 128 and 256."""

LONG = 1100
"""Inputs of several chunks in every kernel, the last one ragged."""


def unpacked(weight: Tensor) -> Tensor:
    out = torch.empty(weight.shape)
    packed(_native.Pool(2, [], 0), weight).unpack(out.data_ptr())
    return out


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("features", FEATURES)
def test_product_is_the_float64_one_within_its_roundings(isa: str, features: int) -> None:
    """160 shapes for each number of features."""
    for inputs in INPUTS:
        rows, weight = random_rows(1, max(ROWS), inputs), random_rows(2, features, inputs)
        exact, bound = rows.double() @ weight.double().T, error_bound(rows, weight)
        kernel = product(isa, [weight])
        for num_rows in ROWS:
            out = torch.full((num_rows, features), float("nan"))
            kernel.run(rows[:num_rows], out)
            assert ((out - exact[:num_rows]).abs() <= bound[:num_rows]).all(), (num_rows, inputs)


@pytest.mark.parametrize("isa", ISAS)
def test_long_rows_keep_the_oracle(isa: str) -> None:
    rows, weight = random_rows(3, 27, 5000), random_rows(4, 40, 5000)
    error = (multiply(isa, rows, weight) - rows.double() @ weight.double().T).abs()
    assert (error <= error_bound(rows, weight)).all()


@pytest.mark.parametrize("isa", ISAS)
def test_a_single_one_picks_a_column_exactly(isa: str) -> None:
    """Every input of every feature lies where the kernel looks for it."""
    weight = random_rows(5, 70, 131)
    assert torch.equal(multiply(isa, torch.eye(131).bfloat16(), weight), weight.T.float())


@pytest.mark.parametrize("isa", ISAS)
def test_a_row_has_the_same_bits_alone_and_in_any_company(isa: str) -> None:
    """1 to 70 rows, one thread and two."""
    rows, weight = random_rows(6, 70, LONG), random_rows(7, 70, LONG)
    whole = multiply(isa, rows, weight, threads=2)
    one_thread, out = product(isa, [weight], threads=1), torch.empty(70, 70)
    for num_rows in range(1, 71):
        one_thread.run(rows[:num_rows], out)
        assert torch.equal(out[:num_rows], whole[:num_rows]), num_rows
        one_thread.run(rows[num_rows - 1 :], out)
        assert torch.equal(out[: 71 - num_rows], whole[num_rows - 1 :]), num_rows


@pytest.mark.parametrize("isa", ISAS)
def test_row_blocks_do_not_change_a_bit(isa: str) -> None:
    """So many rows that their operand is cut into blocks (for few panels, and for the L2 cache)."""
    rows, weight = random_rows(8, 600, LONG), random_rows(9, 33, LONG)
    whole = multiply(isa, rows, weight)
    for first, last in [(0, 1), (95, 97), (280, 330), (599, 600), (5, 205)]:
        assert torch.equal(multiply(isa, rows[first:last], weight, threads=1), whole[first:last])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_bad_value_stays_in_its_row_and_feature(isa: str, bad: float) -> None:
    rows, weight = random_rows(10, 30, 100), random_rows(11, 40, 100)
    good = multiply(isa, rows, weight)
    rows[17, 99], weight[33, 0] = bad, bad
    out = multiply(isa, rows, weight)
    touched = torch.zeros(30, 40, dtype=torch.bool)
    touched[17, :], touched[:, 33] = True, True
    assert torch.equal(out[~touched], good[~touched])
    assert not out[touched].isfinite().any()


@pytest.mark.parametrize(
    ("features", "inputs"), list(itertools.product([1, 31, 32, 65], [1, 2, 63, 64, 131]))
)
def test_packing_loses_nothing(features: int, inputs: int) -> None:
    """Rows, transposed, a view with other strides, and float32 that is rounded."""
    weight = random_rows(12, features, inputs)
    assert torch.equal(unpacked(weight), weight.float())
    assert torch.equal(unpacked(weight.T.contiguous().T), weight.float())
    wide = random_rows(13, 2 * features, 3 * inputs)[::2, ::3]
    assert torch.equal(unpacked(wide), wide.float())
    exact = torch.randn(features, inputs, generator=torch.Generator().manual_seed(14))
    assert torch.equal(unpacked(exact), exact.bfloat16().float())


def test_packing_keeps_special_values() -> None:
    """NaN stays NaN, also one whose bits rounding would carry into infinity's."""
    special = torch.tensor([[float("inf"), float("-inf"), 0.0, -0.0, 3.4e38, 1e-40, float("nan")]])
    given = torch.cat([special, torch.tensor([[0x7F800001]], dtype=torch.int32).view(torch.float32)], dim=1)
    out = unpacked(given)
    assert out[:, 6:].isnan().all()
    assert torch.equal(out[:, :6], special[:, :6].bfloat16().float())
    assert out[0, 3].signbit()


def test_packed_bytes_are_whole_panels_of_padded_inputs() -> None:
    assert packed(_native.Pool(1, [], 0), random_rows(15, 33, 65)).num_bytes == 2 * 32 * 128 * 2
