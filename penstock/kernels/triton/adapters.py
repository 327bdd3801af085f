"""Many adapters in one step: `y += scale * B (A x)` for runs of rows, in two launches a product.

The rows of all runs are cut into tiles of neighbours that have the same adapter. A first kernel makes `A x`
of every tile, the inputs cut into chunks of fixed length side by side; a second adds the chunks, multiplies
with B and adds to y. What the tiles are and where each adapter's matrices lie is sent to the device once a
step. Tiles and chunks are the same whatever the batch, so that results do not depend on it.

Matrices lie anywhere; the kernels are told their distance from an *anchor*, a tensor of the same dtype.
Letters: T rows, I inputs, O outputs, R ranks, rounded up to a power of two.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from penstock.kernels.adapters import AdapterRows, LoraSite, LowRankPair
from penstock.kernels.transfer import upload
from penstock.kernels.triton.launch import dot, inlined, narrow

ALIGNMENT: Final = 16
"""Elements that matrices begin at a multiple of, so that the kernels load 16 bytes at once."""
ROWS: Final = 16
"""Of a tile: the least that the matrix instructions take; most tiles of decodes have one."""
CHUNK: Final = 1024
"""Inputs that one program of the first kernel sums."""
STEP: Final = 64
"""Inputs of a step of its loop."""
OUTPUTS: Final = 128
"""Of one program of the second kernel."""
MAX_RANKS: Final = 64
"""Ranks in one product; more are done in turn."""
FIELDS: Final = tl.constexpr(4)
"""Numbers that are known of an adapter at a site: distances of A and B, rank, the bits of the scale."""


@dataclass(slots=True, kw_only=True, eq=False)
class TritonAdapter:
    """Matrices on the device, by the number of their site; all lie in one piece of memory."""

    pairs: Mapping[int, LowRankPair]
    num_sites: int
    anchor: Tensor
    """[1] of the matrices' dtype."""
    places: Tensor = field(init=False)
    """[num_sites, FIELDS] int64 on the host; of sites without matrices all zero."""
    addresses: tuple[int, int] = field(init=False, default=(0, 0))
    """Of matrices and anchor when `places` was made: they may be moved while the engine sleeps."""

    def __post_init__(self) -> None:
        self._find_places()

    @property
    def num_bytes(self) -> int:
        """Of all matrices."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())

    @property
    def max_rank(self) -> int:
        """The largest; 0 without matrices."""
        return max((pair.rank for pair in self.pairs.values()), default=0)

    def current_places(self) -> Tensor:
        """`places`, made anew if the matrices were moved."""
        if self._addresses_now() != self.addresses:
            self._find_places()
        return self.places

    def _addresses_now(self) -> tuple[int, int]:
        first = next((pair.a.data_ptr() for pair in self.pairs.values()), 0)
        return first, self.anchor.data_ptr()

    def _distance(self, matrix: Tensor) -> int:
        distance, rest = divmod(matrix.data_ptr() - self.anchor.data_ptr(), matrix.element_size())
        assert rest == 0, (matrix.data_ptr(), self.anchor.data_ptr())
        assert distance % ALIGNMENT == 0, distance
        return distance

    def _find_places(self) -> None:
        self.places = torch.zeros(self.num_sites, FIELDS.value, dtype=torch.int64)
        for site, pair in self.pairs.items():
            bits = torch.tensor(pair.scale, dtype=torch.float32).view(torch.int32).item()
            found = (self._distance(pair.a), self._distance(pair.b), pair.rank, bits)
            self.places[site] = torch.tensor(found, dtype=torch.int64)
        self.addresses = self._addresses_now()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StagedRows:
    """A step's adapters on the device."""

    tiles: Tensor
    """[num_tiles, 3] int32: first row, rows, number of the adapter in `places`."""
    places: Tensor
    """[num_adapters, num_sites, FIELDS] int64."""
    anchor: Tensor
    num_ranks: int
    """R, of the largest adapter among them; 0 if none has matrices."""


def _cut_into_tiles(rows: tuple[AdapterRows, ...], numbers: Mapping[int, int]) -> list[tuple[int, int, int]]:
    """Runs as tiles. Example: rows 4 to 21 are tiles of 16 and 2 rows, which begin at 4 and at 20."""
    return [
        (run.first_row + start, min(ROWS, run.num_rows - start), numbers[id(run.weights)])
        for run in rows
        for start in range(0, run.num_rows, ROWS)
    ]


