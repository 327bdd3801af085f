"""Products with int8 and int4 weights on every instruction set: whole numbers are exact, a row's bits are its own."""

import dataclasses

import pytest
import torch
from torch import Tensor

from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.quantize import quantize_int4, quantize_int8
from tests.unit.kernels_native.linear_case import ISAS, error_bound, random_rows
from tests.unit.kernels_native.quantized_case import (
    FORMATS,
    quantized_product,
    random_weight,
    unpacked,
    whole_rows,
)

ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 25, 70, 97]
"""Below, at and above each kernel's tiles, and the driver's 96 rows."""

SHAPES = [(1, 1), (31, 63), (32, 64), (33, 65), (5, 130), (70, 200), (64, 515), (40, 1090)]
"""(out features, in features): whole and ragged panels and groups."""

INT8 = Quantization(method="int8")
INT4 = [form for form in FORMATS if form.method == "int4"]
WEIGHT_ONLY = [dataclasses.replace(form, activations="bf16") for form in FORMATS]
EVERY_FORM = [*FORMATS, *WEIGHT_ONLY]


def exact_int8(rows: Tensor, weight: Tensor) -> Tensor:
    """Integers, then one rounding to float32 and one by the weight's scale; rows have scale 1."""
    values, scales = quantize_int8(weight)
    return (rows.long() @ values.long().T).float() * scales


def group_products(rows: Tensor, weight: Tensor, group_size: int) -> Tensor:
    """Exact products of each group, float64 [G, M, N]."""
    values, scales = quantize_int4(weight, group_size=group_size)
    padded = torch.nn.functional.pad(rows.long(), (0, values.shape[1] - rows.shape[1]))
    groups = (slice(start, start + group_size) for start in range(0, values.shape[1], group_size))
    sums = [padded[:, group] @ values.long()[:, group].T for group in groups]
    return torch.stack(sums).double() * scales.double().T[:, None, :]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_exact_up_to_the_final_scale(isa: str, shape: tuple[int, int]) -> None:
    """13 numbers of rows."""
    rows, weight = whole_rows(1, max(ROWS), shape[1]), random_weight(2, *shape)
    wanted, product = exact_int8(rows, weight), quantized_product(isa, weight, INT8)
    for num_rows in ROWS:
        assert torch.equal(product.run(rows[:num_rows]), wanted[:num_rows]), num_rows


@pytest.mark.parametrize("isa", ISAS)
def test_the_rows_scale_comes_last(isa: str) -> None:
    """Rows of eighths have scale 1/8: every result is an eighth of the whole numbers' one."""
    rows, weight = whole_rows(3, 9, 200), random_weight(4, 40, 200)
    assert torch.equal(quantized_product(isa, weight, INT8).run(rows / 8), exact_int8(rows, weight) / 8)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sign", [1, -1])
def test_int8_extremes_neither_saturate_nor_wrap(isa: str, sign: int) -> None:
    """All 127 times all +-127, so many that sums of the unsigned form pass 2^31."""
    rows, weight = torch.full((7, 131072), 127).bfloat16(), torch.full((33, 131072), 127.0 * sign).bfloat16()
    wanted = float(torch.tensor(127 * 127 * 131072 * sign).float())
    assert (quantized_product(isa, weight, INT8).run(rows) == wanted).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", INT4, ids=str)
def test_int4_is_exact_inside_a_group(isa: str, form: Quantization) -> None:
    """One group: integers, then a rounding by the scale."""
    for inputs in (1, 31, 32):
        rows, weight = whole_rows(5, max(ROWS), inputs), random_weight(6, 40, inputs)
        wanted = group_products(rows, weight, form.group_size)[0].float()
        product = quantized_product(isa, weight, form)
        for num_rows in ROWS:
            assert torch.equal(product.run(rows[:num_rows]), wanted[:num_rows]), (inputs, num_rows)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", INT4, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int4_rounds_only_from_group_to_group(isa: str, form: Quantization, shape: tuple[int, int]) -> None:
    """13 numbers of rows; float32 may lose two units in the last place at each group."""
    rows, weight = whole_rows(7, max(ROWS), shape[1]), random_weight(8, *shape)
    groups = group_products(rows, weight, form.group_size)
    wanted, bound = groups.sum(0), 2 * len(groups) * 2.0**-24 * groups.abs().sum(0)
    product = quantized_product(isa, weight, form)
    for num_rows in ROWS:
        error = (product.run(rows[:num_rows]) - wanted[:num_rows]).abs()
        assert (error <= bound[:num_rows]).all(), num_rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", INT4, ids=str)
