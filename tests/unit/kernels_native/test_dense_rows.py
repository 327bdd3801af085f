"""Every dense operation against float64, on every instruction set: ragged rows, both dtypes, no write past a row."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.dense_case import (
    COLS,
    ISAS,
    ROWS,
    assert_close,
    guard_is_whole,
    guarded,
    random,
    rounding,
    run,
)

BF16, F32 = torch.bfloat16, torch.float32

ACTIVATIONS = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
}

every_isa = pytest.mark.parametrize("isa", ISAS)


def shapes():
    """(rows, cols, dtype of x, dtype of out), each width with both dtypes on each side."""
    dtypes = list(itertools.product((BF16, F32), repeat=2))
    for i, cols in enumerate(COLS):
        for j, (x_dtype, out_dtype) in enumerate(dtypes):
            yield ROWS[(i + j) % len(ROWS)], cols, x_dtype, out_dtype


def rms(x: Tensor, weight: Tensor, *, eps: float, offset: float) -> Tensor:
    wide = x.double()
    return wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + eps) * (weight.double() + offset)


@every_isa
def test_rms_norm_of_rows(isa):
    for rows, cols, x_dtype, out_dtype in shapes():
        x, out = random(cols, rows, cols, dtype=x_dtype, scale=3), guarded(rows, cols, out_dtype)
        weight = random(cols + 1, cols, dtype=BF16)

        def add(program, x, out, weight=weight, cols=cols):
            _native.add_rms_norm(
                program,
                x=x,
                weight=weight.data_ptr(),
                eps=1e-6,
                weight_offset=1.0,
                group=cols,
                residual=None,
                sum=None,
                out=out,
            )

        run(isa, x, out, add=add)
        assert_close(out, rms(x, weight, eps=1e-6, offset=1.0))
        assert guard_is_whole(out)


@every_isa
@pytest.mark.parametrize("head_dim", [1, 6, 16, 20, 64, 128])
def test_rms_norm_of_heads_norms_each_group_alone(isa, head_dim):
    x, out = random(1, 5, 3 * head_dim, dtype=BF16), guarded(5, 3 * head_dim, F32)
    weight = random(2, head_dim, dtype=BF16)

    def add(program, x, out):
        _native.add_rms_norm(
            program,
            x=x,
            weight=weight.data_ptr(),
            eps=1e-5,
            weight_offset=0.0,
            group=head_dim,
            residual=None,
            sum=None,
            out=out,
        )

    run(isa, x, out, add=add)
    expected = rms(x.reshape(5, 3, head_dim), weight, eps=1e-5, offset=0.0).reshape(5, -1)
    assert_close(out, expected)


@every_isa
@pytest.mark.parametrize("sum_dtype", [BF16, F32])
def test_what_is_normed_is_the_sum_that_was_stored(isa, sum_dtype):
    for rows, cols, x_dtype, out_dtype in shapes():
        x, residual = random(cols, rows, cols, dtype=x_dtype), random(cols + 1, rows, cols, dtype=sum_dtype)
        out, weight = guarded(rows, cols, out_dtype), random(cols + 2, cols, dtype=BF16)
        expected = (x.float() + residual.float()).to(sum_dtype)

        def add(program, x, residual, out, weight=weight, cols=cols):
            _native.add_rms_norm(
                program,
                x=x,
                weight=weight.data_ptr(),
                eps=1e-6,
                weight_offset=0.0,
                group=cols,
                residual=residual,
                sum=residual,
                out=out,
            )

        run(isa, x, residual, out, add=add)
        assert torch.equal(residual, expected)
        assert_close(out, rms(expected, weight, eps=1e-6, offset=0.0))


@every_isa
def test_layer_norm(isa):
    for rows, cols, x_dtype, out_dtype in shapes():
        x, out = random(cols, rows, cols, dtype=x_dtype) + 2, guarded(rows, cols, out_dtype)
        weight, bias = random(cols + 1, cols, dtype=BF16), random(cols + 2, cols, dtype=BF16)

        def add(program, x, out, weight=weight, bias=bias):
            _native.add_layer_norm(
                program,
                x=x,
                weight=weight.data_ptr(),
                bias=bias.data_ptr(),
                eps=1e-3,
                residual=None,
                sum=None,
                out=out,
            )

        run(isa, x, out, add=add)
        wide = x.double()
        expected = torch.nn.functional.layer_norm(wide, (cols,), weight.double(), bias.double(), 1e-3)
        # the mean of values around 2 rounds before it is subtracted
        slack = 1e-4 * weight.double().abs()
        assert ((out.double() - expected).abs() <= rounding(expected, out_dtype) + slack).all()


def quantized(rows: int, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    sums = torch.full((rows, -(-cols // 64) * 2), -1, dtype=torch.int32)
    return guarded(rows, cols, torch.int8), torch.full((rows, 1), -1.0), sums


def quantize(isa: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    outs = quantized(*x.shape)

    def add(program, x, values, scales, sums):
        _native.add_quantize(program, x=x, out=_native.QuantizedRef(values, scales, sums))

    run(isa, x, *outs, add=add)
    return outs


@every_isa
@pytest.mark.parametrize("dtype", [BF16, F32])
def test_quantized_rows_are_the_nearest_of_255_steps_and_their_sums_are_exact(isa, dtype):
    for i, cols in enumerate(COLS):
        x = random(cols, ROWS[i % len(ROWS)], cols, dtype=dtype, scale=10.0 ** (i % 7 - 3))
        values, scales, sums = quantize(isa, x)
        wide = x.double()
        assert torch.equal(scales, (x.float().abs().amax(1, keepdim=True) / 127))
        # a tie may fall to either side where float32 rounds the quotient
        assert ((values.double() - wide / scales.double()).abs() <= 0.5 + 1e-4).all()
        assert values.min() >= -127
        padded = torch.nn.functional.pad(values.int(), (0, sums.shape[1] * 32 - cols))
        assert torch.equal(sums, padded.view(len(x), -1, 32).sum(-1).int())
        assert guard_is_whole(values)


@every_isa
def test_halves_are_rounded_to_even(isa):
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    values, _, _ = quantize(isa, x)
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -2]]


@every_isa
def test_a_row_of_zeros_has_scale_zero_and_a_row_without_numbers_a_scale_without_number(isa):
    x = torch.tensor([[0.0, -0.0], [math.nan, 1.0], [math.inf, 1.0], [1e-38, 0.0], [3.0, -3.0]])
    values, scales, _ = quantize(isa, x)
    assert scales[0] == 0
    assert scales[3] == 0
    assert not scales[1].isfinite()
    assert not scales[2].isfinite()
    assert values.tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [127, -127]]


@every_isa
def test_a_norm_quantizes_its_own_float32_result(isa):
    x, weight = random(1, 9, 896, dtype=F32), random(2, 896, dtype=BF16)
    outs = quantized(9, 896)

    def add(program, x, values, scales, sums):
        _native.add_rms_norm(
            program,
            x=x,
            weight=weight.data_ptr(),
            eps=1e-6,
            weight_offset=0.0,
            group=896,
            residual=None,
            sum=None,
            out=_native.QuantizedRef(values, scales, sums),
        )

    run(isa, x, *outs, add=add)
    expected = rms(x, weight, eps=1e-6, offset=0.0)
    assert ((outs[0].double() * outs[1].double() - expected).abs() <= outs[1] * 0.501).all()


@every_isa
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(isa, name):
    for rows, cols, x_dtype, out_dtype in shapes():
        x, out = random(cols, rows, cols, dtype=x_dtype, scale=4), guarded(rows, cols, out_dtype)
        run(isa, x, out, add=lambda p, x, out: _native.add_activation(p, x=x, activation=name, out=out))
        assert_close(out, ACTIVATIONS[name](x.double()))
        assert guard_is_whole(out)


@every_isa
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_gated_activations_also_quantized(isa, name):
    for rows, cols, x_dtype, out_dtype in shapes():
        gate, up = random(1, rows, cols, dtype=x_dtype, scale=3), random(2, rows, cols, dtype=x_dtype)
        out, ints = guarded(rows, cols, out_dtype), quantized(rows, cols)

        def add(program, gate, up, out, values, scales, sums):
            _native.add_gated_activation(program, gate=gate, up=up, activation=name, out=out)
            quantized_out = _native.QuantizedRef(values, scales, sums)
            _native.add_gated_activation(program, gate=gate, up=up, activation=name, out=quantized_out)

        run(isa, gate, up, out, *ints, add=add)
        expected = ACTIVATIONS[name](gate.double()) * up.double()
        assert_close(out, expected)
        assert ((ints[0].double() * ints[1].double() - expected).abs() <= ints[1] * 0.51 + 1e-6).all()


@every_isa
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(isa, name):
    x = torch.tensor([[-300.0, -100.0, -88.0, -20.0, -9.0, -0.0, 0.0, 20.0, 88.0, 100.0, 3e38, math.nan]])
    out = torch.empty_like(x)
    run(isa, x, out, add=lambda p, x, out: _native.add_activation(p, x=x, activation=name, out=out))
    expected = ACTIVATIONS[name](x.double())
    assert out[0, -1].isnan()
    assert_close(out[:, :-1], expected[:, :-1])


@every_isa
@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0])
def test_softcap_in_place(isa, cap):
    for _, cols, dtype, _ in shapes():
        x = guarded(2, cols, dtype)
        x.copy_(random(cols, 2, cols, dtype=dtype, scale=40))
        expected = cap * torch.tanh(x.double() / cap)
        run(isa, x, add=lambda p, x: _native.add_softcap(p, x=x, cap=cap))
        assert_close(x, expected)
        assert guard_is_whole(x)


@every_isa
def test_sum_scale_and_convert(isa):
    for rows, cols, x_dtype, out_dtype in shapes():
        a, b = random(1, rows, cols, dtype=x_dtype), random(2, rows, cols, dtype=out_dtype)
        summed, scaled, converted = (guarded(rows, cols, out_dtype) for _ in range(3))

        def add(program, a, b, summed, scaled, converted):
            _native.add_sum(program, a=a, b=b, out=summed)
            _native.add_scale(program, x=a, factor=1.7, out=scaled)
            _native.add_convert(program, x=a, out=converted)

        run(isa, a, b, summed, scaled, converted, add=add)
        assert torch.equal(summed, (a.float() + b.float()).to(out_dtype))
        assert_close(scaled, a.double() * 1.7)
        assert torch.equal(converted, a.to(out_dtype))
        assert guard_is_whole(summed)
        assert guard_is_whole(converted)


@every_isa
def test_bf16_rounds_to_nearest_even_and_keeps_nan_and_infinity(isa):
    bits = torch.tensor([[0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7FFFFF, 0x7F800001]])
    special = torch.tensor([[math.nan, -math.nan, math.inf, -math.inf, -0.0]])
    x = torch.cat([bits.int().view(torch.float32), special], dim=1)
    out = torch.empty_like(x, dtype=BF16)
    run(isa, x, out, add=lambda p, x, out: _native.add_convert(p, x=x, out=out))
    assert torch.equal(out.isnan(), x.isnan())
    assert torch.equal(out.nan_to_num(9), x.bfloat16().nan_to_num(9))


@every_isa
@pytest.mark.parametrize("cols", [1, 17, 64, 896, 2049])
def test_embedding_takes_rows_and_gives_nan_for_ids_outside(isa, cols):
    table = random(cols, 6, cols + 5, dtype=BF16)
    ids = torch.tensor([[5], [0], [6], [-1], [2**40], [3]])
    out = guarded(6, cols, F32)

    def add(program, ids, out):
        _native.add_embedding(
            program, ids=ids, table=table.data_ptr(), num_rows=6, row_stride=cols + 5, scale=2.5, out=out
        )

    run(isa, ids, out, add=add)
    assert out[2:5].isnan().all()
    assert torch.equal(out[[0, 1, 5]], table[[5, 0, 3], :cols].float() * 2.5)
    assert guard_is_whole(out)


@every_isa
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_alone_and_in_company(isa, threads):
    x, weight = random(3, 41, 897, dtype=F32), random(4, 897, dtype=BF16)

    def add(program, x, out):
        _native.add_rms_norm(
            program,
            x=x,
            weight=weight.data_ptr(),
            eps=1e-6,
            weight_offset=0.0,
            group=897,
            residual=None,
            sum=None,
            out=out,
        )
        _native.add_activation(program, x=out, activation="gelu", out=out)

    together, alone = torch.empty_like(x), torch.empty_like(x)
    run(isa, x, together, add=add, threads=threads)
    for row in range(41):
        run(isa, x[row : row + 1], alone[row : row + 1], add=add, threads=1)
    assert torch.equal(together, alone)


def test_shapes_that_do_not_fit_are_refused():
    x, narrow = torch.zeros(1, 8), torch.zeros(1, 7)
    with pytest.raises(ValueError, match="equally wide"):
        run("scalar", x, narrow, add=lambda p, x, out: _native.add_convert(p, x=x, out=out))
    with pytest.raises(ValueError, match="silu, gelu or gelu_tanh"):
        run("scalar", x, x, add=lambda p, x, y: _native.add_activation(p, x=x, activation="relu", out=y))
    with pytest.raises(ValueError, match="cap must be above 0"):
        run("scalar", x, add=lambda p, x: _native.add_softcap(p, x=x, cap=0.0))