def _stage(rows: tuple[AdapterRows, ...]) -> StagedRows:
    adapters = {id(run.weights): _known(run) for run in rows}
    numbers = {key: number for number, key in enumerate(adapters)}
    first = next(iter(adapters.values()))
    tiles, places = upload(
        [
            torch.tensor(_cut_into_tiles(rows, numbers), dtype=torch.int32),
            torch.stack([each.current_places() for each in adapters.values()]),
        ],
        device=first.anchor.device,
    )
    max_rank = max(each.max_rank for each in adapters.values())
    num_ranks = max(ROWS, next_power_of_2(max_rank)) if max_rank else 0
    return StagedRows(tiles=tiles, places=places, anchor=first.anchor, num_ranks=num_ranks)


def _known(run: AdapterRows) -> TritonAdapter:
    assert isinstance(run.weights, TritonAdapter), type(run.weights)
    return run.weights


class Adapters:
    """The adapters of one kernel set: prepares them, and keeps the tables of the step that is computed."""

    def __init__(self, device: torch.device) -> None:
        """Nothing is allocated yet.

        Args:
            device: where the model computes.
        """
        self._device = device
        self._anchors: dict[torch.dtype, Tensor] = {}
        self._rows: tuple[AdapterRows, ...] = ()
        self._staged: StagedRows | None = None

    def prepare(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> TritonAdapter:
        """As `ops.prepare_adapter`."""
        if dtype not in self._anchors:
            self._anchors[dtype] = torch.zeros(1, dtype=dtype, device=self._device)
        matrices = [matrix for pair in pairs.values() for matrix in (pair.a, pair.b)]
        ends = [*accumulate((cdiv(each.numel(), ALIGNMENT) * ALIGNMENT for each in matrices), initial=0)]
        whole = torch.empty(ends[-1], dtype=dtype, device=self._device)
        views = [
            whole[start : start + each.numel()].view(each.shape).copy_(each)
            for start, each in zip(ends, matrices, strict=False)
        ]
        kept = {
            site: LowRankPair(a=a, b=b, scale=pair.scale)
            for (site, pair), a, b in zip(pairs.items(), views[::2], views[1::2], strict=True)
        }
        return TritonAdapter(pairs=kept, num_sites=num_sites, anchor=self._anchors[dtype])

    def staged(self, rows: tuple[AdapterRows, ...]) -> StagedRows:
        """The tables of a step, sent once; steps are told apart by their runs."""
        if self._staged is None or rows is not self._rows:
            self._rows, self._staged = rows, _stage(rows)
        return self._staged


@inlined
def _place(tiles: tl.tensor, places: tl.tensor, site: tl.tensor, num_sites: tl.tensor) -> tl.tensor:
    """Where the adapter of this program's tile is described."""
    adapter = tl.load(tiles + tl.program_id(0) * 3 + 2)
    return places + (adapter * num_sites + site) * FIELDS


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
    rank = tl.load(place + 2)
    ranks = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    if tl.program_id(2) * BLOCK_R < rank:
        a = anchor + tl.multiple_of(tl.load(place), 16)
        row_mask = (tl.arange(0, ROWS) < tl.load(tiles + tl.program_id(0) * 3 + 1))[:, None]
        rows = (tl.load(tiles + tl.program_id(0) * 3) + tl.arange(0, ROWS)[:, None]).to(tl.int64)
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
    rank = tl.load(place + 2)
    if rank > 0:
        b = anchor + tl.multiple_of(tl.load(place + 1), 16)
        scale = tl.load(place + 3).to(tl.int32).to(tl.float32, bitcast=True)
        row_mask = (tl.arange(0, ROWS) < tl.load(tiles + tl.program_id(0) * 3 + 1))[:, None]
        rows = (tl.load(tiles + tl.program_id(0) * 3) + tl.arange(0, ROWS)[:, None]).to(tl.int64)
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
    if not site.active.rows:
        return y
    staged = adapters.staged(site.active.rows)
    if not staged.num_ranks:
        return y
    x = x if x.stride(1) == 1 else x.contiguous()
    num_tiles, num_sites = staged.tiles.shape[0], staged.places.shape[1]
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
