"""Muon for the matrices of the blocks, AdamW for embeddings and norms.

Source: Jordan et al., Muon (2024), and Liu et al., Muon is Scalable for LLM Training (2025),
section 2.2, whose update size lets both halves share one learning rate.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from tools.embedded.team import Team

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NUM_ITERATIONS = 5
UPDATE_RMS = 0.2


def orthogonalise(g_nrc: Tensor) -> Tensor:
    """Push the singular values of each matrix in the stack towards 1, in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    x = g_nrc.bfloat16()
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(NUM_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    flat: Tensor = x.mT if tall else x
    return flat.float()


class Muon(torch.optim.Optimizer):
    """Momentum whose step is made orthogonal; matrices of one shape are stepped as a stack."""

    def __init__(self, matrices: Iterable[nn.Parameter], *, team: Team, momentum: float = 0.95) -> None:
        self.team = team
        groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for matrix in matrices:
            groups.setdefault(tuple(matrix.shape), []).append(matrix)
        defaults = {"lr": 0.0, "momentum": momentum, "weight_decay": 0.1}
        super().__init__([{"params": stack} for stack in groups.values()], defaults)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]  # Any: unused
        """Update every matrix in place from its gradient and momentum."""
        assert closure is None
        for group in self.param_groups:
            stack = [matrix for matrix in group["params"] if matrix.grad is not None]
            if stack:
                self._step_stack(stack, group)

    def _step_stack(self, stack: list[nn.Parameter], group: dict[str, Any]) -> None:
        directions = []
        for matrix in stack:
            assert matrix.grad is not None
            state = self.state[matrix]
            velocity = state.setdefault("velocity", torch.zeros_like(matrix))
            velocity.lerp_(matrix.grad, 1 - group["momentum"])
            directions.append(matrix.grad.lerp(velocity, group["momentum"]))
        updates = torch.zeros(len(stack), *stack[0].shape, device=stack[0].device)
        own = self.team.share(list(range(len(stack))))
        if own:
            updates[own] = orthogonalise(torch.stack([directions[number] for number in own]))
        self.team.gather(updates)
        size = UPDATE_RMS * max(stack[0].shape) ** 0.5
        for matrix, update in zip(stack, updates, strict=True):
            matrix.mul_(1 - group["lr"] * group["weight_decay"])
            matrix.add_(update, alpha=-group["lr"] * size)


def make_optimizers(model: nn.Module, team: Team) -> list[torch.optim.Optimizer]:
    """Muon for the block matrices, AdamW for the rest; the loop sets their learning rates."""
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "layers" in name]
    others = [weight for name, weight in named if not (weight.ndim == 2 and "layers" in name)]
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.95), weight_decay=0.0)
    return [Muon(matrices, team=team), adam]
