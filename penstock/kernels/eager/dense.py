"""Dense operations with torch's fused functions."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.ops import ExpertWeights, MoeShape


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    """As `ops.rms_norm`."""
    if weight_offset == 0.0:
        return functional.rms_norm(x, weight.shape, weight, eps)
    # The sum with the offset is taken in float32: bfloat16 would lose a small weight beside 1.
    normed = functional.rms_norm(x.float(), weight.shape, weight.float() + weight_offset, eps)
    return normed.to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `ops.rope`."""
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
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
    hidden = functional.silu(functional.linear(x, expert.gate)).mul_(functional.linear(x, expert.up))
    return functional.linear(hidden, expert.down)


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
