"""Between host and device: a step's inputs in one copy, and numbers back.

The batch is built in plain arrays as on the CPU; here all of them go into one pinned buffer, the buffer to
the device in one copy that the host does not wait for, and the tensors of the batch are views of what
arrives. Pinned memory comes from torch's own pool, which hands a buffer out again only after the copies from
it have run. Without a device the same code moves from host memory to host memory, for tests.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Final

import torch
from torch import Tensor

from penstock.engine.sampling.vocabulary import Floats
from penstock.kernels.batch import AttentionBatch, ForwardBatch

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
    _fill(buffer, tensors, offsets)
    arrived = buffer.to(device, non_blocking=True) if device.type == "cuda" else buffer
    return views_like(arrived, tensors, offsets)


def _fill(buffer: Tensor, tensors: Sequence[Tensor], offsets: Sequence[int]) -> None:
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


def tensors_of(batch: ForwardBatch) -> list[Tensor]:
    """The tensors that differ from step to step; `with_tensors` takes them in this order."""
    found = [batch.token_ids, batch.positions]
    for group in batch.groups:
        found += [group.query_start_loc, group.seq_lens, group.block_tables, group.slot_mapping]
    return found


def with_tensors(batch: ForwardBatch, tensors: Sequence[Tensor]) -> ForwardBatch:
    """The same step over other tensors; what kernels had worked out for the old ones is dropped."""
    token_ids, positions, *rest = tensors
    parts = zip(batch.groups, range(0, len(rest), 4), strict=True)
    groups = tuple(_group(group, rest[first : first + 4]) for group, first in parts)
    return replace(batch, token_ids=token_ids, positions=positions, groups=groups)


def _group(group: AttentionBatch, tensors: Sequence[Tensor]) -> AttentionBatch:
    query_start_loc, seq_lens, block_tables, slot_mapping = tensors
    return AttentionBatch(
        query_start_loc=query_start_loc,
        seq_lens=seq_lens,
        block_tables=block_tables,
        slot_mapping=slot_mapping,
        query_lens_host=group.query_lens_host,
        seq_lens_host=group.seq_lens_host,
    )


def on_device(batch: ForwardBatch, *, device: torch.device) -> ForwardBatch:
    """The step's inputs on the device, by `upload`; its slabs and adapters are there already."""
    return with_tensors(batch, upload(tensors_of(batch), device=device))


def indices(values: Sequence[int], *, device: torch.device) -> Tensor:
    """[n] int64 on the device, without waiting for it (`torch.tensor(..., device=)` would)."""
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64)
    return torch.tensor(values, dtype=torch.int64).pin_memory().to(device, non_blocking=True)


def on_host(tensor: Tensor) -> Floats:
    """[...] float32 in host memory, C-contiguous; waits for the device, is a view on the CPU."""
    values: Floats = tensor.float().contiguous().cpu().numpy()
    return values
