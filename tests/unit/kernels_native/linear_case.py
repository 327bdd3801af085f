"""One linear operation by a named instruction set, on tensors: a program of (at most) a copy and that operation."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu import _native

ISAS = _native.supported_isas()

DTYPES = {torch.bfloat16: _native.DType.bf16, torch.float32: _native.DType.f32}


def random_rows(seed: int, num_rows: int, cols: int) -> Tensor:
    """bf16 [num_rows, cols], normally distributed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, cols, generator=generator).bfloat16()


def random_bias(seed: int, cols: int) -> Tensor:
    """float32 [cols]."""
    return torch.randn(cols, generator=torch.Generator().manual_seed(seed))


def packed(pool: _native.Pool, weight: Tensor) -> _native.Matrix:
    """weight: bf16 or float32 [N, K], any strides; packed as bf16."""
    return _native.pack(
        pool,
        data=weight.data_ptr(),
        dtype=DTYPES[weight.dtype],
        row_stride=weight.stride(0),
        col_stride=weight.stride(1),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        format="bf16",
        group_size=0,
    )


def address(tensor: Tensor) -> tuple[int, int]:
    """Where a run finds the tensor's rows."""
    return tensor.data_ptr(), tensor.stride(0) * tensor.element_size()


def input_rows(program: _native.Program, cols: int) -> _native.Ref:
    """Padded bf16 rows of `cols` values, copied from the program's next external buffer."""
    given = program.add_external(_native.DType.bf16, cols)
    x = program.add_buffer(_native.DType.bf16, cols)
    _native.add_convert(program, x=given, out=x)
    return x


@dataclass(frozen=True, slots=True, kw_only=True)
class Product:
    """Products of the same rows with some weights, kept to run with several numbers of rows."""

    program: _native.Program

    def run(self, rows: Tensor, *outs: Tensor) -> None:
        """rows: bf16 [M, K]; outs: [M, N] each, written or added to."""
        self.program.run(rows.shape[0], [address(rows), *(address(out) for out in outs)], [])


def product(
    isa: str,
    weights: Sequence[Tensor],
    *,
    biases: Sequence[Tensor | None] = (),
    dtype: torch.dtype = torch.float32,
    add: bool = False,
    threads: int = 2,
) -> Product:
    """rows @ weight.T + bias for each weight [N, K], stored as `dtype` or added to what stands there."""
    pool = _native.Pool(threads, [], 0)
    program = _native.Program(pool, isa, True)
    x = input_rows(program, weights[0].shape[1])
    outs = [program.add_external(DTYPES[dtype], weight.shape[0]) for weight in weights]
    given = biases or [None] * len(weights)
    _native.add_linear(
        program,
        x=x,
        matrices=[packed(pool, weight) for weight in weights],
        biases=[0 if bias is None else bias.data_ptr() for bias in given],
        outs=outs,
        add=add,
    )
    return Product(program=program)


def multiply(isa: str, rows: Tensor, weight: Tensor, *, threads: int = 2) -> Tensor:
    """rows bf16 [M, K] times weight [N, K] transposed, float32 [M, N]."""
    out = torch.full((rows.shape[0], weight.shape[0]), float("nan"))
    product(isa, [weight], threads=threads).run(rows, out)
    return out


def error_bound(rows: Tensor, weight: Tensor) -> Tensor:
    """How far K roundings in float32 may take each sum: K ulps of the sum of the products' sizes. float64 [M, N].

    The least normal float is added: the dot instructions take smaller ones as zero.
    """
    sizes = rows.double().abs() @ weight.double().abs().T
    return rows.shape[1] * 2.0**-23 * sizes + torch.finfo(torch.float32).tiny
