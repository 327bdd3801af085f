"""Products by tiles: every bit as the instructions' definition says, whatever the shape of the rows."""

import pytest
import torch
from torch import Tensor

from tests.unit.kernels_native.amx_linear_case import (
    TILE_ISAS,
    WeightKind,
    multiply,
    random_bf16,
    tile_product,
    unpacked,
)

pytestmark = pytest.mark.skipif(not TILE_ISAS, reason="tiles are emulated with AVX-512")

ROWS = [1, 2, 3, 5, 8, 15, 16, 17, 20, 31, 32, 33, 40, 47, 48, 49, 64, 65, 70, 95, 96, 97, 130]
"""Below, at and above one tile, a pair of tiles, and the driver's 96 rows."""

SHAPES = [
    (1, 1),
    (5, 33),
    (31, 63),
    (32, 64),
    (33, 65),
    (40, 255),
    (64, 256),
    (70, 300),
    (96, 513),
    (33, 897),
]
"""(out features, in features): no full panel, full ones, one step of a row to several blocks of K."""

INT8 = WeightKind(format="int8", quantized_rows=True)


INT4 = [WeightKind(format="int4", group_size=group, quantized_rows=True) for group in (32, 64, 128)]

WEIGHT_ONLY = [
    WeightKind(format="int8"),
    *(WeightKind(format="int4", group_size=group) for group in (32, 64, 128)),
]


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether all values are equal, NaN to NaN."""
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bf16_tiles_round_as_the_instruction_says(isa: str, shape: tuple[int, int]) -> None:
    """All row counts: even and odd inputs apart, fused multiply-adds, one sum for each 32 inputs."""
    features, inputs = shape
    weight = random_bf16(1, features, inputs)
    rows = random_bf16(2, max(ROWS), inputs)
    wanted = tile_product(rows, weight)
    for num_rows in ROWS:
        assert torch.equal(multiply(isa, rows[:num_rows], weight), wanted[:num_rows]), num_rows


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", [INT8, *INT4], ids=str)
def test_integer_tiles_give_the_vector_kernels_bits(
    isa: str, shape: tuple[int, int], kind: WeightKind
) -> None:
    """Integer sums are exact, and float32 follows in the same order: within a group and over groups."""
    features, inputs = shape
    weight = random_bf16(3, features, inputs)
    rows = random_bf16(4, max(ROWS), inputs)
    wanted = multiply("avx512", rows, weight, kind)
    for num_rows in ROWS:
        assert same_bits(multiply(isa, rows[:num_rows], weight, kind), wanted[:num_rows]), num_rows


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", WEIGHT_ONLY, ids=str)
def test_weight_only_tiles_are_close_to_float64(isa: str, shape: tuple[int, int], kind: WeightKind) -> None:
    """The product of the bf16 rows with what the packed weight stands for; alone, in company, at every row count."""
    features, inputs = shape
    weight = random_bf16(9, features, inputs)
    rows = random_bf16(10, max(ROWS), inputs)
    stands_for = unpacked(weight, kind).double()
    product = multiply(isa, rows, weight, kind)
    # A float32 sum of K products: each of the K / 2 + K / 32 additions rounds a partial sum by 2^-24 at most.
    bound = rows.double().abs() @ stands_for.abs().T * 2.0**-24 * inputs
    assert ((product - rows.double() @ stands_for.T).abs() <= bound).all()
    for num_rows in ROWS:
        assert same_bits(multiply(isa, rows[:num_rows], weight, kind), product[:num_rows]), num_rows


@pytest.mark.parametrize("isa", TILE_ISAS)
def test_int8_sums_are_exact_at_the_extremes(isa: str) -> None:
    """2,112 products of +-127: sums of 34 million, where float32 would round."""
    signs = torch.tensor([1.0, -1.0])[torch.arange(2112) % 7 // 6]
    rows = (signs * 127).repeat(20, 1).to(torch.bfloat16)
    weight = (signs * 127).repeat(33, 1).to(torch.bfloat16)
    assert torch.equal(multiply(isa, rows, weight, INT8), torch.full((20, 33), 127.0 * 127.0 * 2112))


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("kind", [WeightKind(), INT8, *INT4, *WEIGHT_ONLY], ids=str)
def test_a_rows_result_does_not_depend_on_its_neighbours_or_threads(isa: str, kind: WeightKind) -> None:
    """Alone, in every company and by two threads: the same bits."""
    weight, rows = random_bf16(5, 70, 330), random_bf16(6, 120, 330)
    wanted = multiply(isa, rows, weight, kind)
    assert same_bits(multiply(isa, rows, weight, kind, threads=2), wanted)
    for first, end in [(0, 1), (119, 120), (3, 19), (3, 20), (7, 57), (24, 120)]:
        assert same_bits(multiply(isa, rows[first:end], weight, kind), wanted[first:end]), (first, end)


@pytest.mark.parametrize("isa", TILE_ISAS)
def test_denormals_are_zero_to_the_bf16_tiles(isa: str) -> None:
    """Inputs below 2^-126 count as 0, and so do products: documented, and unlike the reference."""
    weight = torch.full((3, 64), 2.0**100).to(torch.bfloat16)
    assert not multiply(isa, torch.full((2, 64), 2.0**-130).to(torch.bfloat16), weight).any()
    small = torch.full((2, 64), 2.0**-70).to(torch.bfloat16)
    assert not multiply(isa, small, small).any()
    assert multiply(isa, torch.full((2, 64), 2.0**-126).to(torch.bfloat16), weight).eq(64 * 2.0**-26).all()


@pytest.mark.parametrize("isa", TILE_ISAS)
def test_nan_and_infinity_stay_in_their_row(isa: str) -> None:
    rows, weight = random_bf16(7, 40, 100), random_bf16(8, 40, 100).abs() + 1
    rows[17, 99], rows[39, 0] = float("nan"), float("inf")
    product = multiply(isa, rows, weight)
    assert product[17].isnan().all()
    assert product[39].isinf().all()
    others = [r for r in range(40) if r not in (17, 39)]
    assert same_bits(product[others], tile_product(rows[others], weight))


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("kind", [WeightKind(), INT8], ids=str)
@pytest.mark.parametrize("num_rows", [560, 530])
def test_long_rows_by_parts_of_k_have_the_bits_of_all_at_once(
    isa: str, kind: WeightKind, num_rows: int
) -> None:
    """Many rows of 16 KiB are multiplied part by part; one of them alone is not."""
    inputs = 8200 if kind.format == "bf16" else 16400
    weight, rows = random_bf16(11, 40, inputs), random_bf16(12, num_rows, inputs)
    product = multiply(isa, rows, weight, kind, threads=2)
    for row in (0, 31, 300, 511, 512, 527, num_rows - 1):
        assert same_bits(product[row : row + 1], multiply(isa, rows[row : row + 1], weight, kind)), row
