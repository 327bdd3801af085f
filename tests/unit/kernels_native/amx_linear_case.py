"""One product by a named instruction set, and what the tile instructions must give, in float64 and int64.

Runs as `amx_emulated` everywhere that AVX-512 is, and as `amx` where there are tiles.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu import _native

TILE_ISAS = [isa for isa in ("amx_emulated", "amx") if isa in _native.supported_isas()]

STEP = 32
"""bf16 inputs of a tile's row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightKind:
    """How the weight is packed and what the rows are."""

    format: str = "bf16"
    group_size: int = 0
    quantized_rows: bool = False

    def __str__(self) -> str:
        return f"{self.format}-g{self.group_size}-{'int8' if self.quantized_rows else 'bf16'} rows"


def packed(pool: _native.Pool, weight: Tensor, kind: WeightKind) -> _native.Matrix:
    """weight: bf16 [N, K]."""
    return _native.pack(
        pool,
        data=weight.data_ptr(),
        dtype=_native.DType.bf16,
        row_stride=weight.stride(0),
        col_stride=weight.stride(1),
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        format=kind.format,
        group_size=kind.group_size,
    )


def unpacked(weight: Tensor, kind: WeightKind) -> Tensor:
    """The values that the packed weight stands for, float32 [N, K]."""
    out = torch.empty(weight.shape)
    packed(_native.Pool(1, [], 0), weight, kind).unpack(out.data_ptr())
    return out


def multiply(
    isa: str, rows: Tensor, weight: Tensor, kind: WeightKind = WeightKind(), *, threads: int = 1
) -> Tensor:
    """rows bf16 [M, K] times weight bf16 [N, K] transposed, float32 [M, N]."""
    pool = _native.Pool(threads, [], 0)
    program = _native.Program(pool, isa, True)
    cols = rows.shape[1]
    given = program.add_external(_native.DType.bf16, cols)
    x: _native.Ref | _native.QuantizedRef = program.add_buffer(_native.DType.bf16, cols)
    if kind.quantized_rows:
        x = quantized(program, cols)
        _native.add_quantize(program, x=given, out=x)
    else:
        assert isinstance(x, _native.Ref)
        _native.add_convert(program, x=given, out=x)
    out = program.add_external(_native.DType.f32, weight.shape[0])
    _native.add_linear(program, x=x, matrices=[packed(pool, weight, kind)], biases=[0], outs=[out], add=False)
    product = torch.full((rows.shape[0], weight.shape[0]), float("nan"))
    program.run(rows.shape[0], [address(rows), address(product)], [])
    return product


def quantized(program: _native.Program, cols: int) -> _native.QuantizedRef:
    """Buffers for int8 rows."""
    sums = (cols + 63) // 64 * 2
    return _native.QuantizedRef(
        program.add_buffer(_native.DType.i8, cols),
        program.add_buffer(_native.DType.f32, 1),
        program.add_buffer(_native.DType.i32, sums),
    )


def address(rows: Tensor) -> tuple[int, int]:
    """Where a matrix lies, and the bytes from row to row."""
    return rows.data_ptr(), rows.stride(0) * rows.element_size()


def random_bf16(seed: int, *shape: int) -> Tensor:
    """Normal values: multiples of 2^-16 below 8, so that sums of a thousand products are exact in float64."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(*shape, generator=generator).clamp(-7, 7)
    return ((values * 2**16).round() / 2**16).to(torch.bfloat16)


def tile_product(rows: Tensor, weight: Tensor) -> Tensor:
    """The bits of TDPBF16PS: per 32 inputs the even and the odd ones by fused multiply-adds in float32, their sum, added.

    Float64 stands in for the fused multiply-add: it is exact for `random_bf16`, so that rounding to float32 is the only one.

    **Source:** Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2, TDPBF16PS.
    """
    sums = torch.zeros(rows.shape[0], weight.shape[0])
    for start in range(0, rows.shape[1], STEP):
        halves = [
            fused_products(rows[:, start + odd : start + STEP : 2], weight[:, start + odd : start + STEP : 2])
            for odd in (0, 1)
        ]
        sums = sums + (halves[0] + halves[1])
    return sums


def fused_products(rows: Tensor, weight: Tensor) -> Tensor:
    """[M, k] times [N, k], one fused multiply-add after the other, float32 [M, N]."""
    sums = torch.zeros(rows.shape[0], weight.shape[0])
    for k in range(rows.shape[1]):
        exact = rows[:, k, None].double() * weight[None, :, k].double() + sums.double()
        sums = exact.float()
    return sums
