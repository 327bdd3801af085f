"""Many adapters in one step: `y += scale * B (A x)` for runs of rows, in two launches a product.

A first kernel makes `A x` of every tile of rows, the inputs cut into chunks of fixed length side by side; a
second adds the chunks, multiplies with B and adds to y. What the tiles are and where adapters' matrices lie
is read on the device (`adapter_tables`). Tiles and chunks are the same whatever the batch, so that results do
not depend on it.

The launches of a recorded step follow from its number of rows alone: there are as many tiles as rows, ranks
are those of the largest adapter that may come, and programs of tiles without rows, or of ranks that an
adapter lacks, end at once.

Letters: T rows, I inputs, O outputs, R ranks, rounded up to a power of two.
"""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from penstock.kernels.adapters import LoraSite
from penstock.kernels.triton.adapter_tables import (
    FIELDS,
    ROWS,
    TILE_FIELDS,
    Adapters,
    FixedTables,
    StagedRows,
)
from penstock.kernels.triton.launch import dot, inlined, narrow

CHUNK: Final = 1024
"""Inputs that one program of the first kernel sums."""
STEP: Final = 64
"""Inputs of a step of its loop."""
OUTPUTS: Final = 128
"""Of one program of the second kernel."""
MAX_RANKS: Final = 64
"""Ranks in one product; more are done in turn."""


@inlined
def _place(tiles: tl.tensor, places: tl.tensor, site: tl.tensor, num_sites: tl.tensor) -> tl.tensor:
    """Where the adapter of this program's tile is described."""
    adapter = tl.load(tiles + tl.program_id(0) * TILE_FIELDS + 2)
    return places + (adapter * num_sites + site) * FIELDS


@inlined
def _rank(tiles: tl.tensor, place: tl.tensor) -> tl.tensor:
    """Of the adapter of this program's tile; 0 if the tile has no rows."""
    num_rows = tl.load(tiles + tl.program_id(0) * TILE_FIELDS + 1)
    return tl.load(place + 2, mask=num_rows > 0, other=0)


