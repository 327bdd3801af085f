"""GGUF's quantized types by rounding to nearest: the `gguf` package's, and K types of our own.

**Source:** ggml, src/ggml-quants.c, for the layout of blocks. Its search for the best scales is left out: a
run's least and greatest value fill its range.
"""

from typing import Any, Final

import gguf
import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

SUPER: Final = 256
SMALLEST: Final = np.float32(1e-12)


def _half(values: Floats) -> tuple[Floats, Bytes]:
    # Rounded to float16: what that stands for, and its bytes [N, 2].
    half = values.astype(np.float16)
    return half.astype(np.float32), half.view(np.uint8).reshape(len(values), 2)


def _steps(wanted: Floats, most: int) -> tuple[npt.NDArray[Any], Floats, Bytes]:
    """Scales of runs [N, R] as integers up to `most` times one of the block: integers, products, bytes."""
    outer, raw = _half(wanted.max(1, keepdims=True) / most)
    codes = np.round(wanted / np.maximum(outer, SMALLEST)).clip(0, most).astype(np.uint8)
    return codes, outer * codes, raw


def _six_bits(scales: Bytes, offsets: Bytes) -> Bytes:
    # [N, 8] each: 12 bytes.
    first = (scales[:, :4] & 63) | (scales[:, 4:] >> 4 << 6)
    second = (offsets[:, :4] & 63) | (offsets[:, 4:] >> 4 << 6)
    both = (scales[:, 4:] & 15) | (offsets[:, 4:] << 4)
    return np.concatenate((first, second, both), axis=1).astype(np.uint8)


def q4_k(values: Floats) -> Bytes:
    """[N, 256] to [N, 144]."""
    runs = values.reshape(-1, 8, 32)
    lows = np.minimum(runs.min(2), 0)
    offsets, low, low_raw = _steps(-lows, 63)
    scales, step, step_raw = _steps((runs.max(2) + low) / 15, 63)
    exact = (runs + low[:, :, None]) / np.maximum(step, SMALLEST)[:, :, None]
    codes = np.round(exact).clip(0, 15).astype(np.uint8).reshape(-1, 4, 2, 32)
    packed = codes[:, :, 0] | (codes[:, :, 1] << 4)
    return np.concatenate((step_raw, low_raw, _six_bits(scales, offsets), packed.reshape(-1, 128)), axis=1)


def q6_k(values: Floats) -> Bytes:
    """[N, 256] to [N, 210]."""
    runs = values.reshape(-1, 16, 16)
    scales, step, raw = _steps(np.abs(runs).max(2) / 31, 127)
    codes = np.round(runs / np.maximum(step, SMALLEST)[:, :, None]).clip(-32, 31).astype(np.int8) + 32
    quarters = codes.astype(np.uint8).reshape(-1, 2, 4, 32)
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    twos = (quarters >> 4) << np.array([0, 2, 4, 6], dtype=np.uint8)[:, None]
    parts = (low.reshape(-1, 128), np.bitwise_or.reduce(twos, axis=2).reshape(-1, 64), scales, raw)
    return np.concatenate(parts, axis=1).astype(np.uint8)


OWN: Final = {"Q4_K": q4_k, "Q6_K": q6_k}
FALLBACK: Final = {"Q4_K": "Q5_0", "Q6_K": "Q8_0"}
"""What llama.cpp takes for rows that are no multiple of 256."""


def type_for(kind: str, cols: int) -> str:
    """The type of rows of `cols` values, where `kind` is wanted."""
    if cols % SUPER == 0 or kind not in FALLBACK:
        return kind
    return FALLBACK[kind]


def quantize(values: Floats, kind: str) -> npt.NDArray[Any]:
    """[..., cols] in a type that `type_for` gave: its bytes, rows stay rows."""
    if kind in OWN:
        return OWN[kind](values.reshape(-1, SUPER)).reshape(*values.shape[:-1], -1)
    return gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
