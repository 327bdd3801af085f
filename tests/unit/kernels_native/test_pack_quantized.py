"""Packing to int8 and int4 gives what the rule in plain torch gives, from any source, or refuses."""

import dataclasses

import pytest
import torch

from penstock.kernels.cpu import _native
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.quantize import quantize_dequantize
from tests.unit.kernels_native.quantized_case import FORMATS, packed, random_weight, unpacked

SHAPES = [(1, 1), (1, 64), (31, 7), (32, 63), (33, 64), (40, 65), (65, 131), (70, 300), (3, 1000)]

INT8 = Quantization(method="int8")
INT4 = dataclasses.replace(INT8, method="int4", group_size=32)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_values_are_the_rules(form: Quantization, shape: tuple[int, int]) -> None:
    """Rows of bf16 and of float32."""
    weight = random_weight(1, *shape)
    assert torch.equal(unpacked(weight, form), quantize_dequantize(weight, form))
    exact = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    assert torch.equal(unpacked(exact, form), quantize_dequantize(exact, form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_strides_and_threads_do_not_matter(form: Quantization) -> None:
    """A transposed source, a view of every third value, and one thread."""
    weight = random_weight(3, 70, 200)
    wanted = unpacked(weight, form)
    assert torch.equal(unpacked(weight.T.contiguous().T, form), wanted)
    assert torch.equal(unpacked(weight, form, threads=1), wanted)
    wide = random_weight(4, 140, 600)[::2, ::3]
    assert torch.equal(unpacked(wide, form), unpacked(wide.contiguous(), form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("exponent", [-149, -140, -126, -24, -20, -14, 0, 15])
def test_tiny_and_large_weights_follow_the_rule(form: Quantization, exponent: int) -> None:
    """Scales that are subnormal or zero; in float16 they are so earlier."""
    weight = torch.randn(33, 130, generator=torch.Generator().manual_seed(5)) * 2.0**exponent
    out = unpacked(weight, form)
    assert out.isfinite().all()
    assert torch.equal(out, quantize_dequantize(weight, form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_equal_magnitudes_of_both_signs_take_the_first(form: Quantization) -> None:
    signs = torch.randint(0, 2, (40, 256), generator=torch.Generator().manual_seed(6)) * 2 - 1
    weight = signs * 0.7
    assert torch.equal(unpacked(weight, form), quantize_dequantize(weight, form))


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_zeros_stay_zeros(form: Quantization) -> None:
    assert (unpacked(torch.zeros(33, 70), form) == 0).all()


def test_the_largest_floats_fit_int8() -> None:
    weight = torch.full((3, 70), torch.finfo(torch.float32).max)
    assert torch.equal(unpacked(weight, INT8), quantize_dequantize(weight, INT8))


def test_int4_keeps_the_largest_weight_that_its_scales_can() -> None:
    weight = torch.full((3, 70), -458528.0)
    assert torch.equal(unpacked(weight, INT4), quantize_dequantize(weight, INT4))


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused(form: Quantization, bad: float) -> None:
    """Wherever it stands, also in the last, ragged panel."""
    for place in [(0, 0), (39, 69)]:
        weight = random_weight(7, 40, 70)
        weight[place] = bad
        with pytest.raises(ValueError, match="a weight to be quantized"):
            unpacked(weight, form)


def test_int4_refuses_a_weight_above_its_scales() -> None:
    with pytest.raises(ValueError, match="458528"):
        unpacked(torch.tensor([[458560.0]]), INT4)


@pytest.mark.parametrize("form", [INT8, INT4], ids=str)
def test_more_inputs_than_sums_can_hold_are_refused(form: Quantization) -> None:
    with pytest.raises(ValueError, match="131072 input features, not 131073"):
        unpacked(torch.zeros(1, 131073), form)


def test_packed_bytes_are_whole_panels_and_scales() -> None:
    """Two panels of 128 inputs; int4 has a scale for each 32."""
    pool, weight = _native.Pool(1, [], 0), random_weight(8, 33, 65)
    assert packed(pool, weight, INT8).num_bytes == 2 * 32 * (128 + 4)
    assert packed(pool, weight, INT4).num_bytes == 2 * 32 * (64 + 4 * 2)
