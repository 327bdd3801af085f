"""What a linear operation does around its product: bias, residual, gate, dtype, columns, several weights, refusals."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.linear_case import (
    DTYPES,
    ISAS,
    address,
    input_rows,
    multiply,
    packed,
    product,
    random_bias,
    random_rows,
)

NUM_ROWS = [1, 7, 13, 100]
FEATURES = 75
"""Two panels and a ragged one."""

INPUTS = 200

ROWS = random_rows(1, max(NUM_ROWS), INPUTS)
WEIGHT = random_rows(2, FEATURES, INPUTS)
BIAS = random_bias(3, FEATURES)

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bias_is_added_in_float32_and_the_sum_rounded_once(isa: str, dtype: torch.dtype) -> None:
    for num_rows in NUM_ROWS:
        out = torch.empty(num_rows, FEATURES, dtype=dtype)
        product(isa, [WEIGHT], biases=[BIAS], dtype=dtype).run(ROWS[:num_rows], out)
        assert torch.equal(out, (multiply(isa, ROWS[:num_rows], WEIGHT) + BIAS).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [None, BIAS], ids=["plain", "bias"])
def test_residual_is_added_in_float32_and_the_sum_rounded_once(
    isa: str, dtype: torch.dtype, bias: Tensor | None
) -> None:
    residual = random_rows(4, max(NUM_ROWS), FEATURES).to(dtype)
    for num_rows in NUM_ROWS:
        out = residual[:num_rows].clone()
        product(isa, [WEIGHT], biases=[bias], dtype=dtype, add=True).run(ROWS[:num_rows], out)
        sums = multiply(isa, ROWS[:num_rows], WEIGHT) + (0 if bias is None else bias)
        assert torch.equal(out, (residual[:num_rows].float() + sums).to(dtype))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_several_weights_give_what_each_alone_gives(isa: str, threads: int) -> None:
    weights = [WEIGHT, random_rows(5, 32, INPUTS), random_rows(6, 1, INPUTS)]
    for num_rows in NUM_ROWS:
        outs = [torch.empty(num_rows, weight.shape[0]) for weight in weights]
        product(isa, weights, biases=[BIAS, None, None], threads=threads).run(ROWS[:num_rows], *outs)
        assert torch.equal(outs[0], multiply(isa, ROWS[:num_rows], WEIGHT) + BIAS)
        for weight, out in zip(weights[1:], outs[1:], strict=True):
            assert torch.equal(out, multiply(isa, ROWS[:num_rows], weight))


def gated(isa: str, rows: Tensor, up: Tensor, activation: str, out: Tensor) -> None:
    """out = activation(rows @ WEIGHT.T + BIAS) * (rows @ up.T)."""
    pool = _native.Pool(2, [], 0)
    program = _native.Program(pool, isa, True)
    x = input_rows(program, INPUTS)
    _native.add_gated_linear(
        program,
        x=x,
        gate=packed(pool, WEIGHT),
        up=packed(pool, up),
        gate_bias=BIAS.data_ptr(),
        up_bias=0,
        activation=activation,
        out=program.add_external(DTYPES[out.dtype], FEATURES),
    )
    program.run(rows.shape[0], [address(rows), address(out)], [])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_is_the_float64_activation_of_the_sums(isa: str, activation: str) -> None:
    """Within 1e-6 of the gate's and the up projection's sizes: the float32 sums are the kernel's own."""
    up = random_rows(7, FEATURES, INPUTS)
    for num_rows in NUM_ROWS:
        rows, out = ROWS[:num_rows], torch.empty(num_rows, FEATURES)
        gated(isa, rows, up, activation, out)
        gate_sums = (multiply(isa, rows, WEIGHT) + BIAS).double()
        up_sums = multiply(isa, rows, up).double()
        error = (out - ACTIVATIONS[activation](gate_sums) * up_sums).abs()
        assert (error <= 1e-6 * (1 + gate_sums.abs()) * up_sums.abs()).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_rounds_once_to_bf16(isa: str, activation: str) -> None:
    exact, out = torch.empty(13, FEATURES), torch.empty(13, FEATURES, dtype=torch.bfloat16)
    gated(isa, ROWS[:13], WEIGHT, activation, exact)
    gated(isa, ROWS[:13], WEIGHT, activation, out)
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("add", [False, True])
def test_columns_around_the_output_stay(isa: str, dtype: torch.dtype, add: bool) -> None:
    """The output is columns 3 to 78 of 90."""
    pool = _native.Pool(2, [], 0)
    program = _native.Program(pool, isa, True)
    x = input_rows(program, INPUTS)
    out = program.add_external(DTYPES[dtype], 90).columns(3, FEATURES)
    _native.add_linear(program, x=x, matrices=[packed(pool, WEIGHT)], biases=[0], outs=[out], add=add)
    wide = torch.ones(13, 90, dtype=dtype)
    program.run(13, [address(ROWS), address(wide)], [])
    sums = multiply(isa, ROWS[:13], WEIGHT)
    assert torch.equal(wide[:, 3:78], (sums + 1 if add else sums).to(dtype))
    assert (wide[:, :3] == 1).all()
    assert (wide[:, 78:] == 1).all()


