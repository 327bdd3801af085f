"""One rule of rounding: what the native home packs stands for exactly what the plain rule says."""

import pytest
import torch

from penstock.kernels import ops
from penstock.kernels.cpu.weights import PackedLinear, unpacked
from penstock.kernels.options import DEFAULT_OPTIONS
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.quantize import (
    dequantize_int4,
    quantize_dequantize,
    quantize_int4,
    quantize_int8,
    round_rows,
)
from penstock.kernels.registry import HOMES

RULES = [
    Quantization(method="int8"),
    *(Quantization(method="int4", group_size=size) for size in (32, 64, 128)),
]
SHAPES = [(1, 1), (33, 64), (40, 100), (7, 129), (96, 896)]


def weight(out_features: int, in_features: int, *, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(out_features * 1000 + in_features)
    made = torch.randn(out_features, in_features, generator=generator)
    made[0] = 0.0  # a row without a scale
    made[-1, -1] = 30.0  # one value that leaves the others few steps
    return made.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_packed_weights_stand_for_what_the_rule_says(
    rule: Quantization, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    made = weight(*shape, dtype=dtype)
    kernels = HOMES["native"].build(DEFAULT_OPTIONS)
    packed = ops.prepare_linear(kernels, made, quantization=rule)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(unpacked(packed), quantize_dequantize(made, rule))


def test_a_transposed_view_is_packed_as_it_reads() -> None:
    made = weight(64, 48, dtype=torch.bfloat16).t()
    packed = ops.prepare_linear(HOMES["native"].build(DEFAULT_OPTIONS), made)
    assert isinstance(packed, PackedLinear)
    assert torch.equal(unpacked(packed), made.float())


def test_a_weight_in_pieces_is_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are packed piece by piece; told rows are those of the source, in order."""
    from penstock.kernels.cpu import weights

    monkeypatch.setattr(weights, "PIECE_VALUES", 32 * 48)
    made, released = weight(100, 48, dtype=torch.bfloat16), []
    kernels = HOMES["native"].build(DEFAULT_OPTIONS)
    bias = torch.arange(100, dtype=torch.bfloat16)
    packed = ops.prepare_linear(kernels, made, bias, release=lambda rows: released.append(len(rows)))
    assert isinstance(packed, PackedLinear)
    assert released == [32, 32, 32, 4]
    assert torch.equal(unpacked(packed), made.float())
    x = weight(3, 48, dtype=torch.bfloat16)
    expected = x.double() @ made.double().t() + bias.double()
    torch.testing.assert_close(ops.linear(kernels, x, packed).double(), expected, atol=0.5, rtol=1e-2)


def test_int8_by_hand() -> None:
    values, scales = quantize_int8(torch.tensor([[2.54, -1.27, 0.0], [0.0, 0.0, 0.0]]))
    assert values.tolist() == [[127, -64, 0], [0, 0, 0]]
    assert scales.tolist() == pytest.approx([0.02, 0.0])


def test_int4_takes_the_divisor_with_the_least_error() -> None:
    """Eight values on a grid of minus their extreme's eighth are kept exactly."""
    made = torch.tensor([[-8.0, 7.0, 3.0, -5.0, 0.0, 1.0, 2.0, 6.0] + [0.0] * 24])
    values, scales = quantize_int4(made, group_size=32)
    assert torch.equal(dequantize_int4(values, scales, in_features=32), made)


def test_rows_are_rounded_each_with_its_own_scale() -> None:
    x = torch.tensor([[1.27, 0.004, 0.0], [127.0, 0.4, 0.6], [0.0, 0.0, 0.0]])
    assert torch.allclose(round_rows(x), torch.tensor([[1.27, 0.0, 0.0], [127.0, 0.0, 1.0], [0.0, 0.0, 0.0]]))
