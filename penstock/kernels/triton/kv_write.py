"""How keys and values of a block lie on a device, and the kernel that stores new ones.

A block of one layer, head by head, so that the B slots of a head are one run of B * D numbers (4 KiB for 16
slots of 128 bfloat16), which is what one program of attention reads. N heads, B slots, D head size:

```
plain        keys     [N][B][D] of the model's dtype
int8, fp8    keys     [N][B][D] bytes, filled up to 16, then [N][B] float32 scales, filled up to 16
             values   as the keys
```

A scale belongs to a token and head: `max|x| / 127` for int8, rounded to the nearest even number as on a CPU,
and `max|x| / 448` for fp8 (e4m3, whose largest number is 448). A head of zeros has scale 0.
"""

from dataclasses import dataclass
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from penstock.kernels.batch import KvBlock, KvShape, KvSlab
from penstock.kernels.reference.quantize import KV_LIMITS
from penstock.kernels.triton.launch import ROUNDER, inlined, narrow

TILE_NUMBERS: Final = 2048
"""Keys of a program: 16 for each of 128 threads, two vector loads; a token of 8 heads of 128 is half a
program."""
ALIGNMENT: Final = 16
"""Bytes: vector loads need it, and a stride that is a multiple of it tells Triton so."""


def _filled(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _value_bytes(shape: KvShape) -> int:
    return _filled(shape.num_kv_heads * shape.block_size * shape.head_dim)


def kv_block(shape: KvShape) -> KvBlock:
    """As `ops.kv_block`: head by head."""
    if not shape.is_quantized:
        return KvBlock(shape=(shape.num_kv_heads, shape.block_size, shape.head_dim), dtype=shape.dtype)
    scales = _filled(4 * shape.num_kv_heads * shape.block_size)
    return KvBlock(shape=(_value_bytes(shape) + scales,), dtype=torch.uint8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Planes:
    """The keys or the values of a layer as a kernel addresses them."""

    numbers: Tensor
    """[P, ...] of the kept dtype."""
    scales: Tensor
    """[P, ...] float32, from the first scale on; the numbers again if there are no scales."""
    block_stride: int
    """Numbers from a block to the next."""
    scale_stride: int
    """Float32 from a block's scales to the next block's."""


def planes(cache: Tensor, shape: KvShape) -> Planes:
    """Views of `slab.keys` or `slab.values`."""
    if not shape.is_quantized:
        return Planes(numbers=cache, scales=cache, block_stride=cache.stride(0), scale_stride=0)
    scales = cache[:, _value_bytes(shape) :].view(torch.float32)
    return Planes(
        numbers=cache.view(shape.dtype),
        scales=scales,
        block_stride=cache.stride(0),
        scale_stride=scales.stride(0),
    )


@inlined
def _round(x_RD: tl.tensor, LIMIT: tl.constexpr, IS_INT8: tl.constexpr) -> tl.tensor:
    """Float32 rows to numbers of at most LIMIT, and a scale for each row."""
    scale_R = tl.div_rn(tl.max(tl.abs(x_RD), 1), tl.full((x_RD.shape[0],), LIMIT, tl.float32))
    divisor_R = tl.where(scale_R > 0, scale_R, 1.0)
    numbers_RD = tl.div_rn(x_RD, tl.broadcast_to(divisor_R[:, None], x_RD.shape))
    if IS_INT8:
        rounded_RD = (numbers_RD + ROUNDER - ROUNDER).to(tl.int8)
    else:
        rounded_RD = narrow(numbers_RD, tl.float8e4nv)
    return rounded_RD, scale_R


@inlined
def _store(
    source_RD: tl.tensor,
    numbers_RD: tl.tensor,
    scales_R: tl.tensor,
    is_there: tl.tensor,
    LIMIT: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """From and to where the pointers say."""
    is_there_RD, is_row_R = is_there
    x_RD = tl.load(source_RD, mask=is_there_RD, other=0.0)
    if LIMIT == 0:
        tl.store(numbers_RD, x_RD, mask=is_there_RD)
    else:
        rounded_RD, scale_R = _round(x_RD.to(tl.float32), LIMIT, IS_INT8)
        tl.store(numbers_RD, rounded_RD, mask=is_there_RD)
        tl.store(scales_R, scale_R, mask=is_row_R)


@triton.jit(do_not_specialize=["num_rows"])
def write_kernel(
    keys: tl.tensor,
    values: tl.tensor,
    key_numbers: tl.tensor,
    value_numbers: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    slot_mapping: tl.tensor,
    key_stride_t: tl.tensor,
    key_stride_h: tl.tensor,
    value_stride_t: tl.tensor,
    value_stride_h: tl.tensor,
    block_stride: tl.tensor,
    scale_stride: tl.tensor,
    num_rows: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIMIT: tl.constexpr,
    IS_INT8: tl.constexpr,
) -> None:
    """R rows of keys and of values, row r being head r % N of token r // N."""
    row_R, dim_D = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    token_R, head_R = (row_R // NUM_HEADS).to(tl.int64), row_R % NUM_HEADS
    target_R = tl.load(slot_mapping + token_R, mask=row_R < num_rows, other=-1)
    is_row_R = target_R >= 0  # below 0: a row that only fills up a captured batch
    block_R, slot_R = target_R // BLOCK_SIZE, head_R * BLOCK_SIZE + target_R % BLOCK_SIZE
    is_there_RD = is_row_R[:, None] & (dim_D < HEAD_DIM)[None, :]
    place_RD = (block_R * block_stride + slot_R * HEAD_DIM)[:, None] + dim_D[None, :]
    scale_R = block_R * scale_stride + slot_R
    key_RD = (token_R * key_stride_t + head_R * key_stride_h)[:, None] + dim_D[None, :]
    value_RD = (token_R * value_stride_t + head_R * value_stride_h)[:, None] + dim_D[None, :]
    is_there = is_there_RD, is_row_R
    _store(keys + key_RD, key_numbers + place_RD, key_scales + scale_R, is_there, LIMIT, IS_INT8)
    _store(values + value_RD, value_numbers + place_RD, value_scales + scale_R, is_there, LIMIT, IS_INT8)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 else x.contiguous()


def write_kv(keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`; a negative slot is left out."""
    shape, keys, values = slab.shape, _rows(keys), _rows(values)
    key_planes, value_planes = planes(slab.keys, shape), planes(slab.values, shape)
    assert key_planes.block_stride == value_planes.block_stride, (slab.keys.stride(), slab.values.stride())
    num_rows = len(keys) * shape.num_kv_heads
    block_d = triton.next_power_of_2(shape.head_dim)
    block_r = max(1, TILE_NUMBERS // block_d)
    if not num_rows:
        return
    write_kernel[triton.cdiv(num_rows, block_r),](
        keys,
        values,
        key_planes.numbers,
        value_planes.numbers,
        key_planes.scales,
        value_planes.scales,
        slot_mapping,
        keys.stride(0),
        keys.stride(1),
        values.stride(0),
        values.stride(1),
        key_planes.block_stride,
        key_planes.scale_stride,
        num_rows,
        NUM_HEADS=shape.num_kv_heads,
        HEAD_DIM=shape.head_dim,
        BLOCK_SIZE=shape.block_size,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        LIMIT=KV_LIMITS.get(shape.dtype, 0.0),
        IS_INT8=shape.is_int8,
        num_warps=4,
    )
