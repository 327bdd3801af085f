"""Mixtures of experts in Triton: the order of pairs, rounded experts, and bits alone and in a batch."""

import pytest
import torch
from torch import Tensor

from penstock.core.errors import UnsupportedModelError
from penstock.kernels import ops
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.triton import moe
from penstock.kernels.triton.kernel_set import TritonKernels
from tests.unit.kernels.device_home import on_test_device

choose_experts, order_pairs = on_test_device(moe).choose_experts, on_test_device(moe).order_pairs

HIDDEN, INNER, EXPERTS = 72, 40, 5


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def make_experts(kernels: ops.KernelSet, rule: Quantization) -> list[ops.ExpertWeights]:
    def prepared(outputs: int, inputs: int, seed: int) -> ops.LinearWeight:
        return ops.prepare_linear(kernels, rand(outputs, inputs, seed=seed) / inputs**0.5, quantization=rule)

    return [
        ops.ExpertWeights(
            gate=prepared(INNER, HIDDEN, 3 * i),
            up=prepared(INNER, HIDDEN, 3 * i + 1),
            down=prepared(HIDDEN, INNER, 3 * i + 2),
        )
        for i in range(EXPERTS)
    ]


def test_pairs_are_ordered_by_expert_and_filled_up_to_blocks() -> None:
    """The example at the top of the file."""
    chosen = torch.tensor([[1, 0], [1, 2], [0, 1]], dtype=torch.int32)
    found = order_pairs(chosen, num_experts=3, rows=2)
    assert found.block_experts.tolist() == [0, 1, 1, 2, -1, -1]
    assert found.order[:8].tolist() == [1, 4, 0, 2, 5, -1, 3, -1]


@pytest.mark.parametrize("rows", [16, 64])
def test_every_pair_stands_once_in_a_block_of_its_expert(rows: int) -> None:
    """Of 1,300 pairs, more than one program looks at in a turn; one expert of seven has none."""
    chosen = torch.randint(0, 6, (650, 2), generator=torch.Generator().manual_seed(0)).int()
    found = order_pairs(chosen, num_experts=7, rows=rows)
    blocks = found.order.view(-1, rows)
    seen = []
    for block, expert in zip(blocks.tolist(), found.block_experts.tolist(), strict=True):
        pairs = [pair for pair in block if pair >= 0] if expert >= 0 else []
        assert all(chosen.flatten()[pair] == expert for pair in pairs)
        assert pairs == sorted(pairs)
        seen += pairs
    assert sorted(seen) == list(range(1300))


def test_of_equal_experts_the_first_is_chosen() -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])
    weights, chosen = choose_experts(logits, ops.MoeShape(top_k=2, renormalize=True))
    assert chosen.tolist() == [[1, 2]]
    assert weights.flatten().tolist() == pytest.approx([0.5, 0.5])


@pytest.mark.parametrize(
    "rule",
    [
        Quantization(method="int8"),
        Quantization(method="int4", group_size=32, activations="bf16"),
        Quantization(method="int4", group_size=32, activations="int8"),
        Quantization(method="fp8"),
    ],
    ids=str,
)
def test_rounded_experts_are_those_of_the_reference(rule: Quantization) -> None:
    x, router, shape = (
        rand(9, HIDDEN, seed=90),
        rand(EXPERTS, HIDDEN, seed=91),
        ops.MoeShape(top_k=2, renormalize=True),
    )
    plain, kernels = ReferenceKernels(), on_test_device(TritonKernels())
    expected = ops.moe(plain, x, router, make_experts(plain, rule), shape)
    got = ops.moe(kernels, x, router, make_experts(kernels, rule), shape)
    # The hidden values are rounded to bfloat16, and to int8 by what that rounding left of them.
    torch.testing.assert_close(got.double(), expected.double(), atol=2e-2, rtol=2e-2)


def test_deterministic_rows_are_bit_equal_alone_and_in_a_batch() -> None:
    kernels = on_test_device(TritonKernels(KernelOptions(is_deterministic=True)))
    experts = make_experts(kernels, NO_QUANTIZATION)
    x, router, shape = (
        rand(33, HIDDEN, seed=90),
        rand(EXPERTS, HIDDEN, seed=91),
        ops.MoeShape(top_k=3, renormalize=False),
    )
    whole = ops.moe(kernels, x, router, experts, shape)
    for row in (0, 17, 32):
        assert torch.equal(ops.moe(kernels, x[row : row + 1], router, experts, shape)[0], whole[row])


def test_weights_that_were_moved_are_found_again() -> None:
    """As after a sleep: the same layer, its tensors elsewhere."""
    kernels = on_test_device(TritonKernels())
    experts = make_experts(kernels, NO_QUANTIZATION)
    x, router, shape = (
        rand(2, HIDDEN, seed=90),
        rand(EXPERTS, HIDDEN, seed=91),
        ops.MoeShape(top_k=2, renormalize=True),
    )
    before = ops.moe(kernels, x, router, experts, shape)
    for expert in experts:
        for weight in (expert.gate, expert.up, expert.down):
            old = weight.values
            weight.values = torch.cat([old.new_zeros(64), old.flatten()])[64:].view_as(old)
    assert torch.equal(ops.moe(kernels, x, router, experts, shape), before)


def test_experts_that_are_rounded_differently_are_refused_by_name() -> None:
    kernels = on_test_device(TritonKernels())
    experts = make_experts(kernels, NO_QUANTIZATION)
    experts[3] = make_experts(kernels, Quantization(method="int8"))[3]
    with pytest.raises(UnsupportedModelError, match="quantized in different ways"):
        ops.moe(
            kernels, rand(2, HIDDEN), rand(EXPERTS, HIDDEN), experts, ops.MoeShape(top_k=1, renormalize=False)
        )
