"""Native rotation and cache writes: float64, and the layout that csrc/include/penstock/attention.h draws."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.native_attention_case import (
    BF16_ROUNDOFF,
    AttentionSpec,
    NativeCache,
    read_cache,
    step_inputs,
)

ISAS = _native.supported_isas()
ROTARY_DIMS = [(32, 32), (64, 64), (64, 20), (80, 80), (96, 24), (128, 128), (256, 64)]
"""(head_dim, rotated dims)"""


def pool(threads: int = 2) -> _native.Pool:
    return _native.Pool(threads, [], 0)


def native_angles(positions: Tensor, frequencies: Tensor, *, factor: float, isa: str) -> Tensor:
    program = _native.Program(pool(), isa, True)
    at = program.add_external(_native.DType.i64, 1)
    out = program.add_external(_native.DType.f32, 2 * len(frequencies))
    _native.add_rope_angles(
        program,
        positions=at,
        frequencies=frequencies.data_ptr(),
        num_frequencies=len(frequencies),
        factor=factor,
        out=out,
    )
    angles = torch.zeros(len(positions), 2 * len(frequencies))
    program.run(len(positions), [(positions.data_ptr(), 8), (angles.data_ptr(), 8 * len(frequencies))], [])
    return angles


def native_rope(x: Tensor, angles: Tensor, *, isa: str) -> Tensor:
    num, heads, head_dim = x.shape
    program = _native.Program(pool(), isa, True)
    source = program.add_external(_native.DType.bf16, heads * head_dim)
    given = program.add_external(_native.DType.f32, angles.shape[1])
    out = program.add_external(_native.DType.bf16, heads * head_dim)
    _native.add_rope(program, x=source, head_dim=head_dim, angles=given, out=out)
    result = torch.full_like(x, torch.nan)
    row_bytes = heads * head_dim * 2
    externals = [
        (x.data_ptr(), row_bytes),
        (angles.data_ptr(), angles.shape[1] * 4),
        (result.data_ptr(), row_bytes),
    ]
    program.run(num, externals, [])
    return result


def exact_rope(x: Tensor, angles: Tensor) -> Tensor:
    half = angles.shape[1] // 2
    cos, sin = (part.double()[:, None] for part in angles.split(half, dim=1))
    a, b, rest = x.double().split([half, half, x.shape[2] - 2 * half], dim=2)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=2)


def random_angles(num: int, rotary: int) -> Tensor:
    turn = torch.rand(num, rotary // 2, dtype=torch.float64) * 6.3
    return torch.cat([turn.cos(), turn.sin()], dim=1).float()


@pytest.mark.parametrize("isa", ISAS)
def test_angles_are_exact_to_a_rounding(isa: str) -> None:
    """The angle is a float32 product; its cosine and sine err by less than one rounding of float32."""
    positions = torch.tensor([0, 1, 2, 1000, 131071, 2_000_000])
    frequencies = 1.0 / 10000 ** (torch.arange(0, 64, 2, dtype=torch.float32) / 64)
    got = native_angles(positions, frequencies, factor=1.25, isa=isa)
    turn = (positions.float()[:, None] * frequencies).double()
    exact = 1.25 * torch.cat([turn.cos(), turn.sin()], dim=1)
    assert ((got.double() - exact).abs() <= exact.abs() * 2**-24 + 1e-12).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("head_dim", "rotary"), ROTARY_DIMS)
def test_rotation_equals_float64_and_passes_the_rest(isa: str, head_dim: int, rotary: int) -> None:
    """bf16 in and out, float32 between: one rounding to bf16, and two of float32 on the terms."""
    torch.manual_seed(head_dim + rotary)
    for num, heads in [(1, 1), (5, 3), (33, 2)]:
        x, angles = torch.randn(num, heads, head_dim).bfloat16(), random_angles(num, rotary)
        exact = exact_rope(x, angles)
        error = (native_rope(x, angles, isa=isa).double() - exact).abs()
        assert (error <= exact.abs() * BF16_ROUNDOFF + x.abs().max().double() * 2**-22).all()
        assert torch.equal(native_rope(x, angles, isa=isa)[..., rotary:], x[..., rotary:])


def write_rows(
    spec: AttentionSpec, *, keys: Tensor, values: Tensor, slots: list[int], isa: str
) -> NativeCache:
    cache = NativeCache(spec, num_blocks=5)
    program = _native.Program(pool(), isa, True)
    cols = spec.heads[1] * spec.head_dim
    refs = [program.add_external(_native.DType.bf16, cols) for _ in range(2)]
    _native.add_write_kv(program, keys=refs[0], values=refs[1], layer=0, **spec.kv_options())  # type: ignore[arg-type]
    program.set_layers([cache.layer()])
    inputs = step_inputs([(len(slots), len(slots))], tables=[[0] * len(slots)], spec=spec)
    inputs.slot_mapping.copy_(torch.tensor(slots))
    program.run(len(slots), [(x.data_ptr(), cols * 2) for x in (keys, values)], [inputs.native()])
    return cache


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
@pytest.mark.parametrize(("head_dim", "block_size"), [(32, 16), (64, 32), (80, 48), (128, 16), (256, 64)])
def test_a_write_puts_a_token_where_the_drawing_says(
    isa: str, kv_format: str, head_dim: int, block_size: int
) -> None:
    """bf16 bits are kept, int8 errs by half a step of the head's scale; every other slot keeps its NaN."""
    spec = AttentionSpec(heads=(3, 3), head_dim=head_dim, block_size=block_size, kv_format=kv_format)
    torch.manual_seed(head_dim)
    slots = torch.randperm(5 * block_size)[:23].tolist()
    keys, values = (torch.randn(23, 3, head_dim).bfloat16() for _ in range(2))
    values[4] = 0.0
    cache = write_rows(spec, keys=keys, values=values, slots=slots, isa=isa)
    for given, stored, is_key in ((keys, cache.keys, True), (values, cache.values, False)):
        got = read_cache(stored, spec=spec, is_key=is_key).flatten(0, 1)
        step = given.double().abs().amax(-1, keepdim=True) / 127 if kv_format == "int8" else torch.zeros(1)
        assert ((got[slots] - given.double()).abs() <= step * 0.5001).all()
        others = torch.ones(5 * block_size, dtype=torch.bool)
        others[slots] = False
        assert got[others].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_an_int8_head_that_is_not_finite_reads_as_nan(isa: str, bad: float) -> None:
    """Its neighbours are not touched."""
    spec = AttentionSpec(heads=(2, 2), head_dim=32, kv_format="int8")
    keys = torch.ones(1, 2, 32).bfloat16()
    keys[0, 0, 7] = bad
    cache = write_rows(spec, keys=keys, values=torch.ones(1, 2, 32).bfloat16(), slots=[18], isa=isa)
    got = read_cache(cache.keys, spec=spec, is_key=True).flatten(0, 1)[18]
    assert got[0].isnan().all()
    assert torch.allclose(got[1], torch.ones(32).double())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_the_fused_write_is_the_same_bits_as_its_parts(isa: str, kv_format: str) -> None:
    """rope_write_kv = rope of the query in place, rope of the keys, write_kv."""
    spec = AttentionSpec(heads=(6, 2), head_dim=64, kv_format=kv_format)
    torch.manual_seed(1)
    query, keys, values = (torch.randn(9, heads, 64).bfloat16() for heads in (6, 2, 2))
    angles, slots = random_angles(9, 48), torch.randperm(5 * 16)[:9].tolist()
    apart = write_rows(spec, keys=native_rope(keys, angles, isa=isa), values=values, slots=slots, isa=isa)
    rotated = native_rope(query, angles, isa=isa)
    together = NativeCache(spec, num_blocks=5)
    program = _native.Program(pool(), isa, True)
    refs = {
        name: program.add_external(_native.DType.bf16, 64 * x.shape[1])
        for name, x in (("query", query), ("keys", keys), ("values", values))
    }
    given = program.add_external(_native.DType.f32, 48)
    _native.add_rope_write_kv(program, **refs, angles=given, layer=0, **spec.kv_options())  # type: ignore[arg-type]
    program.set_layers([together.layer()])
    inputs = step_inputs([(9, 9)], tables=[[0] * 9], spec=spec)
    inputs.slot_mapping.copy_(torch.tensor(slots))
    externals = [(x.data_ptr(), x.shape[1] * 128) for x in (query, keys, values)] + [(angles.data_ptr(), 192)]
    program.run(9, externals, [inputs.native()])
    assert torch.equal(query, rotated)
    assert torch.equal(together.keys, apart.keys)
    assert torch.equal(together.values, apart.values)
