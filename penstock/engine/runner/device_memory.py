"""What a compute device has of memory and what this process takes of it.

Read only; `kv_budget` makes a pool's size of it and `/admin/memory` tells it. The protocol is small so that
the arithmetic is tested without a device.
"""

from dataclasses import dataclass
from typing import Protocol

import torch


class DeviceMemory(Protocol):
    """One device; all figures in bytes."""

    @property
    def total_bytes(self) -> int:
        """What the device has."""
        ...

    @property
    def used_bytes(self) -> int:
        """What is taken now, by this process (its context too) and by others."""
        ...

    @property
    def allocated_bytes(self) -> int:
        """Of tensors of this process."""
        ...

    @property
    def peak_bytes(self) -> int:
        """Most that `allocated_bytes` has been since `reset_peak`."""
        ...

    def reset_peak(self) -> None:
        """Start to look for a new peak."""
        ...

    def empty_cache(self) -> None:
        """Give back what no tensor uses."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaMemory:
    """A `DeviceMemory` of a CUDA device."""

    device: torch.device

    @property
    def total_bytes(self) -> int:
        """See `DeviceMemory`."""
        return int(torch.cuda.mem_get_info(self.device)[1])

    @property
    def used_bytes(self) -> int:
        """See `DeviceMemory`."""
        free, total = torch.cuda.mem_get_info(self.device)
        return int(total - free)

    @property
    def allocated_bytes(self) -> int:
        """See `DeviceMemory`."""
        return int(torch.cuda.memory_allocated(self.device))

    @property
    def peak_bytes(self) -> int:
        """See `DeviceMemory`."""
        return int(torch.cuda.max_memory_allocated(self.device))

    def reset_peak(self) -> None:
        """See `DeviceMemory`."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def empty_cache(self) -> None:
        """See `DeviceMemory`."""
        torch.cuda.empty_cache()


def memory_of(device: torch.device) -> DeviceMemory | None:
    """The memory of a device that has its own; None for the CPU, which computes in the host's."""
    return CudaMemory(device=device) if device.type == "cuda" else None