@pytest.mark.parametrize("nibble", [-8, 7])
def test_int4_extremes_do_not_saturate(isa: str, form: Quantization, nibble: int) -> None:
    """Every nibble at its end, every input +-127: what 16-bit sums of 32 inputs must hold."""
    weight = torch.full((33, 640), 0.0625 * nibble).bfloat16()
    weight[:, ::32] = -0.5  # the extreme -8 sets the scale to a sixteenth
    weight[:, 1::32] = 0.4375
    for value in (127, -127):
        rows = torch.full((7, 640), value).bfloat16()
        wanted = (rows.double() @ weight.double().T).float()
        assert torch.equal(quantized_product(isa, weight, form).run(rows), wanted)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", WEIGHT_ONLY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_weight_only_is_the_float64_product(isa: str, form: Quantization, shape: tuple[int, int]) -> None:
    """13 numbers of bf16 rows, against what the packed weight stands for."""
    rows, weight = random_rows(9, max(ROWS), shape[1]), random_weight(10, *shape)
    stood_for = unpacked(weight, form)
    exact, bound = rows.double() @ stood_for.double().T, error_bound(rows, stood_for)
    product = quantized_product(isa, weight, form)
    for num_rows in ROWS:
        error = (product.run(rows[:num_rows]) - exact[:num_rows]).abs()
        # A group's scale is one more rounding.
        assert (error <= 2 * bound[:num_rows]).all(), num_rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", WEIGHT_ONLY, ids=str)
def test_a_single_one_picks_a_column_exactly(isa: str, form: Quantization) -> None:
    """Every input of every feature lies where the kernel looks for it."""
    weight = random_weight(11, 70, 197)
    product = quantized_product(isa, weight, form).run(torch.eye(197).bfloat16())
    assert torch.equal(product, unpacked(weight, form).T)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_a_row_has_the_same_bits_alone_and_in_any_company(isa: str, form: Quantization) -> None:
    """1 to 70 rows, one thread and two."""
    rows, weight = random_rows(12, 70, 450), random_weight(13, 70, 450)
    whole = quantized_product(isa, weight, form).run(rows)
    one_thread = quantized_product(isa, weight, form, threads=1)
    for num_rows in range(1, 71):
        assert torch.equal(one_thread.run(rows[:num_rows]), whole[:num_rows]), num_rows
        assert torch.equal(one_thread.run(rows[num_rows - 1 :]), whole[num_rows - 1 :]), num_rows


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", EVERY_FORM, ids=str)
def test_zeros_give_zeros(isa: str, form: Quantization) -> None:
    """Rows of zeros, features of zeros, a feature whose first groups are zeros."""
    rows, weight = random_rows(14, 9, 300), random_weight(15, 40, 300)
    rows[4], weight[7], weight[8, :128] = 0, 0, 0
    out = quantized_product(isa, weight, form).run(rows)
    assert out.isfinite().all()
    assert (out[4] == 0).all()
    assert (out[:, 7] == 0).all()
    assert (out[[0, 1, 8]][:, 8] != 0).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("form", WEIGHT_ONLY, ids=str)
def test_a_bad_input_stays_in_its_row(isa: str, form: Quantization) -> None:
    rows, weight = random_rows(16, 30, 100), random_weight(17, 40, 100)
    product = quantized_product(isa, weight, form)
    good = product.run(rows)
    rows[17, 99] = float("nan")
    out = product.run(rows)
    others = torch.arange(30) != 17
    assert out[17].isnan().all()
    assert torch.equal(out[others], good[others])
