"""The Triton products beyond the common contract: every form and tiling, bits alone and in a batch, the packing."""

from itertools import product

import pytest
import torch
from torch import Tensor

from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization
from penstock.kernels.reference.dense import linear_wide
from penstock.kernels.reference.quantize import quantize_fp8, quantize_int4, quantize_int8, round_rows
from penstock.kernels.reference.weights import prepare_plain
from penstock.kernels.rounded import RoundedWeight
from penstock.kernels.triton import linear, weights
from penstock.kernels.triton.kernel_set import TritonKernels
from penstock.kernels.triton.linear import choose_tiling
from penstock.kernels.triton.weights import TritonLinear
from tests.unit.kernels.device_home import on_test_device

prepare = on_test_device(weights).prepare
multiply, round_to_device = on_test_device(linear).multiply, on_test_device(linear).round_rows

RULES = [
    NO_QUANTIZATION,
    Quantization(method="int8", activations="int8"),
    Quantization(method="int8", activations="bf16"),
    *(
        Quantization(method="int4", group_size=size, activations=activations)
        for size, activations in product((32, 128), ("int8", "bf16"))
    ),
    Quantization(method="int4", group_size=64, activations="bf16"),
    Quantization(method="fp8", activations="int8"),
    Quantization(method="fp8", activations="bf16"),
]
ROUNDING = 1e-2
"""One rounding to bfloat16 of values up to about 4; the sums before it run in float32 or int32."""


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make(rule: Quantization, *, outputs: int, inputs: int) -> tuple[Tensor, Tensor, TritonLinear]:
    weight, bias = rand(outputs, inputs, seed=1) / inputs**0.5, rand(outputs, seed=2)
    return weight, bias, prepare(weight, bias, quantization=rule)


@pytest.mark.parametrize(
    "rule",
    [
        # Another group is another constant, with both kinds of activations.
        pytest.param(rule, marks=[pytest.mark.slow] if rule in (RULES[5], RULES[7]) else [])
        for rule in RULES
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("rows", "inputs", "is_deterministic"), [(1, 130, False), (3, 1100, False), (70, 72, True)]
)
def test_products_of_any_size_are_those_of_the_reference(
    rule: Quantization, rows: int, inputs: int, is_deterministic: bool
) -> None:
    """One row and many, inputs in one chunk and in two, ends inside a group, a block and a tile."""
    weight, bias, prepared = make(rule, outputs=70, inputs=inputs)
    x = rand(rows, inputs, seed=3)
    known = prepare_plain(weight, bias, quantization=rule, dtype=None)
    expected = linear_wide(known.rounded(x), known.weight) + bias.double()
    got = multiply(x, prepared, is_deterministic=is_deterministic, dtype=torch.bfloat16)
    torch.testing.assert_close(got.double(), expected, atol=ROUNDING, rtol=ROUNDING)


@pytest.mark.parametrize("rule", [NO_QUANTIZATION, RULES[1], RULES[4]], ids=str)
def test_deterministic_rows_are_bit_equal_alone_and_in_a_batch(rule: Quantization) -> None:
    """66 rows are more than a tile: their chunks are summed in turn, those of one row side by side."""
    _, _, prepared = make(rule, outputs=24, inputs=1100)
    kernels = on_test_device(TritonKernels(KernelOptions(is_deterministic=True)))
    x = rand(66, 1100, seed=3)
    whole = kernels.linear(x, prepared)
    assert not choose_tiling(66, prepared, is_deterministic=True).is_parallel
    assert choose_tiling(1, prepared, is_deterministic=True).is_parallel
    for start, end in ((0, 1), (65, 66), (3, 20)):
        assert torch.equal(kernels.linear(x[start:end], prepared), whole[start:end])


@pytest.mark.parametrize("shape", [(4096, 4096), (1024, 4096), (128_256, 4096), (2048, 8192), (70, 72)])
def test_deterministic_chunks_and_tiles_follow_from_the_weight_alone(shape: tuple[int, int]) -> None:
    weight = TritonLinear(
        values=torch.empty(*shape, device="meta"),
        scales=None,
        bias=None,
        in_features=shape[1],
        quantization=NO_QUANTIZATION,
    )
    tilings = [choose_tiling(rows, weight, is_deterministic=True) for rows in (1, 2, 64, 65, 8192)]
    fixed = {(each.rows, each.outputs, each.inputs, each.chunk, each.splits) for each in tilings}
    assert len(fixed) == 1
    for each in tilings:
        assert each.chunk % each.inputs == 0
        assert (each.splits - 1) * each.chunk < shape[1] <= each.splits * each.chunk


def test_rounded_weights_are_kept_as_they_are() -> None:
    """The integers and scales of a checkpoint, not new ones: nothing is rounded twice."""
    made = rand(6, 200).float()
    values, scales = quantize_int8(made)
    kept = weights.prepare_rounded(
        RoundedWeight(values=values, scales=scales, quantization=Quantization(method="int8")), None
    )
    assert kept.values is values
    assert kept.scales is scales
    rule = Quantization(method="int4", group_size=64)
    values, scales = quantize_int4(made, group_size=64)
    values = values[:, :200].contiguous()
    kept = weights.prepare_rounded(RoundedWeight(values=values, scales=scales, quantization=rule), None)
    assert kept.num_bytes == 6 * 128 + scales.nbytes
    low, high = (kept.values & 15).view(6, 2, 64), (kept.values >> 4).view(6, 2, 64)
    unpacked = torch.stack([low, high], dim=2).flatten(1).to(torch.int8) - 8
    assert torch.equal(unpacked[:, :200], values)


def test_int4_packing_by_hand() -> None:
    """The example of the docstring."""
    packed = weights.pack_int4(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.int8), half=2)
    assert packed.tolist() == [[9 | 11 << 4, 10 | 12 << 4, 13 | 8 << 4, 8 | 8 << 4]]


def test_rounded_rows_are_those_of_the_rule() -> None:
    x = rand(5, 300) * torch.tensor([[1.0], [1e-3], [1e4], [0.0], [1.0]]).bfloat16()
    values, scales = round_to_device(x, "int8")
    assert torch.equal(values.float() * scales[:, None], round_rows(x))
    values, scales = round_to_device(x, "fp8")
    expected, expected_scales = quantize_fp8(x)
    assert torch.equal(values.float(), expected.float())
    assert torch.equal(scales, expected_scales)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy tells of the NaN that is wanted
def test_a_row_that_is_not_finite_stays_so_when_it_is_rounded() -> None:
    """Rounding must not hide what ends that sequence, and must leave the other rows alone."""
    rule = Quantization(method="int8")
    _, _, prepared = make(rule, outputs=8, inputs=40)
    x = rand(3, 40)
    x[1, 5] = torch.inf
    got = multiply(x, prepared, is_deterministic=False, dtype=torch.bfloat16)
    assert got[1].isnan().all()
    assert got[[0, 2]].isfinite().all()


def test_a_fused_piece_and_a_transposed_weight_are_read_right() -> None:
    fused, weight = rand(4, 96), rand(48, 10, seed=1).t()
    prepared = prepare(weight, None, quantization=NO_QUANTIZATION)
    for is_deterministic in (False, True):
        for rows in (1, 4):
            x = fused[:rows, 48:]
            got = multiply(x, prepared, is_deterministic=is_deterministic, dtype=torch.float32)
            torch.testing.assert_close(got.double(), x.double() @ weight.double().t(), atol=1e-4, rtol=1e-5)
