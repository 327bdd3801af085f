"""Products of one input as one in Triton: the same values in every format, and who stays apart."""

import pytest
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.quantization import Method, Quantization
from penstock.kernels.rounded import RoundedWeight
from penstock.kernels.triton.kernel_set import TritonKernels
from tests.unit.kernels.device_home import on_test_device

KERNELS: ops.KernelSet = on_test_device(TritonKernels())
SIZES = (40, 24, 9)
INPUTS = 160
TOLERANCE = 1e-5
"""Sums of float32 in another order: a joined product is cut otherwise."""


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 12


def prepared(seed: int, num_outputs: int, rule: Quantization, *, with_bias: bool) -> ops.LinearWeight:
    bias = rand(num_outputs, seed=seed + 10) if with_bias else None
    return ops.prepare_linear(KERNELS, rand(num_outputs, INPUTS, seed=seed), bias, quantization=rule)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["none", "int8", "int4", "fp8"])
def test_a_joined_weight_multiplies_as_its_parts_side_by_side(method: Method, rows: int) -> None:
    """Biases on some of them only: the others get zeros."""
    rule = Quantization(method=method, group_size=32)
    apart = [prepared(seed, size, rule, with_bias=seed != 1) for seed, size in enumerate(SIZES)]
    joined = ops.join_linears(KERNELS, apart)
    assert joined is not None
    assert (joined.out_features, joined.in_features) == (sum(SIZES), INPUTS)
    assert joined.num_bytes == sum(each.num_bytes for each in apart) + 4 * SIZES[1]
    x = rand(rows, INPUTS, seed=7)
    expected = torch.cat([ops.linear(KERNELS, x, each) for each in apart], dim=1)
    got = ops.linear(KERNELS, x, joined)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_weights_that_a_checkpoint_has_rounded_are_joined_as_they_are() -> None:
    rule = Quantization(method="int4", group_size=128, activations="bf16")
    rounded = [
        RoundedWeight(
            values=torch.randint(
                -8, 8, (size, INPUTS), dtype=torch.int8, generator=torch.Generator().manual_seed(size)
            ),
            scales=rand(size, 2, seed=size).half(),
            quantization=rule,
        )
        for size in SIZES
    ]
    apart = [ops.prepare_rounded(KERNELS, each, dtype=torch.float32) for each in rounded]
    joined = ops.join_linears(KERNELS, apart)
    assert joined is not None
    assert joined.num_bytes == sum(each.num_bytes for each in apart)
    x = rand(2, INPUTS, seed=7)
    expected = x.double() @ torch.cat([each.dequantized() for each in rounded]).double().t()
    torch.testing.assert_close(
        ops.linear(KERNELS, x, joined).double(), expected, atol=TOLERANCE, rtol=TOLERANCE
    )


@pytest.mark.parametrize(
    "other",
    [
        Quantization(),
        Quantization(method="int8"),
        Quantization(method="int4", group_size=64),
        Quantization(method="int4", group_size=32, activations="bf16"),
    ],
    ids=str,
)
def test_weights_of_different_forms_stay_apart(other: Quantization) -> None:
    rule = Quantization(method="int4", group_size=32)
    apart = [prepared(0, 8, rule, with_bias=False), prepared(1, 8, other, with_bias=False)]
    assert ops.join_linears(KERNELS, apart) is None
