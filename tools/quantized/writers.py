"""The tensors of one weight in each format.

**Sources:** AutoAWQ `awq/modules/linear/gemm.py`; GPTQModel `nn_modules/qlinear`; compressed-tensors
`compressors/pack_quantized`; bitsandbytes `functional.QuantState`; QLoRA, appendix E, for the table of NF4.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tools.quantized.rounding import pack_words, round_groups

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
FP8_MAX = 448.0
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
"""Quantiles of a normal distribution; one of them is 0."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Written:
    """One weight in a format."""

    tensors: Mapping[str, Tensor]
    """By suffix after the module's name."""
    stands_for: Tensor
    """[O, I] float32"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """A format with its parameters."""

    section: Mapping[str, Any]  # JSON: what `quantization_config` says
    write: Callable[[Tensor], Written]
    """From a weight [O, I] float32."""
    extra: Mapping[str, Any] = field(default_factory=dict)  # JSON: further fields of `config.json`


def awq(weight: Tensor, *, group_size: int, is_symmetric: bool = False) -> Written:
    """AutoAWQ's `gemm` layout."""
    groups = round_groups(weight, bits=4, group_size=group_size, is_symmetric=is_symmetric)

    def packed(values: Tensor) -> Tensor:
        shuffled = values.t().reshape(values.shape[1], -1, 8)[:, :, list(AWQ_ORDER)].flatten(1)
        return pack_words(shuffled, bits=4, dim=1)

    tensors = {
        ".qweight": packed(groups.values),
        ".qzeros": packed(groups.zeros),
        ".scales": groups.scales.t().contiguous(),
    }
    return Written(tensors=tensors, stands_for=groups.stands_for)


def gptq(
    weight: Tensor,
    *,
    group_size: int,
    bits: int = 4,
    is_symmetric: bool = True,
    has_act_order: bool = False,
    zero_offset: int = 1,
) -> Written:
    """The layout of AutoGPTQ (zero points less one), or with `zero_offset` 0 that of `gptq_v2`."""
    cols = weight.shape[1]
    size = cols if group_size == -1 else group_size
    group_of = torch.arange(cols) // size
    if has_act_order:  # the order of importance is that of the inputs' magnitudes
        group_of = group_of[weight.float().square().sum(0).argsort().argsort()]
    groups = round_groups(weight, bits=bits, group_size=size, is_symmetric=is_symmetric, group_of=group_of)
    zeros = (groups.zeros - zero_offset) & ((1 << bits) - 1)
    tensors = {
        ".qweight": pack_words(groups.values.t(), bits=bits, dim=0),
        ".qzeros": pack_words(zeros.t(), bits=bits, dim=1),
        ".scales": groups.scales.t().contiguous(),
        ".g_idx": group_of.to(torch.int32),
    }
    return Written(tensors=tensors, stands_for=groups.stands_for)


