"""Numbers between host and device: many tensors in one transfer that nobody waits for, and results back.

Pinned memory comes from torch's own pool, which hands a buffer out again only after the copies from it have
run. Without a device the same code moves from host memory to host memory, for tests.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ALIGNMENT: Final = 256
"""Bytes; what torch gives every tensor of its own, so that a kernel compiled for one takes a view as well."""


def host_buffer(num_bytes: int, *, device: torch.device) -> Tensor:
    """Uninitialised bytes on the host from which `device` can copy by itself."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def upload(tensors: Sequence[Tensor], *, device: torch.device) -> list[Tensor]:
    """Copies on the device of tensors on the host, in one transfer.

    Args:
        tensors: contiguous, of any dtypes.
        device: where to.

    Returns:
        Views of one buffer, in the order given; valid for work that is queued after this call.
    """
    sizes = [-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors]
    offsets = [0, *accumulate(sizes)]
    buffer = host_buffer(offsets[-1], device=device)
    fill(buffer, tensors, offsets)
    arrived = buffer.to(device, non_blocking=True) if device.type == "cuda" else buffer
    return views_like(arrived, tensors, offsets)


def fill(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> None:
    """Write the bytes of each tensor into `buffer` at its offset, all on the host."""
    target = buffer.numpy()
    for tensor, start in zip(tensors, offsets, strict=False):
        flat = tensor.reshape(-1).view(torch.uint8).numpy()
        target[start : start + len(flat)] = flat


def views_like(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> list[Tensor]:
    """For each tensor the bytes of `buffer` from its offset on, in its dtype and shape."""
    return [
        buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for tensor, start in zip(tensors, offsets, strict=False)
    ]


def overwrite(target: Tensor, source: Tensor) -> None:
    """Write a tensor of the host over one on the device, without waiting: after what is queued by then.

    Args:
        target: contiguous; it keeps its address.
        source: of the same shape and dtype; may change after this call.
    """
    assert target.shape == source.shape, (target.shape, source.shape)
    assert target.dtype == source.dtype, (target.dtype, source.dtype)
    staged = host_buffer(source.nbytes, device=target.device)
    fill(staged, [source], [0])
    target.view(torch.uint8).view(-1).copy_(staged, non_blocking=True)


def indices(values: Sequence[int], *, device: torch.device) -> Tensor:
    """[n] int64 on the device, without waiting for it (`torch.tensor(..., device=)` would)."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def on_host(tensor: Tensor) -> npt.NDArray[np.float32]:
    """[...] float32 in host memory, C-contiguous; waits for the device, is a view on the CPU."""
    if tensor.is_cpu and tensor.dtype == torch.float32:  # as usual: two calls of torch less
        return np.ascontiguousarray(tensor.numpy())
    values: npt.NDArray[np.float32] = tensor.float().contiguous().cpu().numpy()
    return values