@pytest.mark.parametrize("isa", ISAS)
def test_columns_of_a_buffer_are_an_input(isa: str) -> None:
    """The middle 64 of 192 columns."""
    pool = _native.Pool(2, [], 0)
    program = _native.Program(pool, isa, True)
    x = input_rows(program, 192).columns(64, 64)
    weight, out = random_rows(8, 40, 64), program.add_external(_native.DType.f32, 40)
    _native.add_linear(program, x=x, matrices=[packed(pool, weight)], biases=[0], outs=[out], add=False)
    rows, sums = random_rows(9, 20, 192), torch.empty(20, 40)
    program.run(20, [address(rows), address(sums)], [])
    assert torch.equal(sums, multiply(isa, rows[:, 64:128].contiguous(), weight))


@pytest.mark.parametrize("isa", ISAS)
def test_an_output_is_the_next_input(isa: str) -> None:
    """A ragged output in a buffer of the program's own leaves its padding as zeros."""
    pool = _native.Pool(2, [], 0)
    program = _native.Program(pool, isa, True)
    x, hidden = input_rows(program, INPUTS), program.add_buffer(_native.DType.bf16, FEATURES)
    down = random_rows(10, 33, FEATURES)
    out = program.add_external(_native.DType.f32, 33)
    _native.add_linear(program, x=x, matrices=[packed(pool, WEIGHT)], biases=[0], outs=[hidden], add=False)
    _native.add_linear(program, x=hidden, matrices=[packed(pool, down)], biases=[0], outs=[out], add=False)
    sums = torch.empty(50, 33)
    program.run(50, [address(ROWS), address(sums)], [])
    assert torch.equal(sums, multiply(isa, multiply(isa, ROWS[:50], WEIGHT).bfloat16(), down))


class Setting:
    """A program with a weight of 75 features x 200 inputs, rows that fit it and an output that fits it."""

    def __init__(self) -> None:
        self.pool = _native.Pool(1, [], 0)
        self.program = _native.Program(self.pool, ISAS[0], True)
        self.x = self.program.add_buffer(_native.DType.bf16, INPUTS)
        self.out = self.program.add_buffer(_native.DType.bf16, FEATURES)
        self.matrix = packed(self.pool, WEIGHT)

    def add(
        self,
        *,
        x: _native.Ref | _native.QuantizedRef | None = None,
        out: _native.Ref | None = None,
        num_biases: int = 1,
    ) -> None:
        _native.add_linear(
            self.program,
            x=x or self.x,
            matrices=[self.matrix],
            biases=[0] * num_biases,
            outs=[out or self.out],
            add=False,
        )


def test_shapes_that_do_not_fit_are_refused() -> None:
    setting = Setting()
    with pytest.raises(ValueError, match="rows have 199 values, the matrix takes 200"):
        setting.add(x=setting.program.add_buffer(_native.DType.bf16, 199))
    with pytest.raises(ValueError, match="output has 76 columns, the matrix gives 75"):
        setting.add(out=setting.program.add_buffer(_native.DType.bf16, 76))
    with pytest.raises(ValueError, match="one bias address"):
        setting.add(num_biases=2)
    assert setting.program.op_names == []


def test_rows_and_outputs_of_other_types_are_refused() -> None:
    setting = Setting()
    with pytest.raises(ValueError, match="rows are bf16 or quantized"):
        setting.add(x=setting.program.add_buffer(_native.DType.f32, INPUTS))
    with pytest.raises(ValueError, match="output is bf16 or f32"):
        setting.add(out=setting.program.add_buffer(_native.DType.i32, FEATURES))
    quantized = _native.QuantizedRef(
        setting.program.add_buffer(_native.DType.i8, INPUTS),
        setting.program.add_buffer(_native.DType.f32, 1),
        setting.program.add_buffer(_native.DType.i32, 8),
    )
    with pytest.raises(ValueError, match="bf16 matrices take bf16 rows"):
        setting.add(x=quantized)


def test_rows_without_zeros_behind_them_are_refused() -> None:
    """The kernels read whole groups of 64 inputs; what stands behind foreign or inner columns is not zero."""
    setting = Setting()
    with pytest.raises(ValueError, match="padded buffer"):
        setting.add(x=setting.program.add_external(_native.DType.bf16, INPUTS))
    with pytest.raises(ValueError, match="padded buffer"):
        setting.add(x=setting.program.add_buffer(_native.DType.bf16, 2 * INPUTS).columns(0, INPUTS))


@pytest.mark.parametrize(
    ("dtype", "shape", "weight_format", "group_size", "said"),
    [
        (_native.DType.i32, (4, 4), "bf16", 0, "bf16 or f32 values"),
        (_native.DType.f32, (0, 4), "bf16", 0, r"not \[0, 4\]"),
        (_native.DType.f32, (4, 4), "bf16", 32, "group_size 32"),
        (_native.DType.f32, (4, 4), "int8", 64, "group_size 64"),
        (_native.DType.f32, (4, 4), "int4", 48, "group_size 48"),
        (_native.DType.f32, (4, 4), "int5", 0, "format 'int5'"),
    ],
)
def test_weights_that_cannot_be_packed_are_refused(
    dtype: _native.DType, shape: tuple[int, int], weight_format: str, group_size: int, said: str
) -> None:
    values = torch.zeros(16)
    with pytest.raises(ValueError, match=said):
        _native.pack(
            _native.Pool(1, [], 0),
            data=values.data_ptr(),
            dtype=dtype,
            row_stride=4,
            col_stride=1,
            out_features=shape[0],
            in_features=shape[1],
            format=weight_format,
            group_size=group_size,
        )


def test_an_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match="activation 'relu': silu, gelu or gelu_tanh"):
        gated(ISAS[0], ROWS[:1], WEIGHT, "relu", torch.empty(1, FEATURES))
