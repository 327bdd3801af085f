"""Dense operations in float64, rounded once to the dtype of the input.

Matrix products run in tiles of one fixed shape, so that the library beneath always makes the same call
and sums a row in the same order however many rows the step has. What is left of any difference is at
most in the last bit of a float64 and gone after rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from penstock.kernels.ops import ExpertWeights, MoeShape
from penstock.kernels.reference.weights import plain

ROW_TILE = 16
"""Rows of one matrix product; small, since the last tile is filled up with zeros."""
COLUMN_TILE = 8192
"""Weight rows converted to float64 at a time: bounds the copy of a 150k vocabulary to about 60 MB."""


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    """As `ops.rms_norm`."""
    wide = x.double()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (normed * (weight.double() + weight_offset)).to(x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As `ops.layer_norm`."""
    wide = x.double()
    centred = wide - wide.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * weight.double() + bias.double()).to(x.dtype)


def rope_angles(positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
    """As `ops.rope_angles`."""
    angles = (positions.float().unsqueeze(1) * frequencies).double()
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1).float()


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """As `ops.rope`."""
    half = angles.shape[1] // 2
    cos, sin = angles.double().unsqueeze(1).chunk(2, dim=-1)
    first, second = x[..., :half].double(), x[..., half : 2 * half].double()
    out = x.clone()
    out[..., :half] = (first * cos - second * sin).to(x.dtype)
    out[..., half : 2 * half] = (second * cos + first * sin).to(x.dtype)
    return out


def silu(x: Tensor) -> Tensor:
    """`x * sigmoid(x)` of a float64 tensor."""
    return x * torch.sigmoid(x)


def gelu(x: Tensor, *, tanh: bool) -> Tensor:
    """As `ops.gelu`, for a float64 tensor."""
    return torch.nn.functional.gelu(x, approximate="tanh" if tanh else "none")


def _tile_product(tile: Tensor, weight: Tensor) -> Tensor:
    # [ROW_TILE, I] x [O, I] -> [ROW_TILE, O], in column pieces of fixed bounds.
    pieces = [tile @ part.double().t() for part in torch.split(weight, COLUMN_TILE)]
    return torch.cat(pieces, dim=1)


def linear_wide(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` in float64, row by row independent.

    Args:
        x: [T, I] of any float dtype.
        weight: [O, I].

    Returns:
        [T, O] float64.
    """
    out = torch.empty(x.shape[0], weight.shape[0], dtype=torch.float64, device=x.device)
    wide = weight.double() if weight.shape[0] <= COLUMN_TILE else weight
    for rows, out_rows in zip(torch.split(x, ROW_TILE), torch.split(out, ROW_TILE), strict=True):
        tile = torch.zeros(ROW_TILE, x.shape[1], dtype=torch.float64, device=x.device)
        tile[: rows.shape[0]] = rows
        out_rows.copy_(_tile_product(tile, wide)[: rows.shape[0]])
    return out


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As `ops.linear`."""
    out = linear_wide(x, weight)
    if bias is not None:
        out += bias.double()
    return out.to(x.dtype)


def _run_expert(x: Tensor, expert: ExpertWeights) -> Tensor:
    gate, up, down = plain(expert.gate), plain(expert.up), plain(expert.down)
    rounded = gate.rounded(x)
    hidden = silu(linear_wide(rounded, gate.weight)) * linear_wide(rounded, up.weight)
    return linear_wide(down.rounded(hidden), down.weight)


def moe(x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
    """As `ops.moe`; a token's experts are added in the order of their rank."""
    weights, chosen = torch.softmax(linear_wide(x, router), dim=-1).topk(shape.top_k, dim=-1)
    if shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    ranked = torch.zeros(shape.top_k, *x.shape, dtype=torch.float64, device=x.device)
    for expert_id in sorted(set(chosen.flatten().tolist())):
        rows, ranks = (chosen == expert_id).nonzero(as_tuple=True)
        ranked[ranks, rows] = _run_expert(x[rows], experts[expert_id]) * weights[rows, ranks, None]
    return ranked.sum(0).to(x.dtype)


def not_finite(x: Tensor) -> Tensor:
    """As `ops.not_finite`, by a row's largest and smallest number, both NaN if any is."""
    # A sum would overflow for large numbers that are finite.
    return ~(x.amax(dim=-1).isfinite() & x.amin(dim=-1).isfinite())
