"""Weights that a checkpoint has rounded: packed without a change, multiplied like all others."""

import pytest
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.cpu import _native, weights
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.rounded import RoundedWeight
from tests.unit.kernels_native.linear_case import ISAS, address, input_rows
from tests.unit.kernels_native.quantized_case import FORMATS, quantized_rows

SHAPES = [(1, 1), (31, 7), (33, 64), (40, 65), (70, 300), (3, 1000)]


def random_rounded(form: Quantization, shape: tuple[int, int], *, seed: int = 1) -> RoundedWeight:
    """Every value of the format, scales of both signs."""
    generator = torch.Generator().manual_seed(seed)
    low, high = (-128, 127) if form.method == "int8" else (-8, 7)
    values = torch.randint(low, high + 1, shape, generator=generator).to(torch.int8)
    groups = -(-shape[1] // form.group_size)
    size = (shape[0],) if form.method == "int8" else (shape[0], groups)
    scales = torch.randn(size, generator=generator) * 0.01
    dtype = torch.float32 if form.method == "int8" else torch.float16
    return RoundedWeight(values=values, scales=scales.to(dtype), quantization=form)


def packed(weight: RoundedWeight, parts: tuple[int, ...] = ()) -> weights.PackedLinear:
    return weights.pack_rounded(_native.Pool(2, [], 0), weight, None, parts=parts)


@pytest.mark.parametrize("form", FORMATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_values_are_the_given_ones(form: Quantization, shape: tuple[int, int]) -> None:
    weight = random_rounded(form, shape)
    assert torch.equal(weights.unpacked(packed(weight)), weight.dequantized())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_pieces_keep_their_rows_and_scales(form: Quantization, monkeypatch: pytest.MonkeyPatch) -> None:
    """By parts that are asked for, and by the bound on a piece."""
    weight = random_rounded(form, (100, 96))
    assert torch.equal(weights.unpacked(packed(weight, (64, 36))), weight.dequantized())
    monkeypatch.setattr(weights, "PIECE_VALUES", 32 * 96)
    pieces = packed(weight)
    assert [piece.start for piece in pieces.pieces] == [0, 32, 64, 96]
    assert torch.equal(weights.unpacked(pieces), weight.dequantized())


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_packing_what_the_rule_rounds_gives_the_rules_bytes(form: Quantization) -> None:
    """A weight that is rounded here, and the same integers and scales given: the same product, bit for bit."""
    from penstock.kernels.reference.quantize import quantize_int4, quantize_int8

    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(3))
    if form.method == "int8":
        values, scales = quantize_int8(weight)
    else:
        values, scales = quantize_int4(weight, group_size=form.group_size)
    given = packed(RoundedWeight(values=values.contiguous(), scales=scales.contiguous(), quantization=form))
    pool = _native.Pool(2, [], 0)
    ours = weights.pack_linear(pool, weight, None, quantization=form, parts=(), release=None)
    assert torch.equal(weights.unpacked(given), weights.unpacked(ours))
    assert given.num_bytes == ours.num_bytes


def refused(weight: RoundedWeight) -> None:
    with pytest.raises(ValueError, match="value out of range, or a scale that is not finite"):
        packed(weight)


@pytest.mark.parametrize("bad", [8, -9, 127])
def test_a_value_that_is_no_int4_is_refused(bad: int) -> None:
    weight = random_rounded(FORMATS[1], (33, 64))
    weight.values[32, 63] = bad
    refused(weight)


@pytest.mark.parametrize("form", FORMATS[:2], ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_scale_that_is_not_finite_is_refused(form: Quantization, bad: float) -> None:
    weight = random_rounded(form, (33, 64))
    weight.scales.view(-1)[-1] = bad
    refused(weight)


def product(isa: str, weight: RoundedWeight, rows: Tensor) -> Tensor:
    """rows @ weight.T in float32."""
    pool = _native.Pool(2, [], 0)
    program = _native.Program(pool, isa, True)
    is_quantized = weight.quantization.quantizes_activations
    x = (quantized_rows if is_quantized else input_rows)(program, rows.shape[1])
    out = program.add_external(_native.DType.f32, weight.values.shape[0])
    matrix = packed(weight).pieces[0].matrix
    _native.add_linear(program, x=x, matrices=[matrix], biases=[0], outs=[out], add=False)
    result = torch.full((rows.shape[0], weight.values.shape[0]), float("nan"))
    program.run(rows.shape[0], [address(rows), address(result)], [])
    return result


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [127, -127])
def test_minus_128_neither_saturates_nor_wraps(isa: str, value: int) -> None:
    """Our own rule never makes it, others' int8 does: all inputs at their end, exact to the last bit."""
    values = torch.full((33, 2048), -128, dtype=torch.int8)
    weight = RoundedWeight(values=values, scales=torch.ones(33), quantization=Quantization(method="int8"))
    rows = torch.full((7, 2048), value).bfloat16()
    assert (product(isa, weight, rows) == -128.0 * value * 2048).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_homes_agree_on_what_a_rounded_weight_is(form: Quantization) -> None:
    """The reference's product within float32 roundings, weight only."""
    form = Quantization(method=form.method, group_size=form.group_size, activations="bf16")
    weight = random_rounded(form, (40, 256))
    rows = torch.randn(5, 256, generator=torch.Generator().manual_seed(4)).bfloat16()
    prepared = ops.prepare_rounded(ReferenceKernels(), weight, dtype=torch.bfloat16)
    expected = ops.linear(ReferenceKernels(), rows, prepared).float()
    torch.testing.assert_close(product(ISAS[-1], weight, rows), expected, atol=0.02, rtol=0.02)
