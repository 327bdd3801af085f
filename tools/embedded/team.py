"""Processes that train together, each with its share of the rows and one copy of the model.

On a busy machine one process of one thread per core is faster than one process of many threads:
processes wait for each other once a step instead of inside every operation. A process that is
paused pauses the others at the next step.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PAUSE_MAX = timedelta(hours=12)


@dataclass(frozen=True, slots=True, kw_only=True)
class Team:
    """This process's place among its peers; a team of one never communicates."""

    rank: int = 0
    size: int = 1

    def join(self, meeting_file: Path) -> None:
        """Meet the other processes; blocks until all are there."""
        if self.size > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{meeting_file.resolve()}",
                rank=self.rank,
                world_size=self.size,
                timeout=PAUSE_MAX,
            )

    def agree(self, decision: dict[str, Any]) -> dict[str, Any]:
        """What the first process decided. Any: plain values."""
        if self.size == 1:
            return decision
        box: list[Any] = [decision]
        dist.broadcast_object_list(box, src=0)
        agreed: dict[str, Any] = box[0]
        return agreed

    def average_gradients(self, model: nn.Module) -> None:
        """Replace each gradient by its mean over the team, in place; one message."""
        if self.size == 1:
            return
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        start = 0
        for gradient in gradients:
            end = start + gradient.numel()
            gradient.copy_(flat[start:end].view_as(gradient))
            start = end

    def share(self, rows: list[Any]) -> list[Any]:
        """This process's part of a list. Any: whatever the list holds."""
        return rows[self.rank :: self.size]

    def gather(self, stack: Tensor) -> None:
        """Complete a stack of which each process filled its share and left zeros, in place."""
        if self.size > 1:
            dist.all_reduce(stack)
