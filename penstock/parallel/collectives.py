"""Collectives over `torch.distributed`: gloo between CPUs, NCCL between GPUs.

The rendezvous is a file in a private folder, so that no port is open before the ranks know each other.
"""

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from penstock.parallel.rank import Rank

TIMEOUT_S: Final = 120.0
"""A rank that waits longer for another takes it for dead."""


@dataclass(frozen=True, slots=True)
class TorchCollectives:
    """As `rank.Collectives`, in the default process group."""

    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """As `Collectives.all_reduce`; between CPUs the sum runs in float32."""
        total = x.contiguous() if x.is_cuda else x.to(torch.float32, copy=True).contiguous()
        dist.all_reduce(total)
        return total.to(x.dtype)

    def all_gather(self, x: Tensor) -> Tensor:
        """As `Collectives.all_gather`."""
        gathered = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(gathered, x.contiguous())
        return torch.stack(gathered)


def join_ranks(
    folder: Path, *, index: int, size: int, device: torch.device, timeout_s: float = TIMEOUT_S
) -> Rank:
    """Meet the other ranks; returns when all are there.

    Args:
        folder: private, the same for all ranks and new for each group.
        index: of this rank, from 0.
        size: number of ranks, at least 2.
        device: where this rank computes.
        timeout_s: after which a rank that waits for another gives up, in seconds.

    Raises:
        RuntimeError: not all came in time.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)  # NCCL takes the current one
    dist.init_process_group(
        backend="nccl" if device.type == "cuda" else "gloo",
        store=dist.FileStore(str(folder / "ranks"), size),  # type: ignore[attr-defined]  # its stub forgets it
        rank=index,
        world_size=size,
        timeout=timedelta(seconds=timeout_s),
    )
    return Rank(index=index, size=size, collectives=TorchCollectives(size))


def leave_ranks() -> None:
    """Give the group up; does nothing if there is none."""
    if dist.is_initialized():
        dist.destroy_process_group()
