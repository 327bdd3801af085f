"""Every home computes every operation as plain float64 math does, within a stated tolerance."""

import random
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.batch import KvShape, KvSlab
from penstock.kernels.options import DEFAULT_OPTIONS
from penstock.kernels.quantization import Activations, Method, Quantization
from penstock.kernels.reference.quantize import quantize_dequantize, round_inputs, round_rows
from penstock.kernels.registry import HOMES
from tests.unit.kernels.attention_case import make_case, poison
from tests.unit.kernels.device_home import on_test_device

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""A few roundings of values of order 1: float32 keeps 24 bits, bfloat16 8."""
EXACT = {torch.float32: 1e-6, torch.bfloat16: 8e-3}
"""The reference rounds once: half a unit in the last place of values up to about 4."""


def build(home: str) -> ops.KernelSet:
    made = HOMES[home].build(DEFAULT_OPTIONS)
    return on_test_device(made) if home == "triton" else made


HOMES_AND_DTYPES = [(name, dtype) for name, home in HOMES.items() for dtype in home.dtypes]


def home_id(home: tuple[str, torch.dtype]) -> str:
    return f"{home[0]}-{str(home[1]).removeprefix('torch.')}"


def row(home: tuple[str, torch.dtype], *values: Any, is_slow: bool) -> Any:
    """Arguments of a test; `is_slow` where they are left to `make test-slow` and to a device."""
    marks = [pytest.mark.slow] if is_slow else []
    return pytest.param(home, *values, id="-".join([home_id(home), *map(str, values)]), marks=marks)


@pytest.fixture(params=HOMES_AND_DTYPES, ids=home_id)
def home(request: pytest.FixtureRequest) -> tuple[str, torch.dtype]:
    return request.param


@pytest.fixture
def kernels(home: tuple[str, torch.dtype]) -> ops.KernelSet:
    return build(home[0])


@pytest.fixture
def dtype(home: tuple[str, torch.dtype]) -> torch.dtype:
    return home[1]


@pytest.fixture
def sizes(home: tuple[str, torch.dtype]) -> dict[str, int]:
    """The smallest that the home serves, so that tables are long."""
    if home[0] == "native":
        return {"block_size": 16, "head_dim": 32}
    return {"block_size": 4, "head_dim": 8}


def rand(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def check(got: Tensor, expected: Tensor, kernels: ops.KernelSet, dtype: torch.dtype) -> None:
    assert got.dtype == dtype
    tolerance = (EXACT if kernels.name == "reference" else TOLERANCE)[dtype]
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)


def plain_rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_divides_by_root_mean_square(
    kernels: ops.KernelSet, dtype: torch.dtype, offset: float
) -> None:
    x, weight = rand(5, 3, 24, dtype=dtype), rand(24, dtype=dtype, seed=1)
    got = ops.rms_norm(kernels, x, weight, eps=1e-5, weight_offset=offset)
    check(got, plain_rms_norm(x, weight, 1e-5, offset), kernels, dtype)


def test_add_rms_norm_returns_norm_and_sum_and_keeps_its_inputs(
    kernels: ops.KernelSet, dtype: torch.dtype
) -> None:
    x, residual, weight = (rand(7, 24, dtype=dtype, seed=i) for i in range(3))
    weight = weight[0]
    kept = residual.clone()
    normed, summed = ops.add_rms_norm(kernels, x, residual, weight, eps=1e-5)
    assert torch.equal(residual, kept)
    assert torch.equal(summed, x + residual)
    check(normed, plain_rms_norm(x + residual, weight, 1e-5, 0.0), kernels, dtype)


def test_layer_norm_centres_and_scales(kernels: ops.KernelSet, dtype: torch.dtype) -> None:
    x, weight, bias = rand(6, 20, dtype=dtype), rand(20, dtype=dtype, seed=1), rand(20, dtype=dtype, seed=2)
    wide = x.double()
    expected = (wide - wide.mean(-1, keepdim=True)) / (
        wide.var(-1, keepdim=True, unbiased=False) + 1e-5
    ).sqrt()
    check(
        ops.layer_norm(kernels, x, weight, bias, eps=1e-5),
        expected * weight.double() + bias.double(),
        kernels,
        dtype,
    )


@pytest.mark.parametrize("rotary_dim", [8, 4, 2])
def test_rope_turns_pairs_half_a_rotated_part_apart(
    kernels: ops.KernelSet, dtype: torch.dtype, rotary_dim: int
) -> None:
    both = [rand(5, heads, 8, dtype=dtype, seed=heads) for heads in (3, 2)]
    angles = rand(5, rotary_dim // 2, dtype=torch.float32, seed=1)
    turned = ops.rope(kernels, *both, torch.cat([angles.cos(), angles.sin()], dim=1))
    for x, got in zip(both, turned, strict=True):
        expected = x.double().clone()
        for i in range(rotary_dim // 2):
            a, b = x[..., i].double(), x[..., i + rotary_dim // 2].double()
            cos, sin = (f(angles[:, i].double())[:, None] for f in (torch.cos, torch.sin))
            expected[..., i], expected[..., i + rotary_dim // 2] = a * cos - b * sin, b * cos + a * sin
        check(got, expected, kernels, dtype)


def test_rope_angles_are_cosines_then_sines_of_position_times_frequency(kernels: ops.KernelSet) -> None:
    positions, frequencies = torch.tensor([0, 1, 4095, 100_000]), torch.tensor([1.0, 0.1, 1e-4])
    angles = (positions.float()[:, None] * frequencies).double()
    expected = 1.5 * torch.cat([angles.cos(), angles.sin()], dim=1)
    got = ops.rope_angles(kernels, positions, frequencies, factor=1.5)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=2e-7, rtol=2e-7)


def test_silu_and_mul(kernels: ops.KernelSet, dtype: torch.dtype) -> None:
    gate, up = rand(5, 33, dtype=dtype), rand(5, 33, dtype=dtype, seed=1)
    expected = gate.double() / (1 + (-gate.double()).exp()) * up.double()
    check(ops.silu_and_mul(kernels, gate, up), expected, kernels, dtype)


def plain_gelu(x: Tensor, *, tanh: bool) -> Tensor:
    x = x.double()
    if tanh:
        return 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("tanh", [False, True])
def test_gelu_and_gelu_and_mul(kernels: ops.KernelSet, dtype: torch.dtype, tanh: bool) -> None:
    gate, up = rand(5, 33, dtype=dtype), rand(5, 33, dtype=dtype, seed=1)
    check(ops.gelu(kernels, gate, tanh=tanh), plain_gelu(gate, tanh=tanh), kernels, dtype)
    expected = plain_gelu(gate, tanh=tanh) * up.double()
    check(ops.gelu_and_mul(kernels, gate, up, tanh=tanh), expected, kernels, dtype)


@pytest.mark.parametrize("rows", [1, 16, 37])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_multiplies_by_the_transposed_weight(
    kernels: ops.KernelSet, dtype: torch.dtype, rows: int, with_bias: bool
) -> None:
    x, weight = rand(rows, 24, dtype=dtype), rand(24, 10, dtype=dtype, seed=1).t() / 5
    bias = rand(10, dtype=dtype, seed=2) if with_bias else None
    expected = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    check(ops.linear(kernels, x, ops.prepare_linear(kernels, weight, bias)), expected, kernels, dtype)


def test_linear_covers_vocabularies_larger_than_its_column_tile(
    kernels: ops.KernelSet, dtype: torch.dtype
) -> None:
    x, weight = rand(3, 4, dtype=dtype), rand(20_000, 4, dtype=dtype, seed=1)
    prepared = ops.prepare_linear(kernels, weight)
    check(ops.linear(kernels, x, prepared), x.double() @ weight.double().t(), kernels, dtype)


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize(("method", "group_size"), [("int8", 128), ("int4", 32), ("int4", 128)])
def test_linear_multiplies_by_what_the_quantized_weight_stands_for(
    kernels: ops.KernelSet, dtype: torch.dtype, method: Method, group_size: int, activations: Activations
) -> None:
    """One rule of rounding in every home; what is left are roundings of the model's dtype."""
    quantization = Quantization(method=method, group_size=group_size, activations=activations)
    x, weight = rand(7, 160, dtype=dtype), rand(40, 160, dtype=dtype, seed=1) / 12
    prepared = ops.prepare_linear(kernels, weight, quantization=quantization)
    rounded = round_rows(x) if activations == "int8" else x
    expected = rounded.double() @ quantize_dequantize(weight, quantization).double().t()
    got = ops.linear(kernels, x, prepared)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("activations", ["int8", "bf16"])
