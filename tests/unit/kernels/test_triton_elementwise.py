"""The row-wise Triton kernels beyond the common contract: odd sizes, views, one row alone, rounding."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.triton import elementwise as on_its_device
from tests.unit.kernels.device_home import on_test_device

elementwise = on_test_device(on_its_device)
REFERENCE = ReferenceKernels()
ROUNDING = {torch.float32: 2e-6, torch.bfloat16: 8e-3}
"""One rounding of values of order 1 to the dtype; in float32 also those of a sum of some hundred."""


def rand(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: Tensor, expected: Tensor) -> None:
    tolerance = ROUNDING[got.dtype]
    torch.testing.assert_close(got.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 100), (70, 16), (2, 1030)])
def test_norms_of_any_size(rows: int, width: int, dtype: torch.dtype) -> None:
    """Narrow rows share a program, wide ones do not; neither ends where its block does."""
    x, weight = rand(rows, width, dtype=dtype), rand(width, dtype=dtype, seed=1)
    check(
        elementwise.rms_norm(x, weight, eps=1e-5, weight_offset=1.0),
        REFERENCE.rms_norm(x, weight, eps=1e-5, weight_offset=1.0),
    )
    if width > 1:  # of one value the variance is 0
        check(
            elementwise.layer_norm(x, weight, weight, eps=1e-5),
            REFERENCE.layer_norm(x, weight, weight, eps=1e-5),
        )


def test_pieces_of_a_fused_product_are_read_where_they_lie() -> None:
    """Views with a stride of the whole row, as a fused projection gives them."""
    fused = rand(5, 96)
    query, gate, up = fused[:, :48].view(5, 3, 16), fused[:, 16:56], fused[:, 56:]
    weight, angles = rand(16, seed=1), torch.randn(5, 12)
    check(
        elementwise.rms_norm(query, weight, eps=1e-5, weight_offset=0.0),
        REFERENCE.rms_norm(query, weight, eps=1e-5, weight_offset=0.0),
    )
    key = fused[:, 64:96].view(5, 2, 16)
    for got, expected in zip(
        elementwise.rope(query, key, angles), REFERENCE.rope(query, key, angles), strict=True
    ):
        check(got, expected)
    check(elementwise.silu_and_mul(gate, up), REFERENCE.silu_and_mul(gate, up))


def test_a_row_is_the_same_alone_and_among_others() -> None:
    x, weight = rand(19, 200), rand(200, seed=1)
    normed = elementwise.rms_norm(x, weight, eps=1e-5, weight_offset=0.0)
    activated = elementwise.gelu_and_mul(x, x, tanh=True)
    for row in (0, 18):
        alone = x[row : row + 1]
        assert torch.equal(elementwise.rms_norm(alone, weight, eps=1e-5, weight_offset=0.0)[0], normed[row])
        assert torch.equal(elementwise.gelu_and_mul(alone, alone, tanh=True)[0], activated[row])


def test_angles_of_far_positions_are_those_of_float64() -> None:
    """A million radians leave float32's own cosine few digits; these are exact to a rounding."""
    positions, frequencies = torch.tensor([1, 131_071, 10_000_000]), torch.tensor([1.0, 0.37, 1e-6])
    got = elementwise.rope_angles(positions, frequencies, factor=1.2079441541679836)
    expected = REFERENCE.rope_angles(positions, frequencies, factor=1.2079441541679836)
    torch.testing.assert_close(got, expected, atol=0, rtol=2e-7)


def test_results_are_rounded_to_the_even_neighbour() -> None:
    """Halves between two bfloat16 in both directions, the largest, and what rounds to infinity."""
    halves = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-8, 3.3895314e38, 3.4e38, 0.0])
    unit, first = torch.ones(1, 1, dtype=torch.bfloat16), torch.tensor([0])
    got = [elementwise.embedding(first, unit, scale=value).item() for value in halves.tolist()]
    assert got == halves.bfloat16().tolist()


def test_activations_of_large_numbers_do_not_overflow() -> None:
    x, ones = torch.tensor([[-300.0, -90.0, 90.0, 300.0, 1e30]]), torch.ones(1, 5)
    for tanh in (False, True):
        assert torch.equal(elementwise.gelu(x[:, :4], tanh=tanh), x[:, :4].clamp_min(0) + 0.0)
    assert torch.allclose(elementwise.silu_and_mul(x, ones), x.clamp_min(0), atol=1e-35)


def test_softcap_keeps_the_digits_of_small_values() -> None:
    x = torch.tensor([1e-6, 1e-3, 0.5, 7.4, 7.6, 29.0, 400.0]).repeat(2, 1)
    x[1] *= -1
    expected = 30 * torch.tanh(x.double() / 30)
    torch.testing.assert_close(elementwise.softcap(x.clone(), cap=30.0).double(), expected, atol=0, rtol=1e-6)


def test_a_token_id_out_of_range_reads_nothing() -> None:
    weight = rand(4, 6)
    got = elementwise.embedding(torch.tensor([-2, 3, 4]), weight, scale=1.0)
    assert torch.equal(
        got, torch.stack([torch.zeros_like(weight[0]), weight[3], torch.zeros_like(weight[0])])
    )


def test_no_rows_are_no_launch() -> None:
    x, weight = rand(0, 16), rand(16)
    assert elementwise.rms_norm(x, weight, eps=1e-5, weight_offset=0.0).shape == (0, 16)
    assert elementwise.silu_and_mul(x, x).shape == (0, 16)
    query, key = elementwise.rope(x.view(0, 2, 8), x[:, :8].view(0, 1, 8), torch.empty(0, 8))
    assert (query.shape, key.shape) == ((0, 2, 8), (0, 1, 8))
    assert elementwise.embedding(torch.empty(0, dtype=torch.int64), rand(3, 16), scale=1.0).shape == (0, 16)


def test_flags_name_the_rows_that_are_not_finite() -> None:
    """On the device: a tensor that can travel with the sampled tokens."""
    x = rand(4, 5000, dtype=torch.float32)
    x[1, 4999], x[3, 0] = torch.inf, torch.nan
    assert elementwise.not_finite(x).tolist() == [False, True, False, True]
