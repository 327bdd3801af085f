"""The tensors of one weight in each format.

**Sources:** AutoAWQ `awq/modules/linear/gemm.py`; GPTQModel `nn_modules/qlinear`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tools.quantized.rounding import pack_words, round_groups

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


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