@triton.jit(do_not_specialize=["num_rows", "site"])
def _shrink_kernel(
    x: tl.tensor,
    tiles: tl.tensor,
    places: tl.tensor,
    anchor: tl.tensor,
    partials: tl.tensor,
    num_rows: tl.tensor,
    x_stride: tl.tensor,
    site: tl.tensor,
    num_sites: tl.tensor,
    IN: tl.constexpr,
    CHUNK: tl.constexpr,
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    """`A x` of one tile over one chunk of the inputs, some ranks: partials are [chunks, T, RANKS]."""
    place = _place(tiles, places, site, num_sites)
    rank = _rank(tiles, place)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) * BLOCK_R < rank:
        a = anchor + tl.multiple_of(tl.load(place), 16)
        row_mask = (tl.arange(0, ROWS) < tl.load(tiles + tl.program_id(0) * TILE_FIELDS + 1))[:, None]
        rows = (tl.load(tiles + tl.program_id(0) * TILE_FIELDS) + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        acc = tl.zeros((ROWS, BLOCK_R), tl.float32)
        for k in range(0, CHUNK, STEP):
            ks = tl.program_id(1) * CHUNK + k + tl.arange(0, STEP)
            x_tile = tl.load(x + rows * x_stride + ks[None, :], mask=row_mask & (ks < IN)[None, :], other=0.0)
            mask = (ranks < rank)[None, :] & (ks < IN)[:, None]
            a_tile = tl.load(a + ranks[None, :] * IN + ks[:, None], mask=mask, other=0.0)
            acc = dot(x_tile, a_tile, acc)
        at = partials + (tl.program_id(1).to(tl.int64) * num_rows + rows) * RANKS + ranks[None, :]
        tl.store(at, acc, mask=row_mask)


@triton.jit(do_not_specialize=["num_rows", "site"])
def _expand_kernel(
    y: tl.tensor,
    tiles: tl.tensor,
    places: tl.tensor,
    anchor: tl.tensor,
    partials: tl.tensor,
    num_rows: tl.tensor,
    num_cols: tl.tensor,
    y_stride: tl.tensor,
    site: tl.tensor,
    num_sites: tl.tensor,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """Add `scale * B s` to some outputs of one tile, where s is the sum of its chunks, first to last."""
    place = _place(tiles, places, site, num_sites)
    rank = _rank(tiles, place)
    if rank > 0:
        b = anchor + tl.multiple_of(tl.load(place + 1), 16)
        scale = tl.load(place + 3).to(tl.int32).to(tl.float32, bitcast=True)
        row_mask = (tl.arange(0, ROWS) < tl.load(tiles + tl.program_id(0) * TILE_FIELDS + 1))[:, None]
        rows = (tl.load(tiles + tl.program_id(0) * TILE_FIELDS) + tl.arange(0, ROWS)[:, None]).to(tl.int64)
        cols = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)
        acc = tl.zeros((ROWS, BLOCK_N), tl.float32)
        for first in range(0, RANKS, BLOCK_R):
            ranks = first + tl.arange(0, BLOCK_R)
            mask = row_mask & (ranks < rank)[None, :]
            shrunk = tl.zeros((ROWS, BLOCK_R), tl.float32)
            for chunk in range(CHUNKS):
                at = partials + (chunk * num_rows.to(tl.int64) + rows) * RANKS + ranks[None, :]
                shrunk += tl.load(at, mask=mask, other=0.0)
            mask = (ranks < rank)[:, None] & (cols < num_cols)
            b_tile = tl.load(b + cols * rank + ranks[:, None], mask=mask, other=0.0)
            acc = dot(narrow(shrunk, b.dtype.element_ty), b_tile, acc)
        mask = row_mask & (cols < num_cols)
        total = tl.load(y + rows * y_stride + cols, mask=mask, other=0.0).to(tl.float32) + acc * scale
        tl.store(y + rows * y_stride + cols, narrow(total, y.dtype.element_ty), mask=mask)


def lora(x: Tensor, y: Tensor, site: LoraSite, *, adapters: Adapters) -> Tensor:
    """As `ops.lora`, in place.

    Args:
        x: [T, I].
        y: [T, O].
        site: the product.
        adapters: that prepared the step's.
    """
    tables = site.active.tables
    if tables is not None:
        assert isinstance(tables, FixedTables), type(tables)
        return _add(x, y, site, tables.staged, num_tiles=x.shape[0])
    if not site.active.rows:
        return y
    staged = adapters.staged(site.active.rows)
    return _add(x, y, site, staged, num_tiles=staged.tiles.shape[0]) if staged.num_ranks else y


def _add(x: Tensor, y: Tensor, site: LoraSite, staged: StagedRows, *, num_tiles: int) -> Tensor:
    x = x if x.stride(1) == 1 else x.contiguous()
    num_sites = staged.places.shape[1]
    chunks, block = cdiv(x.shape[1], CHUNK), min(MAX_RANKS, staged.num_ranks)
    partials = torch.empty(chunks, x.shape[0], staged.num_ranks, dtype=torch.float32, device=x.device)
    tables = (staged.tiles, staged.places, staged.anchor, partials)
    _shrink_kernel[(num_tiles, chunks, staged.num_ranks // block)](
        x, *tables, x.shape[0], x.stride(0), site.index, num_sites,
        IN=x.shape[1], CHUNK=min(CHUNK, cdiv(x.shape[1], STEP) * STEP), STEP=STEP, ROWS=ROWS,
        RANKS=staged.num_ranks, BLOCK_R=block,
    )  # fmt: skip
    _expand_kernel[(num_tiles, cdiv(y.shape[1], OUTPUTS))](
        y, *tables, x.shape[0], y.shape[1], y.stride(0), site.index, num_sites,
        CHUNKS=chunks, ROWS=ROWS, RANKS=staged.num_ranks, BLOCK_R=block, BLOCK_N=OUTPUTS,
        enable_fp_fusion=False,
    )  # fmt: skip
    return y
