"""What every launch shares: device facts, the interpreter switch and the product of two tiles.

Imports triton; read `availability` first where it may be missing.
"""

import functools
from collections.abc import Callable
from typing import Final, TypeVar

import torch
import triton
import triton.language as tl

from penstock.kernels.triton import availability

INTERPRETED: Final = tl.constexpr(availability.is_interpreted())
"""Known to kernels at compile time."""

INTERPRETER_PROCESSORS: Final = 2
"""Pretended by the interpreter: small, so that tests split work as a device would, into few pieces."""


ROUNDER: Final = tl.constexpr(12582912.0)
"""1.5 * 2^23: added and taken off again it rounds a small float32 to the nearest even integer."""


@functools.cache
def num_processors(device: torch.device) -> int:
    """Multiprocessors of a device, 132 on an H200: how many programs run side by side is a multiple."""
    if device.type != "cuda":
        return INTERPRETER_PROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def compute_device() -> torch.device:
    """Where this process computes: its current CUDA device, or the CPU for the interpreter."""
    if INTERPRETED.value or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


Function = TypeVar("Function", bound=Callable[..., object])


def inlined(function: Function) -> Function:
    """Mark a function that kernels call: compiled into them on a device, plain Python in the interpreter.

    There `triton.jit` would patch the language anew at each call, which takes most of the time of a small
    tile.
    """
    if INTERPRETED.value:
        return function
    jitted: Function = triton.jit(function)
    return jitted


@inlined
def dot(a: tl.tensor, b: tl.tensor, acc: tl.tensor) -> tl.tensor:
    """`acc + a @ b` in float32, for tiles of float32, bfloat16, float16 or fp8.

    Float32 tiles are multiplied as they are, not rounded to TF32. The interpreter keeps a bfloat16 as its
    bits in a uint16 and would multiply those. There the sums run in float64: a row of a product by numpy
    depends on its place in the tile, on a device it does not, and rounded to float32 that difference is gone.
    """
    if INTERPRETED:
        wide = tl.dot(a.to(tl.float32).to(tl.float64), b.to(tl.float32).to(tl.float64), out_dtype=tl.float64)
        return acc + wide.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


@inlined
def narrow(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Float32 `x` as `dtype` (float32, bfloat16 or float8e4nv), to the nearest even.

    Every result that is stored goes through here: a device rounds so by itself, but the interpreter cuts a
    bfloat16 off and carries wrongly into the exponent of an fp8. There the number is first brought onto the
    grid of `dtype` in float32, and what is left of the conversion is exact.
    """
    if INTERPRETED:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(tl.abs(x) < float("inf"), rounded.to(tl.float32, bitcast=True), x)
        elif dtype == tl.float8e4nv:
            # Three digits after the leading one; below 2^-6 the grid stays that of 2^-6.
            exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
            grid = ((exponent - 3) << 23).to(tl.float32, bitcast=True)
            x = (x / grid + ROUNDER - ROUNDER) * grid
    return x.to(dtype)


@inlined
def widen(x: tl.tensor, dtype: tl.constexpr) -> tl.tensor:
    """Numbers of a KV cache in the type of the queries, which holds every int8 and fp8 exactly.

    The interpreter would take an int8 for the bits of a bfloat16, unless it goes through float32.
    """
    if INTERPRETED:
        return x.to(tl.float32).to(dtype)
    return x.to(dtype)


@inlined
def bound(x: tl.tensor) -> tl.tensor:
    """An end of a loop that is known on the device alone; `range` takes no other.

    The interpreter keeps scalars as arrays of one number, which numpy does not take for an integer.
    """
    if INTERPRETED:
        return (tl.zeros((1,), tl.int32) + x).handle.data.item()
    return x