def packed_integers(weight: Tensor, *, group_size: int, is_symmetric: bool = True) -> Written:
    """compressed-tensors `pack-quantized`, 4 bits; scales in bfloat16."""
    cols = weight.shape[1]
    groups = round_groups(
        weight,
        bits=4,
        group_size=cols if group_size == -1 else group_size,
        is_symmetric=is_symmetric,
        scale_dtype=torch.bfloat16,
    )
    tensors = {
        ".weight_packed": pack_words(groups.values, bits=4, dim=1),
        ".weight_scale": groups.scales,
        ".weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        tensors[".weight_zero_point"] = pack_words(groups.zeros, bits=4, dim=0)
    return Written(tensors=tensors, stands_for=groups.stands_for)


def plain_integers(weight: Tensor, *, is_symmetric: bool = True) -> Written:
    """compressed-tensors `int-quantized`: int8 with a scale for each output."""
    groups = round_groups(
        weight, bits=8, group_size=weight.shape[1], is_symmetric=is_symmetric, scale_dtype=torch.bfloat16
    )
    tensors = {".weight": (groups.values - 128).to(torch.int8), ".weight_scale": groups.scales}
    if not is_symmetric:
        tensors[".weight_zero_point"] = (groups.zeros - 128).to(torch.int8)
    return Written(tensors=tensors, stands_for=groups.stands_for)


def _blocks(weight: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    # The greatest magnitude of each block, and for each value the one of its block.
    rows, cols = weight.shape
    row_of, col_of = torch.arange(rows) // block[0], torch.arange(cols) // block[1]
    largest = torch.zeros(int(row_of[-1]) + 1, int(col_of[-1]) + 1)
    for i in range(largest.shape[0]):
        for j in range(largest.shape[1]):
            part = weight[i * block[0] : (i + 1) * block[0], j * block[1] : (j + 1) * block[1]]
            largest[i, j] = part.abs().max()
    return largest, largest[row_of][:, col_of]


def fp8(weight: Tensor, *, block: tuple[int, int] | None, suffix: str = ".weight_scale") -> Written:
    """8-bit floats; `block` None is one scale for the whole weight, and (1, 0) one for each output."""
    rows, cols = weight.shape
    size = (rows, cols) if block is None else (block[0] or rows, block[1] or cols)
    largest, spread = _blocks(weight.float(), size)
    values = (weight.float() / spread * FP8_MAX).to(torch.float8_e4m3fn)
    scales = largest / FP8_MAX
    stands_for = values.float() * (spread / FP8_MAX)
    return Written(
        tensors={".weight": values, suffix: scales.flatten() if block is None else scales},
        stands_for=stands_for,
    )


def bitsandbytes_int8(weight: Tensor) -> Written:
    """int8 and the greatest magnitude of each output."""
    largest = weight.float().abs().amax(1)
    values = (weight.float() * 127 / largest[:, None]).round().to(torch.int8)
    tensors = {".weight": values, ".SCB": largest, ".weight_format": torch.tensor(0, dtype=torch.uint8)}
    return Written(tensors=tensors, stands_for=values.float() * (largest / 127)[:, None])


def _nested(factors: Tensor, *, size: int) -> tuple[dict[str, Tensor], Tensor, float]:
    # Factors rounded to a table of 256 with a factor for `size` of them, and what they stand for.
    offset = float(factors.mean())
    table = torch.linspace(-1, 1, 256)
    parts = (factors - offset).split(size)  # type: ignore[no-untyped-call]  # torch's own
    outer = torch.stack([part.abs().max() for part in parts])
    spread = outer.repeat_interleave(size)[: len(factors)]
    codes = ((factors - offset) / spread).sub(table[:, None]).abs().argmin(0).to(torch.uint8)
    tensors = {
        ".weight.absmax": codes,
        ".weight.nested_absmax": outer,
        ".weight.nested_quant_map": table,
    }
    return tensors, table[codes.int()] * spread + offset, offset


def bitsandbytes_nf4(weight: Tensor, *, is_nested: bool, block_size: int = 64) -> Written:
    """NF4, with nested factors if asked for (`bnb_4bit_use_double_quant`)."""
    flat, table = weight.float().flatten(), torch.tensor(NF4)
    padded = torch.nn.functional.pad(flat, (0, -len(flat) % block_size)).view(-1, block_size)
    factors = padded.abs().amax(1)
    tensors, offset = {".weight.absmax": factors}, 0.0
    if is_nested:
        tensors, factors, offset = _nested(factors, size=256)
    codes = (padded / factors[:, None])[..., None].sub(table).abs().argmin(-1).flatten()[: len(flat)]
    pairs = torch.nn.functional.pad(codes, (0, len(flat) % 2)).view(-1, 2)
    state: dict[str, Any] = {  # JSON
        "quant_type": "nf4", "blocksize": block_size, "dtype": "float32", "shape": list(weight.shape),
    }  # fmt: skip
    if is_nested:
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    tensors[".weight"] = (pairs[:, :1] << 4 | pairs[:, 1:]).to(torch.uint8)
    tensors[".weight.quant_map"] = table
    raw = json.dumps(state).encode()
    tensors[".weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(raw), dtype=torch.uint8)
    stands_for = table[codes] * factors.repeat_interleave(block_size)[: len(flat)]
    return Written(tensors=tensors, stands_for=stands_for.view(weight.shape))
