"""Rounding to nearest, with a scale and perhaps a zero point for each output and group of inputs."""

from dataclasses import dataclass

import torch
from torch import Tensor

SMALLEST_SCALE = 2.0**-14
"""The smallest normal float16: a group of zeros gets it."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Groups:
    """Letters: O outputs, I inputs, G groups of inputs."""

    values: Tensor
    """[O, I] int32, from 0 to 2^bits - 1"""
    zeros: Tensor
    """[O, G] int32, in the same range"""
    scales: Tensor
    """[O, G] in the dtype of the file"""
    group_of: Tensor
    """[I] int64"""

    @property
    def stands_for(self) -> Tensor:
        """[O, I] float32."""
        shifted = self.values - self.zeros[:, self.group_of]
        return shifted.float() * self.scales.float()[:, self.group_of]


def round_groups(
    weight: Tensor,
    *,
    bits: int,
    group_size: int,
    is_symmetric: bool,
    scale_dtype: torch.dtype = torch.float16,
    group_of: Tensor | None = None,
) -> Groups:
    """Round a weight.

    Args:
        weight: [O, I].
        bits: 4 or 8.
        group_size: inputs that share a scale, a divisor of I.
        is_symmetric: zero points of half the range; else the least and the greatest value fill the range.
        scale_dtype: of the scales.
        group_of: [I], the group of each input; None for runs of inputs.
    """
    rows, cols = weight.shape
    in_order = torch.arange(cols) // group_size
    group_of = in_order if group_of is None else group_of
    order = group_of.argsort(stable=True)
    grouped = weight.float()[:, order].view(rows, -1, group_size)
    top = (1 << bits) - 1
    if is_symmetric:
        spans = grouped.abs().amax(2) / (top // 2)
        zeros = torch.full(spans.shape, (top + 1) // 2)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        spans = (high - low) / top
        zeros = (-low / spans.clamp(min=SMALLEST_SCALE)).round().clamp(0, top).long()
    scales = spans.clamp(min=SMALLEST_SCALE).to(scale_dtype)
    values = (weight.float() / scales.float()[:, group_of]).round() + zeros[:, group_of]
    return Groups(
        values=values.clamp(0, top).to(torch.int32),
        zeros=zeros.to(torch.int32),
        scales=scales,
        group_of=group_of,
    )


def pack_words(values: Tensor, *, bits: int, dim: int) -> Tensor:
    """Values below 2^bits, 32 / bits of them along `dim` to an int32 word, the first in the lowest bits."""
    per_word = 32 // bits
    moved = values.movedim(dim, -1).long()
    words = moved.reshape(*moved.shape[:-1], -1, per_word) << torch.arange(0, 32, bits)
    total = words.sum(-1)
    signed = torch.where(total >= 1 << 31, total - (1 << 32), total)
    return signed.to(torch.int32).movedim(-1, dim).contiguous()
