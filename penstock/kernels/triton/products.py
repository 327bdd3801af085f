"""Products of activations with a weight in any form: tiles for many rows, one pass of the weight for a row.

One kernel multiplies tiles of every form; what differs is how a chunk of the inputs is summed (`sum_chunk`).
Sums run in float32, or in int32 where both sides are integers. The inputs are cut into `SPLITS` chunks of
equal length; a tile's sum is that of its chunks, first to last. With few rows the chunks are computed side
by side, each by a program of its own, and added by a second kernel; with many, one program computes them
one after the other. Both add the same numbers in the same order, so that the deterministic mode, which
fixes tiles and chunks by the weight's shape alone, may take either.

Letters: M rows, N outputs, K inputs of a tile.
"""

import triton
import triton.language as tl

from penstock.kernels.triton.launch import ROUNDER, dot, inlined, narrow
from penstock.kernels.triton.weights import Format

DENSE = tl.constexpr(int(Format.DENSE))
INT8 = tl.constexpr(int(Format.INT8))
INT4 = tl.constexpr(int(Format.INT4))
FP8 = tl.constexpr(int(Format.FP8))
ROWS_IN_TURN = tl.constexpr(8)
"""Tiles above each other that are computed before the next column of tiles: their rows stay in the cache."""


@inlined
def _nibble(packed: tl.tensor) -> tl.tensor:
    """Float32 of four stored bits, less 8: put into the last bits of 2^23, which is then taken away."""
    return ((packed & 15) | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0


@inlined
def _tiles(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w_cols: tl.tensor,
    col_mask: tl.tensor,
    ks: tl.tensor,
    IN: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """The inputs `ks` of both sides, zero where there are none."""
    x_mask, w_mask = row_mask, col_mask
    if not IS_EVEN:
        x_mask, w_mask = row_mask & (ks < IN)[None, :], col_mask & (ks < IN)[:, None]
    x_tile = tl.load(x_rows + ks[None, :], mask=x_mask, other=0.0)
    return x_tile, tl.load(w_cols + ks[:, None], mask=w_mask, other=0.0)


@inlined
def _sum_wide(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w_cols: tl.tensor,
    col_mask: tl.tensor,
    acc: tl.tensor,
    start: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> tl.tensor:
    """Float activations: a weight in fewer bits becomes one of their dtype, which is exact, and fp8 bfloat16.

    Products of fp8 itself would be summed with fewer digits than a float32 has.
    """
    for k in range(0, CHUNK, BLOCK_K):
        x_tile, w_tile = _tiles(
            x_rows, row_mask, w_cols, col_mask, start + k + tl.arange(0, BLOCK_K), IN, IS_EVEN
        )
        if IS_ROUNDED:
            x_tile = x_tile.to(tl.float32).to(tl.bfloat16)
        if FORMAT != DENSE:
            w_tile = w_tile.to(tl.float32).to(x_tile.dtype)
        acc = dot(x_tile, w_tile, acc)
    return acc


@inlined
def _sum_integers(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w_cols: tl.tensor,
    col_mask: tl.tensor,
    acc: tl.tensor,
    start: tl.tensor,
    IN: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> tl.tensor:
    """Int8 by int8, exact: 131,072 inputs at most, so that an int32 cannot overflow."""
    for k in range(0, CHUNK, BLOCK_K):
        x_tile, w_tile = _tiles(
            x_rows, row_mask, w_cols, col_mask, start + k + tl.arange(0, BLOCK_K), IN, IS_EVEN
        )
        acc = tl.dot(x_tile, w_tile, acc, out_dtype=tl.int32)
    return acc


@inlined
def _by_nibbles(x_tile: tl.tensor, packed: tl.tensor, acc: tl.tensor, IS_ROUNDED: tl.constexpr) -> tl.tensor:
    if IS_ROUNDED:
        integers = (packed & 15) - 8
        acc = tl.dot(x_tile, integers.to(tl.int8), acc, out_dtype=tl.int32)
    else:
        acc = dot(x_tile, _nibble(packed).to(x_tile.dtype), acc)
    return acc


@inlined
def _sum_int4(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w_cols: tl.tensor,
    scale_cols: tl.tensor,
    col_mask: tl.tensor,
    acc: tl.tensor,
    zeros: tl.tensor,
    start: tl.tensor,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    HALF: tl.constexpr,
) -> tl.tensor:
    """Block by block of 2 HALF inputs; each group's sum is multiplied by its scale in float32."""
    for k in range(0, CHUNK, 2 * HALF):
        low_at = start + k + tl.arange(0, HALF)
        high_at = low_at + HALF
        bytes_at = (start + k) // 2 + tl.arange(0, HALF)
        packed = tl.load(w_cols + bytes_at[:, None], mask=col_mask & (low_at < IN)[:, None], other=0)
        packed = packed.to(tl.int32)
        x_low = tl.load(x_rows + low_at[None, :], mask=row_mask & (low_at < IN)[None, :], other=0)
        x_high = tl.load(x_rows + high_at[None, :], mask=row_mask & (high_at < IN)[None, :], other=0)
        scale_mask = col_mask & (start + k < IN)
        scale = tl.load(scale_cols + (start + k) // GROUP, mask=scale_mask, other=0.0).to(tl.float32)
        part = _by_nibbles(x_low, packed, zeros, IS_ROUNDED)
        if GROUP > HALF:
            part = _by_nibbles(x_high, packed >> 4, part, IS_ROUNDED)
            acc += part.to(tl.float32) * scale
        else:
            acc += part.to(tl.float32) * scale
            scale_mask = col_mask & (start + k + HALF < IN)
            scale = tl.load(scale_cols + (start + k + HALF) // GROUP, mask=scale_mask, other=0.0)
            part = _by_nibbles(x_high, packed >> 4, zeros, IS_ROUNDED)
            acc += part.to(tl.float32) * scale.to(tl.float32)
    return acc


@inlined
def sum_chunk(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w_cols: tl.tensor,
    scale_cols: tl.tensor,
    col_mask: tl.tensor,
    start: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> tl.tensor:
    """A tile's sum over the inputs [start, start + CHUNK), without the scales of whole rows and outputs.

    Args:
        x_rows: [M, 1] pointers to rows of the input; of int8 or fp8 if IS_ROUNDED.
        row_mask: [M, 1] which of them there are.
        w_cols: [1, N] pointers to rows of the weight.
        scale_cols: [1, N] pointers to the scales of their groups; read for int4 alone.
        col_mask: [1, N] which of them there are.
        start: first input.
        FORMAT: of the weight.
        IS_ROUNDED: the input is rounded.
        IN: inputs of the whole weight.
        GROUP: inputs that share a scale in int4.
        CHUNK: inputs to sum, whole blocks of BLOCK_K.
        BLOCK_M: M.
        BLOCK_N: N.
        BLOCK_K: inputs in a step; for int4 a block of the packing.
        IS_EVEN: the chunks end where the inputs do.

    Returns:
        [M, N] float32.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    zeros = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if IS_ROUNDED and FORMAT != FP8 else tl.float32)
    if FORMAT == INT4:
        acc = _sum_int4(
            x_rows, row_mask, w_cols, scale_cols, col_mask, acc, zeros, start,
            IS_ROUNDED, IN, GROUP, CHUNK, BLOCK_K // 2,
        )  # fmt: skip
    elif IS_ROUNDED and FORMAT == INT8:
        whole = _sum_integers(x_rows, row_mask, w_cols, col_mask, zeros, start, IN, CHUNK, BLOCK_K, IS_EVEN)
        acc = whole.to(tl.float32)
    else:
        acc = _sum_wide(
            x_rows, row_mask, w_cols, col_mask, acc, start, FORMAT, IS_ROUNDED, IN, CHUNK, BLOCK_K, IS_EVEN
        )
    return acc


@inlined
def finish(
    total: tl.tensor,
    x_scales: tl.tensor,
    w_scales: tl.tensor,
    bias: tl.tensor,
    rows: tl.tensor,
    row_mask: tl.tensor,
    cols: tl.tensor,
    col_mask: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
) -> tl.tensor:
    """What is left to do with a whole sum [M, N]: the rows' scales, the outputs' scales, the bias."""
    if IS_ROUNDED:
        total *= tl.load(x_scales + rows, mask=row_mask, other=0.0)
    if FORMAT == INT8 or FORMAT == FP8:  # noqa: PLR1714, SIM109  a tuple is no constant to the compiler
        total *= tl.load(w_scales + cols, mask=col_mask, other=0.0)
    if HAS_BIAS:
        total += tl.load(bias + cols, mask=col_mask, other=0.0).to(tl.float32)
    return total


@inlined
def _tile(
    num_rows: tl.tensor, num_cols: tl.tensor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """Rows [M, 1] and outputs [1, N] of this program: down some tiles, then to the next column of them."""
    num_m, num_n = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_cols, BLOCK_N)
    band = tl.program_id(0) // (ROWS_IN_TURN * num_n)
    in_band = tl.program_id(0) % (ROWS_IN_TURN * num_n)
    height = tl.minimum(num_m - band * ROWS_IN_TURN, ROWS_IN_TURN)
    m, n = band * ROWS_IN_TURN + in_band % height, in_band // height
    rows = m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    return rows.to(tl.int64), (n * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    w_scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    SPLITS: tl.constexpr,
    IS_PARALLEL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_EVEN: tl.constexpr,
) -> None:
    """A tile of `x @ w.T`; side by side, of one chunk: out is then [SPLITS, num_rows, num_cols] float32."""
    rows, cols = _tile(num_rows, num_cols, BLOCK_M, BLOCK_N)
    row_mask, col_mask = rows < num_rows, cols < num_cols
    x_rows, w_cols = x + rows * x_stride, w + cols * w_stride
    scale_cols = w_scales + cols * ((IN + GROUP - 1) // GROUP)
    first = tl.program_id(1) * CHUNK if IS_PARALLEL else 0
    total = sum_chunk(
        x_rows, row_mask, w_cols, scale_cols, col_mask, first,
        FORMAT, IS_ROUNDED, IN, GROUP, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, IS_EVEN,
    )  # fmt: skip
    if IS_PARALLEL:
        out += tl.program_id(1).to(tl.int64) * num_rows * num_cols
        tl.store(out + rows * num_cols + cols, total, mask=row_mask & col_mask)
    else:
        for split in range(1, SPLITS):
            total += sum_chunk(
                x_rows, row_mask, w_cols, scale_cols, col_mask, split * CHUNK,
                FORMAT, IS_ROUNDED, IN, GROUP, CHUNK, BLOCK_M, BLOCK_N, BLOCK_K, IS_EVEN,
            )  # fmt: skip
        total = finish(
            total, x_scales, w_scales, bias, rows, row_mask, cols, col_mask, FORMAT, IS_ROUNDED, HAS_BIAS
        )
        narrowed = narrow(total, out.dtype.element_ty)
        tl.store(out + rows * num_cols + cols, narrowed, mask=row_mask & col_mask)


@triton.jit(do_not_specialize=["num_rows"])
def finish_kernel(
    partials: tl.tensor,
    x_scales: tl.tensor,
    w_scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """One row's chunks added first to last, and what is left to do with them."""
    rows = tl.program_id(0).to(tl.int64) + tl.arange(0, 1)[:, None]
    cols = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    row_mask, col_mask = rows < num_rows, cols < num_cols
    at = partials + rows * num_cols + cols
    step = num_rows.to(tl.int64) * num_cols
    total = tl.load(at, mask=col_mask, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(at + split * step, mask=col_mask, other=0.0)
    total = finish(
        total, x_scales, w_scales, bias, rows, row_mask, cols, col_mask, FORMAT, IS_ROUNDED, HAS_BIAS
    )
    tl.store(out + rows * num_cols + cols, narrow(total, out.dtype.element_ty), mask=col_mask)


@inlined
def _row_wide(
    x: tl.tensor,
    w_cols: tl.tensor,
    col_mask: tl.tensor,
    IN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> tl.tensor:
    """[N] sums of one row with N rows of the weight, [N, 1] pointers."""
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for k in range(0, IN, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)[None, :]
        x_part = tl.load(x + ks, mask=ks < IN, other=0.0).to(tl.float32)
        w_tile = tl.load(w_cols + ks, mask=col_mask & (ks < IN), other=0.0).to(tl.float32)
        acc += w_tile * x_part
    return tl.sum(acc, axis=1)


@inlined
def _row_int4(
    x: tl.tensor,
    w_cols: tl.tensor,
    scale_cols: tl.tensor,
    col_mask: tl.tensor,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr,
    HALF: tl.constexpr,
) -> tl.tensor:
    """The same for nibbles, BLOCKS blocks of the packing a step."""
    acc = tl.zeros((BLOCK_N, BLOCKS), tl.float32)
    block, inner = tl.arange(0, BLOCKS)[None, :], tl.arange(0, HALF)[None, None, :]
    for k in range(0, IN, 2 * HALF * BLOCKS):
        first = k + block * (2 * HALF)
        low_at = first[:, :, None] + inner
        high_at = low_at + HALF
        bytes_at = (k // 2 + block * HALF)[:, :, None] + inner
        mask = col_mask[:, :, None] & (low_at < IN)
        packed = tl.load(w_cols[:, :, None] + bytes_at, mask=mask, other=0).to(tl.int32)
        low = _nibble(packed) * tl.load(x + low_at, mask=low_at < IN, other=0).to(tl.float32)
        high = _nibble(packed >> 4) * tl.load(x + high_at, mask=high_at < IN, other=0).to(tl.float32)
        scale = tl.load(scale_cols + first // GROUP, mask=col_mask & (first < IN), other=0.0)
        if GROUP > HALF:
            acc += tl.sum(low + high, axis=2) * scale.to(tl.float32)
        else:
            acc += tl.sum(low, axis=2) * scale.to(tl.float32)
            mask = col_mask & (first + HALF < IN)
            scale = tl.load(scale_cols + (first + HALF) // GROUP, mask=mask, other=0.0)
            acc += tl.sum(high, axis=2) * scale.to(tl.float32)
    return tl.sum(acc, axis=1)


@triton.jit
def row_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    w: tl.tensor,
    w_scales: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    num_cols: tl.tensor,
    w_stride: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """`x @ w.T` of a single row: N outputs a program, each weight read once and multiplied as float32.

    Tensor cores would wait for the weight as well, and want it laid out for them first.
    """
    cols = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    col_mask = cols < num_cols
    w_cols = w + cols * w_stride
    if FORMAT == INT4:
        scale_cols = w_scales + cols * ((IN + GROUP - 1) // GROUP)
        total = _row_int4(x, w_cols, scale_cols, col_mask, IN, GROUP, BLOCK_N, BLOCK_K // (2 * HALF), HALF)
    else:
        total = _row_wide(x, w_cols, col_mask, IN, BLOCK_N, BLOCK_K)
    total = finish(
        total[:, None],
        x_scales,
        w_scales,
        bias,
        cols * 0,
        col_mask,
        cols,
        col_mask,
        FORMAT,
        IS_ROUNDED,
        HAS_BIAS,
    )
    tl.store(out + cols, narrow(total, out.dtype.element_ty), mask=col_mask)


@triton.jit
def round_rows_kernel(
    x: tl.tensor,
    out: tl.tensor,
    scales: tl.tensor,
    stride: tl.tensor,
    width: tl.tensor,
    LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A row as int8 or fp8 and its scale, `max|x| / LIMIT`; a row that is not finite has a scale of NaN."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    wide = tl.load(x + row * stride + cols, mask=cols < width, other=0.0).to(tl.float32)
    is_finite = tl.abs(wide) < float("inf")
    num_lost = tl.sum(tl.where(is_finite, 0, 1), axis=0)
    wide = tl.where(is_finite, wide, 0.0)
    largest = tl.max(tl.abs(wide), axis=0)
    # Smaller ones would have a factor beyond the largest float32; they round to 0.
    has_size = largest > 1e-36
    factor = tl.where(has_size, tl.div_rn(LIMIT, tl.where(has_size, largest, 1.0)), 0.0)
    scaled = wide * factor
    if out.dtype.element_ty == tl.int8:
        rounded = ((scaled + ROUNDER) - ROUNDER).to(tl.int8)
    else:
        rounded = narrow(scaled, out.dtype.element_ty)
    scale = tl.where(num_lost > 0, float("nan"), tl.div_rn(largest, LIMIT))
    tl.store(out + row * width + cols, rounded, mask=cols < width)
    tl.store(scales + row, scale)
