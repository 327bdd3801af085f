"""A product with an int8 or int4 weight by a named instruction set, and rows whose int8 form is known."""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from penstock.kernels.quantization import Quantization
from tests.unit.kernels_native.linear_case import DTYPES, address, input_rows

LARGEST = 127

FORMATS = [
    Quantization(method="int8"),
    *(Quantization(method="int4", group_size=size) for size in (32, 64, 128)),
]


def packed(pool: _native.Pool, weight: Tensor, quantization: Quantization) -> _native.Matrix:
    """weight: bf16 or float32 [N, K], any strides."""
    return _native.pack(
        pool,
        data=weight.data_ptr(),
        dtype=DTYPES[weight.dtype],
        row_stride=weight.stride(0),
        col_stride=weight.stride(1),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        format=quantization.method,
        group_size=quantization.group_size if quantization.method == "int4" else 0,
    )


def unpacked(weight: Tensor, quantization: Quantization, *, threads: int = 2) -> Tensor:
    """What the packed weight stands for, float32 [N, K]."""
    out = torch.full(weight.shape, float("nan"))
    packed(_native.Pool(threads, [], 0), weight, quantization).unpack(out.data_ptr())
    return out


def random_weight(seed: int, features: int, inputs: int) -> Tensor:
    """bf16 [features, inputs] of a trained layer's size."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(features, inputs, generator=generator) * 0.03).bfloat16()


def whole_rows(seed: int, num_rows: int, cols: int) -> Tensor:
    """bf16 [num_rows, cols] of whole numbers up to 127, which each row has: rounded to int8 they stay, with scale 1."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-LARGEST, LARGEST + 1, (num_rows, cols), generator=generator)
    rows[:, 0] = torch.where(rows[:, 0] < 0, -LARGEST, LARGEST)
    return rows.bfloat16()


def quantized_rows(program: _native.Program, cols: int) -> _native.QuantizedRef:
    """int8 rows of the program's next external buffer, bf16 [rows, cols]."""
    given = program.add_external(_native.DType.bf16, cols)
    out = _native.QuantizedRef(
        program.add_buffer(_native.DType.i8, cols),
        program.add_buffer(_native.DType.f32, 1),
        program.add_buffer(_native.DType.i32, (cols + 63) // 64 * 2),
    )
    _native.add_quantize(program, x=given, out=out)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedProduct:
    """Kept to run with several numbers of rows."""

    program: _native.Program
    features: int

    def run(self, rows: Tensor) -> Tensor:
        """rows bf16 [M, K]; float32 [M, N]."""
        out = torch.full((rows.shape[0], self.features), float("nan"))
        self.program.run(rows.shape[0], [address(rows), address(out)], [])
        return out


def quantized_product(
    isa: str, weight: Tensor, quantization: Quantization, *, threads: int = 2
) -> QuantizedProduct:
    """rows @ weight.T, of rows rounded to int8 if the quantization says so."""
    pool = _native.Pool(threads, [], 0)
    program = _native.Program(pool, isa, True)
    read = quantized_rows if quantization.quantizes_activations else input_rows
    x = read(program, weight.shape[1])
    out = program.add_external(_native.DType.f32, weight.shape[0])
    matrix = packed(pool, weight, quantization)
    _native.add_linear(program, x=x, matrices=[matrix], biases=[0], outs=[out], add=False)
    return QuantizedProduct(program=program, features=weight.shape[0])
