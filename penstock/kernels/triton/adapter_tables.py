"""What the kernels of `adapters` read on the device: who has which rows, and where adapters' matrices lie.

The rows of all runs are cut into *tiles* of neighbours that have the same adapter, each of whose matrices has
a *place* for every site. Matrices lie anywhere; a place tells their distance from an *anchor*, a tensor of
the same dtype.

```
rows     0 1 2 3 4 5      tiles   first row, rows, adapter      places [adapter, site]
adapter  - a a - b a                      1,    2,       0      distances of A and B, rank, bits of the scale
                                          4,    1,       1
                                          5,    1,       0
```

A step that is launched kernel by kernel gets tables of its own, in one transfer (`Adapters.staged`). A
recorded step reads tables that never move (`FixedTables`): they are filled before a replay, and tiles that a
step does not need have no rows. What they hold are numbers: an adapter that is unloaded leaves stale ones
behind, to which no tile leads.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Final

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from penstock.kernels.adapters import AdapterLimits, AdapterRows, LowRankPair
from penstock.kernels.transfer import overwrite, upload

ALIGNMENT: Final = 16
"""Elements that matrices begin at a multiple of, so that the kernels load 16 bytes at once."""
ROWS: Final = 16
"""Of a tile: the least that the matrix instructions take; most tiles of decodes have one."""
FIELDS: Final = tl.constexpr(4)
"""Numbers that are known of an adapter at a site: distances of A and B, rank, the bits of the scale."""
TILE_FIELDS: Final = tl.constexpr(3)
"""First row, rows, number of the adapter in `places`."""
NO_PLACES: Final = torch.zeros(0, dtype=torch.int64)
"""Of a number that no adapter has."""


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
    """[num_tiles, TILE_FIELDS] int32."""
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
    num_ranks = _padded_ranks(max(each.max_rank for each in adapters.values()))
    return StagedRows(tiles=tiles, places=places, anchor=first.anchor, num_ranks=num_ranks)


def _padded_ranks(max_rank: int) -> int:
    return max(ROWS, next_power_of_2(max_rank)) if max_rank else 0


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
        return TritonAdapter(pairs=kept, num_sites=num_sites, anchor=self._anchor(dtype))

    def fixed_tables(self, limits: AdapterLimits, *, num_sites: int, dtype: torch.dtype) -> "FixedTables":
        """As `kernel_set.TritonKernels.adapter_tables`."""
        shape = (limits.max_adapters, num_sites, FIELDS.value)
        return FixedTables(
            StagedRows(
                tiles=torch.zeros(limits.max_rows, TILE_FIELDS.value, dtype=torch.int32, device=self._device),
                places=torch.zeros(shape, dtype=torch.int64, device=self._device),
                anchor=self._anchor(dtype),
                num_ranks=_padded_ranks(limits.max_rank),
            )
        )

    def _anchor(self, dtype: torch.dtype) -> Tensor:
        if dtype not in self._anchors:
            self._anchors[dtype] = torch.zeros(1, dtype=dtype, device=self._device)
        return self._anchors[dtype]

    def staged(self, rows: tuple[AdapterRows, ...]) -> StagedRows:
        """The tables of a step, sent once; steps are told apart by their runs."""
        if self._staged is None or rows is not self._rows:
            self._rows, self._staged = rows, _stage(rows)
        return self._staged


class FixedTables:
    """The tables of recorded steps of decodes; an `adapters.AdapterTables`.

    Places are sent when an adapter comes or has been moved, tiles before every replay. Both are copies in the
    order of the device's queue: replays before them have read what was there.
    """

    def __init__(self, staged: StagedRows) -> None:
        """Begin without adapters.

        Args:
            staged: as large as the largest step; all zero.
        """
        self.staged: Final = staged
        self._sent: dict[int, Tensor] = dict.fromkeys(range(len(staged.places)), NO_PLACES)
        """By number in `places`, those that were used longest ago first: what was sent."""

    @property
    def num_bytes(self) -> int:
        """As `AdapterTables.num_bytes`."""
        return self.staged.tiles.nbytes + self.staged.places.nbytes

    def fill(self, rows: tuple[AdapterRows, ...], *, num_rows: int) -> None:
        """As `AdapterTables.fill`."""
        tiles = _cut_into_tiles(rows, self._numbers(rows))
        assert len(tiles) <= num_rows <= len(self.staged.tiles), (len(tiles), num_rows)
        tiles += [(0, 0, 0)] * (num_rows - len(tiles))
        overwrite(self.staged.tiles[:num_rows], torch.tensor(tiles, dtype=torch.int32))

    def _numbers(self, rows: tuple[AdapterRows, ...]) -> dict[int, int]:
        """The number of each adapter of the step, whose places are sent if they are not there."""
        known = {id(places): number for number, places in self._sent.items()}
        wanted = {id(run.weights): self._checked(run).current_places() for run in rows}
        numbers = {key: known[id(places)] for key, places in wanted.items() if id(places) in known}
        for number in numbers.values():
            self._sent[number] = self._sent.pop(number)
        for key in wanted.keys() - numbers.keys():
            number = numbers[key] = next(iter(self._sent))
            self._sent.pop(number)
            self._sent[number] = wanted[key]
            overwrite(self.staged.places[number], wanted[key])
        assert len(wanted) <= len(self._sent), "more adapters than slots"
        return numbers

    def _checked(self, run: AdapterRows) -> TritonAdapter:
        adapter, staged = _known(run), self.staged
        assert adapter.max_rank <= staged.num_ranks, (adapter.max_rank, staged.num_ranks)
        assert adapter.anchor.data_ptr() == staged.anchor.data_ptr(), "the anchor of a recording was moved"
        return adapter
