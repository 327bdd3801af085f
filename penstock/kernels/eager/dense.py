"""Dense operations with torch's fused functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.ops import ExpertWeights, MoeShape
from penstock.kernels.reference.weights import plain


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    """As `ops.rms_norm`."""
    if weight_offset == 0.0:
        return functional.rms_norm(x, weight.shape, weight, eps)
    # The sum with the offset is taken in float32: bfloat16 would lose a small weight beside 1.
    normed = functional.rms_norm(x.float(), weight.shape, weight.float() + weight_offset, eps)
    return normed.to(x.dtype)


def rope_angles(positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
    """As `ops.rope_angles`."""
    angles = (positions.float().unsqueeze(1) * frequencies).double()
    return torch.cat([angles.cos() * factor, angles.sin() * factor], dim=1).float()


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """As `ops.rope`."""
    half = angles.shape[1] // 2
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
    wide = x.float()
    first, second = wide[..., :half], wide[..., half : 2 * half]
    turned = [
        torch.addcmul(first * cos, second, sin, value=-1),
        torch.addcmul(second * cos, first, sin),
    ]
    if 2 * half < x.shape[2]:
        turned.append(wide[..., 2 * half :])
    return torch.cat(turned, dim=-1).to(x.dtype)


def _choose(x: Tensor, router: Tensor, shape: MoeShape) -> tuple[Tensor, Tensor]:
    probabilities = torch.softmax(functional.linear(x, router).float(), dim=-1)
    weights, chosen = probabilities.topk(shape.top_k, dim=-1)
    if shape.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, chosen


def _run_expert(x: Tensor, expert: ExpertWeights) -> Tensor:
    gate, up, down = plain(expert.gate), plain(expert.up), plain(expert.down)
    rounded = gate.rounded(x).to(x.dtype)
    hidden = functional.silu(functional.linear(rounded, gate.weight))
    hidden = hidden.mul_(functional.linear(rounded, up.weight))
    return functional.linear(down.rounded(hidden).to(x.dtype), down.weight)


def moe(x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
    """As `ops.moe`: tokens sorted by expert, one product for each expert that has any.

    Example, 3 tokens, top_k 2, chosen [[1, 0], [1, 2], [0, 1]]: sorted by expert the picks are
    token 0, 2 (expert 0), 0, 1, 2 (expert 1), 1 (expert 2).
    """
    weights, chosen = _choose(x, router, shape)
    order = chosen.flatten().argsort(stable=True)
    rows = order // shape.top_k
    counts = chosen.flatten().bincount(minlength=len(experts)).tolist()
    picked = torch.split(x.index_select(0, rows), counts)
    outs = [_run_expert(part, experts[i]) for i, part in enumerate(picked) if part.shape[0]]
    scaled = torch.cat(outs).float() * weights.flatten().index_select(0, order).unsqueeze(1)
    summed = torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, rows, scaled)
    return summed.to(x.dtype)