@pytest.mark.parametrize(
    "home",
    [(name, dtype) for name, home in HOMES.items() if name != "native" for dtype in home.dtypes],
    ids=str,
    indirect=True,
)
def test_linear_multiplies_by_fp8_weights(
    kernels: ops.KernelSet, dtype: torch.dtype, activations: Activations
) -> None:
    """In every home but the native one, which refuses them at start."""
    quantization = Quantization(method="fp8", activations=activations)
    x, weight = rand(7, 160, dtype=dtype), rand(40, 160, dtype=dtype, seed=1) / 12
    prepared = ops.prepare_linear(kernels, weight, quantization=quantization)
    rounded = round_inputs(x, quantization) if activations == "int8" else x
    expected = rounded.double() @ quantize_dequantize(weight, quantization).double().t()
    got = ops.linear(kernels, x, prepared)
    torch.testing.assert_close(got.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_softcap_bounds_by_tanh(kernels: ops.KernelSet) -> None:
    x = rand(3, 50, dtype=torch.float32) * 40
    expected = 30 * torch.tanh(x.double() / 30)
    got = ops.softcap(kernels, x.clone(), cap=30.0)
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


def test_embedding_takes_rows(kernels: ops.KernelSet, dtype: torch.dtype) -> None:
    weight = rand(9, 4, dtype=dtype)
    got = ops.embedding(kernels, torch.tensor([8, 0, 8]), weight)
    assert torch.equal(got, torch.stack([weight[8], weight[0], weight[8]]))
    assert got.data_ptr() != weight.data_ptr()
    scaled = ops.embedding(kernels, torch.tensor([8]), weight, scale=55.4256)
    assert torch.equal(scaled[0], weight[8] * torch.tensor(55.4256, dtype=dtype))


@pytest.mark.parametrize("strided", [False, True])
@pytest.mark.parametrize("home", [("eager", torch.float32), ("reference", torch.float32)], indirect=True)
def test_write_kv_stores_each_token_in_its_slot_and_nothing_else(
    kernels: ops.KernelSet, strided: bool
) -> None:
    """The native layout is drawn and tested in `tests/unit/kernels_native`."""
    pool = torch.zeros(3, 2, 4, 2, 5)
    kv = KvShape(block_size=4, num_kv_heads=2, head_dim=5, dtype=torch.float32)
    slab = KvSlab(keys=pool[:, 0], values=pool[:, 1], shape=kv)
    if not strided:
        slab = KvSlab(keys=slab.keys.contiguous(), values=slab.values.contiguous(), shape=kv)
    keys, values = rand(2, 2, 5, dtype=torch.float32), rand(2, 2, 5, dtype=torch.float32, seed=1)
    ops.write_kv(kernels, keys, values, slab, torch.tensor([9, 3]))
    expected = torch.zeros(2, 3, 4, 2, 5)
    expected[0, 2, 1], expected[0, 0, 3] = keys[0], keys[1]
    expected[1, 2, 1], expected[1, 0, 3] = values[0], values[1]
    assert torch.equal(torch.stack([slab.keys, slab.values]), expected)


def beside(x: Tensor) -> Tensor:
    """The same values [T, ...] as columns of a wider product; NaN before and behind them."""
    wide = torch.full((len(x), x[0].numel() + 8), torch.nan, dtype=x.dtype)
    return wide[:, 5:-3].copy_(x.flatten(1)).view(x.shape)


def test_parts_of_a_joined_product_are_read_where_they_lie(
    kernels: ops.KernelSet, dtype: torch.dtype
) -> None:
    """From row to row lie all parts: none but the own is read, and none is written."""
    x, weight, angles = (
        rand(5, 3, 8, dtype=dtype),
        rand(8, dtype=dtype, seed=1),
        rand(5, 8, dtype=torch.float32),
    )
    gate, up = rand(5, 33, dtype=dtype), rand(5, 33, dtype=dtype, seed=1)

    def results(*parts: Tensor) -> list[Tensor]:
        heads, gate, up = parts
        return [
            *ops.rope(kernels, heads, heads[:, 1:], angles),
            ops.rms_norm(kernels, heads, weight, eps=1e-5),
            ops.silu_and_mul(kernels, gate, up),
            ops.gelu_and_mul(kernels, gate, up, tanh=True),
        ]

    parts = [beside(each) for each in (x, gate, up)]
    for got, expected in zip(results(*parts), results(x, gate, up), strict=True):
        check(got, expected.double(), kernels, dtype)
    for part, before in zip(parts, (x, gate, up), strict=True):
        assert torch.equal(part, before)
        base = part._base
        assert base is not None
        assert int(base.isnan().sum()) == 8 * len(part)


def test_keys_values_and_queries_may_be_parts_of_a_joined_product(
    kernels: ops.KernelSet, dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    case = make_case([(3, 3), (1, 9)], kernels=kernels, **sizes, dtype=dtype)
    query = beside(case.query)
    check(
        ops.paged_attention(kernels, query, case.slab, case.batch, case.shape), case.expected, kernels, dtype
    )
    kv = KvShape(**sizes, num_kv_heads=2, dtype=dtype)
    keys, values = (rand(2, 2, sizes["head_dim"], dtype=dtype, seed=i) for i in range(2))
    plain, strided = (ops.make_slab(kernels, kv, num_blocks=3) for _ in range(2))
    slots = torch.tensor([sizes["block_size"] + 1, 3])
    ops.write_kv(kernels, keys, values, plain, slots)
    ops.write_kv(kernels, beside(keys), beside(values), strided, slots)
    assert plain.keys.any()
    assert torch.equal(plain.keys, strided.keys)
    assert torch.equal(plain.values, strided.values)


def plain_moe(
    x: Tensor, router: Tensor, experts: list[tuple[Tensor, Tensor, Tensor]], shape: ops.MoeShape
) -> Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for row, token in enumerate(x.double()):
        probabilities = torch.softmax(router.double() @ token, dim=0)
        best = sorted(range(len(experts)), key=lambda i: -probabilities[i])[: shape.top_k]
        total = sum(probabilities[i] for i in best) if shape.renormalize else 1.0
        for i in best:
            gate, up, down = (weight.double() for weight in experts[i])
            hidden = gate @ token / (1 + (-(gate @ token)).exp()) * (up @ token)
            out[row] += probabilities[i] / total * (down @ hidden)
    return out


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("rows", "top_k"), [(1, 1), (9, 2), (3, 4)])
def test_moe_sums_the_chosen_experts(
    kernels: ops.KernelSet, dtype: torch.dtype, rows: int, top_k: int, renormalize: bool
) -> None:
    x, router = rand(rows, 8, dtype=dtype), rand(4, 8, dtype=dtype, seed=1)
    sizes = ((6, 8), (6, 8), (8, 6))
    weights = [
        tuple(rand(*size, dtype=dtype, seed=10 * (i + 1) + j) / 2 for j, size in enumerate(sizes))
        for i in range(4)
    ]
    experts = [
        ops.ExpertWeights(gate=gate, up=up, down=down)
        for gate, up, down in ([ops.prepare_linear(kernels, each) for each in expert] for expert in weights)
    ]
    shape = ops.MoeShape(top_k=top_k, renormalize=renormalize)
    check(ops.moe(kernels, x, router, experts, shape), plain_moe(x, router, weights, shape), kernels, dtype)


def test_copy_blocks_reads_all_before_it_writes(kernels: ops.KernelSet) -> None:
    pool = torch.arange(5.0)[:, None].repeat(1, 3)
    ops.copy_blocks(kernels, pool, torch.tensor([0, 3]), torch.tensor([3, 4]))
    assert pool[:, 0].tolist() == [0, 1, 2, 0, 3]


def test_zero_blocks_clears_nan(kernels: ops.KernelSet) -> None:
    pool = torch.full((3, 2), torch.nan)
    ops.zero_blocks(kernels, pool, torch.tensor([2, 0]))
    assert pool.nan_to_num(7.0).tolist() == [[0, 0], [7, 7], [0, 0]]


MIXES = {
    "one decode": [(1, 9)],
    "decodes of many lengths": [(1, length) for length in (1, 4, 5, 30, 31, 70, 8, 12)],
    "whole prompts": [(5, 5), (12, 12), (1, 1), (8, 8)],
    "chunks that continue a prefix": [(3, 11), (7, 20), (4, 12)],
    "all at once": [(6, 6), (1, 17), (5, 21), (1, 3), (16, 40), (1, 64)],
}


INTERPRETED = (
    (torch.float32, None, None),
    (torch.float32, 6, 2.0),
    (torch.bfloat16, 1, None),
)
"""What of dtype, window and cap each mix meets where kernels are interpreted; the rest is slow."""


def attention_rows() -> Iterator[Any]:
    for home, mix, window, softcap in product(HOMES_AND_DTYPES, MIXES, (None, 1, 6), (None, 2.0)):
        is_slow = home[0] == "triton" and (home[1], window, softcap) not in INTERPRETED
        yield row(home, mix, window, softcap, is_slow=is_slow)


@pytest.mark.parametrize(("home", "mix", "window", "softcap"), list(attention_rows()), indirect=["home"])
def test_paged_attention_equals_dense_attention(
    kernels: ops.KernelSet,
    dtype: torch.dtype,
    sizes: dict[str, int],
    mix: str,
    window: int | None,
    softcap: float | None,
) -> None:
    """Ragged lengths, blocks out of order, prefixes, windows and caps; unseen slots hold NaN."""
    case = make_case(MIXES[mix], kernels=kernels, **sizes, window=window, softcap=softcap, dtype=dtype)
    got = ops.paged_attention(kernels, case.query, case.slab, case.batch, case.shape)
    check(got, case.expected, kernels, dtype)


ANY_SIZE = (((4, 4), 16, 1), ((6, 1), 5, 16), ((8, 2), 32, 3))
SIZES = {
    ("native", torch.bfloat16): (((4, 4), 32, 16), ((6, 1), 48, 16), ((8, 2), 128, 48), ((14, 2), 64, 32)),
    ("eager", torch.float32): ANY_SIZE,
    ("reference", torch.float32): ANY_SIZE,
}


@pytest.mark.parametrize(
    ("home", "heads", "head_dim", "block_size"),
    [
        (name, heads, head_dim, block_size)
        for name, cases in SIZES.items()
        for heads, head_dim, block_size in cases
    ],
    indirect=["home"],
)
def test_paged_attention_serves_all_head_and_block_sizes(
    kernels: ops.KernelSet, dtype: torch.dtype, heads: tuple[int, int], head_dim: int, block_size: int
) -> None:
    case = make_case(
        MIXES["all at once"],
        kernels=kernels,
        heads=heads,
        head_dim=head_dim,
        block_size=block_size,
        dtype=dtype,
        strided=True,
    )
    got = ops.paged_attention(kernels, case.query, case.slab, case.batch, case.shape)
    check(got, case.expected, kernels, dtype)


@pytest.mark.parametrize(
    ("home", "seed"),
    [
        row(home, seed, is_slow=home[0] == "triton" and seed not in (1, 2))  # those of few sequences
        for home, seed in product(HOMES_AND_DTYPES, range(6))
    ],
    indirect=["home"],
)
def test_paged_attention_of_random_mixes(
    kernels: ops.KernelSet, dtype: torch.dtype, sizes: dict[str, int], seed: int
) -> None:
    rng = random.Random(seed)
    lengths = []
    for _ in range(rng.randint(1, 20)):
        new = 1 if rng.random() < 0.5 else rng.randint(1, 40)
        lengths.append((new, new + rng.choice([0, rng.randint(0, 90)])))
    case = make_case(
        lengths,
        kernels=kernels,
        **sizes,
        window=rng.choice([None, 5, 33]),
        softcap=rng.choice([None, 3.0]),
        dtype=dtype,
        seed=seed,
    )
    got = ops.paged_attention(kernels, case.query, case.slab, case.batch, case.shape)
    check(got, case.expected, kernels, dtype)


def test_nan_of_one_sequence_stays_in_its_rows(
    kernels: ops.KernelSet, dtype: torch.dtype, sizes: dict[str, int]
) -> None:
    """Padding of a batched call reads the sequence's own blocks only."""
    lengths = [(1, 9), (1, 30), (1, 10), (2, 9), (3, 20)]
    case = make_case(lengths, kernels=kernels, **sizes, dtype=dtype)
    for block in case.batch.block_tables[1].tolist():
        if block >= 0:
            poison(case.slab, block)
    got = ops.paged_attention(kernels, case.query, case.slab, case.batch, case.shape)
    assert got[1].isnan().any()
    rest = [0, *range(2, len(got))]
    check(got[rest], case.expected[rest], kernels, dtype)


def test_reference_rows_do_not_depend_on_the_other_rows() -> None:
    """Bit for bit, for every operation that mixes features; alignment and tile position included."""
    kernels = build("reference")
    x, weight = rand(40, 96, dtype=torch.float32), rand(70, 96, dtype=torch.float32, seed=1)
    prepared = ops.prepare_linear(kernels, weight)
    whole = ops.linear(kernels, x, prepared)
    normed = ops.rms_norm(kernels, x, weight[0], eps=1e-5)
    activated = ops.silu_and_mul(kernels, x, x)
    for start, end in ((0, 1), (3, 20), (17, 40)):
        part = x[start:end].clone()
        assert torch.equal(ops.linear(kernels, part, prepared), whole[start:end])
        assert torch.equal(ops.rms_norm(kernels, part, weight[0], eps=1e-5), normed[start:end])
        assert torch.equal(ops.silu_and_mul(kernels, part, part), activated[start:end])


@pytest.mark.parametrize("rows", [1, 3, 200])
def test_rows_with_nan_or_infinity_are_found(kernels: ops.KernelSet, dtype: torch.dtype, rows: int) -> None:
    x = rand(rows, 400, dtype=dtype)
    x[0, 0] = torch.finfo(dtype).max
    assert ops.rows_not_finite(kernels, x) == []
    assert not ops.not_finite(kernels, x).any()
    bad = sorted({0, rows // 2, rows - 1})
    for row, value in zip(bad, (torch.nan, torch.inf, -torch.inf), strict=False):
        x[row, 399] = value
    assert ops.rows_not_finite(kernels, x) == bad
    assert ops.not_finite(kernels, x).tolist() == [row in bad for row in range(rows)]
    assert ops.rows_not_finite(kernels, x[:0]) == []
    assert ops.not_finite(kernels, x[:0]).shape == (0,)
