"""What every launch shares: device facts, the interpreter switch and the product of two tiles.

Imports triton; read `availability` first where it may be missing.
"""

import functools
from typing import Final

import torch
import triton
import triton.language as tl

from penstock.kernels.triton import availability

INTERPRETED: Final = tl.constexpr(availability.is_interpreted())
"""Known to kernels at compile time."""

INTERPRETER_PROCESSORS: Final = 2
"""Pretended by the interpreter: small, so that tests split work as a device would, into few pieces."""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device, 132 on an H200: how many programs run side by side is a multiple."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@triton.jit
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """`acc + a @ b` in float32, for tiles of float32, bfloat16, float16 or fp8.

    The interpreter keeps a bfloat16 as its bits in a uint16 and would multiply those; made wide first, the
    products are the same, since a float32 holds the product of two bfloat16 exactly. Float32 tiles are
    multiplied as they are, not rounded to TF32.
    """
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def narrow(value: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Float32 rounded to the nearest number of `dtype`, to the even of two, as torch does.

    The interpreter would cut a bfloat16 off: there the float32 is rounded in its bits first, so that nothing
    is left to cut. NaN and infinity pass as they are.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.int32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        bits = tl.where(tl.abs(value) < float("inf"), rounded, bits)
        return bits.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return value.to(dtype)
