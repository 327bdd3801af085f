"""What the blocks of GGUF's quantized types stand for.

A row of a matrix is whole blocks. A block of a `_0` or `_1` type has one scale, one of a `K` type a scale,
and perhaps an offset, for each run of 16 or 32 of its 256 values:

```
Q4_0  d f16 | 16 bytes                        (q - 8) d         byte j: value j low, value j + 16 high
Q4_1  d f16 | m f16 | 16 bytes                q d + m
Q5_0  d f16 | 32 high bits | 16 bytes         (q - 16) d
Q5_1  d f16 | m f16 | 32 high bits | 16 b.    q d + m
Q8_0  d f16 | 32 int8                         q d
Q4_K  d f16 | m f16 | 12 bytes | 128 bytes    q d s_r - m t_r   8 runs, s and t of 6 bits
Q5_K  d f16 | m f16 | 12 | 32 high | 128      the same with a fifth bit
Q6_K  128 low | 64 high | 16 int8 | d f16     (q - 32) d s_r    16 runs
```

Q4_0 is a grid of the kernels: int4 in groups of 32. All arithmetic is float32, as ggml's.

**Source:** ggml, src/ggml-quants.c (`dequantize_row_*`), and `gguf.quants` of its Python package.
"""

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from penstock.models.quantized.grid import Grid

RUNS: Final = 8
RUN: Final = 32


def _halves(blocks: Tensor, start: int, end: int) -> Tensor:
    # float16 numbers at bytes [start, end) of [N, bytes]: [N, count] float32.
    return blocks[:, start:end].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    # [N, 16 k] bytes, low nibbles first, then high ones: [N, 32 k] for each run of 16 bytes.
    return torch.cat((packed & 15, packed >> 4), dim=1)


def _bits(packed: Tensor) -> Tensor:
    # [N, 4] bytes: [N, 32] bits, the lowest first.
    return ((packed[:, :, None] >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)


def q4_0_values(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Integers [N, 32] int8 from -8 to 7, and scales [N, 1] float32, of [N, 18] bytes."""
    return _nibbles(blocks[:, 2:]).to(torch.int8) - 8, _halves(blocks, 0, 2)


def _q4_0(blocks: Tensor) -> Tensor:
    values, scales = q4_0_values(blocks)
    return values.float() * scales


def _q4_1(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 4:]).float() * _halves(blocks, 0, 2) + _halves(blocks, 2, 4)


def _q5_0(blocks: Tensor) -> Tensor:
    values = (_nibbles(blocks[:, 6:]) | (_bits(blocks[:, 2:6]) << 4)).to(torch.int8) - 16
    return values.float() * _halves(blocks, 0, 2)


def _q5_1(blocks: Tensor) -> Tensor:
    values = _nibbles(blocks[:, 8:]) | (_bits(blocks[:, 4:8]) << 4)
    return values.float() * _halves(blocks, 0, 2) + _halves(blocks, 2, 4)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float() * _halves(blocks, 0, 2)


def _runs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and offsets [N, 8] of 6 bits, of 12 bytes.

    ```
    byte 0..3    s_r low 6 bits, r < 4      s_(r + 4) high 2 bits on top
    byte 4..7    t_r low 6 bits             t_(r + 4) high 2 bits on top
    byte 8..11   s_(r + 4) low 4 bits, t_(r + 4) low 4 bits on top
    ```
    """
    first, second, both = packed[:, :4], packed[:, 4:8], packed[:, 8:]
    scales = torch.cat((first & 63, (both & 15) | ((first >> 2) & 48)), dim=1)
    offsets = torch.cat((second & 63, (both >> 4) | ((second >> 2) & 48)), dim=1)
    return scales.float(), offsets.float()


def _k_values(blocks: Tensor, values: Tensor) -> Tensor:
    # [N, 8, 32] integers on the scales and offsets at the beginning of the blocks: [N, 256].
    scales, offsets = _runs(blocks[:, 4:16])
    steps = _halves(blocks, 0, 2) * scales
    lows = _halves(blocks, 2, 4) * offsets
    return (steps[:, :, None] * values.float() - lows[:, :, None]).flatten(1)


def _k_nibbles(packed: Tensor) -> Tensor:
    # 128 bytes: 32 bytes give two runs, the low nibbles first. [N, 8, 32]
    quarters = packed.view(-1, 4, 1, RUN)
    return torch.cat((quarters & 15, quarters >> 4), dim=2).view(-1, RUNS, RUN)


def _q4_k(blocks: Tensor) -> Tensor:
    return _k_values(blocks, _k_nibbles(blocks[:, 16:].contiguous()))


def _q5_k(blocks: Tensor) -> Tensor:
    # Bit r of high byte j belongs to value j of run r.
    high = (blocks[:, None, 16:48] >> torch.arange(RUNS, dtype=torch.uint8)[:, None]) & 1
    return _k_values(blocks, _k_nibbles(blocks[:, 48:].contiguous()) | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    # Each half of a block: 64 low bytes are four runs of 32 (two of low nibbles, two of high ones), 32 high
    # bytes have two bits for each of them.
    low = blocks[:, :128].contiguous().view(-1, 2, 1, 64)
    low = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, RUN)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]
    high = (blocks[:, 128:192].contiguous().view(-1, 2, 1, RUN) >> shifts) & 3
    values = (low | (high << 4)).to(torch.int8).view(-1, 16, 16) - 32
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    steps = _halves(blocks, 208, 210) * scales
    return (steps[:, :, None] * values.float()).flatten(1)


DEQUANTIZE: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
"""By type: [N, bytes of a block] uint8 to [N, values of a block] float32."""


def dequantize(kind: str, raw: Tensor, *, block_bytes: int) -> Tensor:
    """Rows [R, bytes] uint8 of a quantized type to [R, values] float32."""
    return DEQUANTIZE[kind](raw.reshape(-1, block_bytes)).view(raw.shape[0], -1)


def q4_0_grid(raw: Tensor) -> Grid:
    """Rows [R, bytes] of Q4_0 as integers with a scale for each 32."""
    values, scales = q4_0_values(raw.reshape(-1, 18))
    return Grid(values=values.view(raw.shape[0], -1), scales=scales.view(raw.shape[0], -1), group_size=32)
