"""Adapters as the native kernels read them (`csrc/include/penstock/lora.h`).

All of an adapter lies in one piece of memory, in the order in which a pass reads it: site after site, A
before B. The memory asks for huge pages: an adapter is some megabytes that are read once a step.
"""

import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterRows, LowRankPair
from penstock.kernels.cpu import _native

PANEL: Final = 32
"""Outputs that lie together in B."""
ALIGNMENT: Final = 64
ITEM_BYTES: Final = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PackedAdapter:
    """A packed adapter; the memory lives as long as this."""

    adapter: _native.Adapter
    memory: Tensor
    """[bytes] uint8"""

    @property
    def num_bytes(self) -> int:
        """Of the memory."""
        return self.memory.nbytes


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _sizes(pair: LowRankPair) -> tuple[int, int]:
    """Bytes of A and of B as they are packed."""
    num_panels = -(-pair.b.shape[0] // PANEL)
    return _aligned(pair.a.numel() * ITEM_BYTES), num_panels * PANEL * pair.rank * ITEM_BYTES


def _reserve(num_bytes: int) -> Tensor:
    """Zeroed memory in whole pages, huge ones where the system gives them."""
    mapped = mmap.mmap(-1, max(num_bytes, mmap.PAGESIZE))
    if hasattr(mmap, "MADV_HUGEPAGE") and num_bytes >= 2 << 20:
        mapped.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(mapped, dtype=torch.uint8)


def _pack_b(b: Tensor, out: Tensor) -> None:
    """[O, rank] into panels [ceil(O / 32), rank, 32]; `out` is zero where a last panel is not full."""
    num_full = b.shape[0] // PANEL
    panels = out.view(-1, b.shape[1], PANEL)
    panels[:num_full].copy_(b[: num_full * PANEL].view(num_full, PANEL, b.shape[1]).transpose(1, 2))
    if num_full < len(panels):
        rest = b[num_full * PANEL :]
        panels[num_full][:, : len(rest)].copy_(rest.t())


def pack_adapter(pairs: Mapping[int, LowRankPair], *, num_sites: int) -> PackedAdapter:
    """Copy an adapter's matrices into one piece of memory, rounded to bfloat16.

    Args:
        pairs: by the number of their site; B contiguous.
        num_sites: of the model.
    """
    adapter = _native.Adapter(num_sites)
    memory = _reserve(sum(sum(_sizes(pair)) for pair in pairs.values()))
    base, start = memory.data_ptr(), 0
    for site, pair in sorted(pairs.items()):
        a_bytes, b_bytes = _sizes(pair)
        middle, end = start + a_bytes, start + a_bytes + b_bytes
        memory[start : start + pair.a.numel() * ITEM_BYTES].view(torch.bfloat16).view(pair.a.shape).copy_(
            pair.a
        )
        _pack_b(pair.b, memory[middle:end].view(torch.bfloat16))
        adapter.set_site(site, a=base + start, b=base + middle, rank=pair.rank, scale=pair.scale)
        start = end
    return PackedAdapter(adapter=adapter, memory=memory)


def adapter_runs(rows: tuple[AdapterRows, ...]) -> list[tuple[int, int, _native.Adapter]]:
    """A step's runs of rows as a program takes them; the weights must outlive the run."""
    runs = []
    for run in rows:
        assert isinstance(run.weights, PackedAdapter), type(run.weights)
        runs.append((run.first_row, run.num_rows, run.weights.adapter))
    return runs
