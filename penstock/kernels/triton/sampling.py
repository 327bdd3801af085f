"""Tokens drawn where the logits lie: a few launches over all draws of a step, nothing of which is waited for.

```
edits       copy, touch        rows with masks, bans, biases or penalties, into rows of their own
scan        1 pass             maxima, first keys and masses of splits of 4,096 tokens
settle                         failures and greedy draws are done; what the others need
columns, narrow, choose        top-k and top-p from the best 128 columns, as a rule all there is to it
search                         rows whose border lies beyond the list: passes over a row in the cache
filter      1 pass             masses of what was kept, for min-p alone and for a wide nucleus
pick                           one split of 4,096 tokens is read again, and the token is known
facts, tell 1 pass if asked    logprobs of the raw row; the table
```

A launch that no draw of the call can need is left out; rows that do not need one leave it at once. So a
greedy or plain draw reads its logits once, as does a top-k or a usual top-p; min-p and a wide nucleus read
them twice, logprobs and edits once or twice more. What is launched and its grids follow from the number of
draws and from their parameters, never from a value on the device, and no sum depends on how many draws there
are. `engine/sampling/device` builds what goes in.

**Source:** keys as ordered integers as in radix selection; the share of top-p as in Holtzman et al. (2020).
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from penstock.kernels.triton import sampling_kernels as kernels

TABLE_HEAD: Final = 4
"""Token, status, logprob, rank; the alternatives follow."""
TOUCH_BLOCK: Final = 256
TELL_BLOCK: Final = 16
LANES: Final = kernels.LANES.value
COLUMNS: Final = kernels.COLUMNS.value
FEW: Final = kernels.FEW.value
LIST: Final = kernels.LIST.value
TILE: Final = kernels.TILE.value


@dataclass(frozen=True, slots=True, kw_only=True)
class Edits:
    """What changes rows before the choice. All tensors lie where the logits do."""

    rows: Tensor
    """[edits] int64: which row of the logits each begins with."""
    mask_of: Tensor
    """[edits] int64: its row in `masks`, -1 for none."""
    masks: Tensor
    """[masks, words] int32, a bit for each token that may come; [1, 1] if there are none."""
    offsets: Tensor
    """[edits + 1] int64: where each one's tokens begin in the lists below."""
    ids: Tensor
    """[tokens] int64, each once for an edit."""
    kinds: Tensor
    """[tokens] int32: 1 banned, 2 seen (for the repetition penalty), or both."""
    biases: Tensor
    """[tokens] float32, added."""
    counts: Tensor
    """[tokens] float32, how often the answer has it."""
    penalties: Tensor
    """[edits, 3] float32: repetition, presence, frequency."""
    most_tokens: int
    """Of one edit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawRequest:
    """Draws of one call. Tensors lie where the logits do; the rest is known on the host."""

    rows: Tensor
    """[draws] int64: the row of the logits each draws from."""
    places: Tensor
    """[draws] int64: which edit is its own, -1 for none."""
    numbers: Tensor
    """[6, draws] float64: temperature (0 if greedy), top_k (0 for all), top_p, min_p, uniform number, 1 where
    logprobs are asked for."""
    edits: Edits | None
    is_random: bool
    """False if all are greedy."""
    has_top_k: bool
    has_top_p: bool
    has_min_p: bool
    num_top: int | None
    """Alternatives in the table; None where nobody asks for logprobs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Desk:
    """Numbers of the draws under way; from torch's pool, given back after the call."""

    raw_tops: Tensor
    best: Tensor
    tops: Tensor
    sums: Tensor
    modes: Tensor
    tokens: Tensor
    statuses: Tensor
    firsts: Tensor
    borders: Tensor


def _desk(num_draws: int, num_splits: int, *, device: torch.device) -> _Desk:
    floats = torch.empty(3, num_draws, num_splits, dtype=torch.float32, device=device)
    longs = torch.empty(3, num_draws, dtype=torch.int64, device=device)
    words = torch.empty(2, num_draws, dtype=torch.int32, device=device)
    return _Desk(
        raw_tops=floats[0],
        best=torch.empty(num_draws, num_splits, dtype=torch.int64, device=device),
        tops=floats[1],
        sums=floats[2],
        modes=words[0],
        tokens=longs[0],
        statuses=words[1],
        firsts=longs[1],
        borders=longs[2],
    )


def draw_tokens(logits: Tensor, request: DrawRequest) -> Tensor:
    """Choose one token per draw; queues its work and waits for nothing.

    Args:
        logits: [rows, vocab] float32 or bfloat16, tokens side by side.
        request: who draws, and how.

    Returns:
        [draws, TABLE_HEAD + 2 * num_top] float64: token (in [0, vocab) whatever the status), `DrawStatus`,
        and where asked for the logprob and rank of the token, then ids and logprobs of the likeliest.
    """
    assert logits.stride(1) == 1, logits.stride()
    return _Drawing(logits, request).run()


class _Drawing:
    """The launches of one call."""

    def __init__(self, logits: Tensor, request: DrawRequest) -> None:
        self._logits = logits
        self._request = request
        self._num_draws = request.rows.shape[0]
        self._vocab = logits.shape[1]
        self._num_columns = cdiv(self._vocab, LANES)
        self._num_splits = cdiv(self._num_columns, COLUMNS)
        self._has_candidates = request.has_top_k or (
            request.has_top_p and self._vocab > kernels.SMALL_VOCAB.value
        )
        self._desk = _desk(self._num_draws, self._num_splits, device=logits.device)
        self._edited = logits if request.edits is None else self._edit(request.edits)

    def run(self) -> Tensor:
        """All launches, in order."""
        columns = self._scan()
        self._settle()
        if self._request.is_random:
            self._filter_and_pick(columns)
        return self._tell()

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self._logits.device)

    def _edit(self, edits: Edits) -> Tensor:
        """[edits, vocab] float32."""
        number = edits.rows.shape[0]
        edited = self._empty(number, self._vocab, dtype=torch.float32)
        kernels.copy_kernel[(cdiv(self._vocab, TILE), number)](
            self._logits,
            edited,
            edits.rows,
            edits.mask_of,
            edits.masks,
            self._logits.stride(0),
            self._vocab,
            edits.masks.shape[1],
            num_warps=8,
        )
        if edits.most_tokens:
            kernels.touch_kernel[(cdiv(edits.most_tokens, TOUCH_BLOCK), number)](
                edited,
                edits.offsets,
                edits.ids,
                edits.kinds,
                edits.biases,
                edits.counts,
                edits.penalties,
                self._vocab,
                BLOCK=TOUCH_BLOCK,
            )
        return edited

    def _source(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Where a draw's logits are."""
        return self._logits, self._edited, self._request.rows, self._request.places

    def _scan(self) -> Tensor:
        """The keys of the columns: [draws, columns], nothing in it where none are asked for."""
        number = self._num_draws if self._has_candidates else 0
        columns, desk = self._empty(max(1, number), self._num_columns, dtype=torch.int64), self._desk
        kernels.scan_kernel[(self._num_splits, self._num_draws)](
            *self._source(),
            self._request.numbers,
            desk.raw_tops,
            desk.best,
            desk.tops,
            desk.sums,
            columns,
            self._vocab,
            self._logits.stride(0),
            self._num_columns,
            KEEPS_COLUMNS=self._has_candidates,
            num_warps=8,
        )
        return columns

    def _settle(self) -> None:
        desk = self._desk
        kernels.settle_kernel[(self._num_draws,)](
            desk.raw_tops,
            desk.best,
            self._request.numbers,
            desk.modes,
            desk.tokens,
            desk.statuses,
            desk.firsts,
            desk.borders,
            self._num_draws,
            self._vocab,
            self._num_splits,
            SPLITS=next_power_of_2(self._num_splits),
            num_warps=1,
        )

    def _filter_and_pick(self, columns: Tensor) -> None:
        request = self._request
        if self._has_candidates:
            self._choose(columns)
        if request.has_top_k or request.has_top_p:
            self._search()
        if request.has_top_p or request.has_min_p:
            self._filter()
        self._pick()

    def _choose(self, columns: Tensor) -> None:
        desk, number = self._desk, self._num_draws
        chosen = self._empty(number, FEW, dtype=torch.int32)
        limits, counts = self._empty(number, dtype=torch.int64), self._empty(number, dtype=torch.int32)
        listed = self._empty(number, LIST, dtype=torch.int64)
        kernels.columns_kernel[(number,)](
            columns,
            desk.modes,
            desk.firsts,
            chosen,
            limits,
            self._vocab,
            self._num_columns,
            PADDED=next_power_of_2(self._num_columns),
            num_warps=8,
        )
        kernels.narrow_kernel[(number,)](
            *self._source(),
            desk.modes,
            chosen,
            limits,
            listed,
            counts,
            self._vocab,
            self._logits.stride(0),
            self._num_columns,
            num_warps=8,
        )
        kernels.choose_kernel[(number,)](
            listed,
            counts,
            self._request.numbers,
            desk.tops,
            desk.sums,
            desk.modes,
            desk.tokens,
            desk.firsts,
            desk.borders,
            number,
            self._vocab,
            self._num_splits,
            SPLITS=next_power_of_2(self._num_splits),
            num_warps=8,
        )

    def _search(self) -> None:
        desk = self._desk
        kernels.search_kernel[(self._num_draws,)](
            *self._source(),
            self._request.numbers,
            desk.modes,
            desk.tokens,
            desk.firsts,
            desk.borders,
            self._num_draws,
            self._vocab,
            self._logits.stride(0),
            num_warps=16,
        )

    def _filter(self) -> None:
        desk = self._desk
        kernels.filter_kernel[(self._num_splits, self._num_draws)](
            *self._source(),
            self._request.numbers,
            desk.modes,
            desk.firsts,
            desk.borders,
            desk.tops,
            desk.sums,
            self._num_draws,
            self._vocab,
            self._logits.stride(0),
            self._num_columns,
            num_warps=8,
        )

    def _pick(self) -> None:
        desk = self._desk
        kernels.pick_kernel[(self._num_draws,)](
            *self._source(),
            self._request.numbers,
            desk.modes,
            desk.tokens,
            desk.firsts,
            desk.borders,
            desk.tops,
            desk.sums,
            self._num_draws,
            self._vocab,
            self._logits.stride(0),
            self._num_columns,
            self._num_splits,
            SPLITS=next_power_of_2(self._num_splits),
            num_warps=8,
        )

    def _tell(self) -> Tensor:
        """Token and status of each draw; logprobs are written over the zeros beside them."""
        desk, number, num_top = self._desk, self._num_draws, self._request.num_top
        width = TABLE_HEAD + 2 * (num_top or 0)
        table = self._empty(number, width, dtype=torch.float64)
        kernels.tell_kernel[(cdiv(number, TELL_BLOCK),)](
            desk.tokens, desk.statuses, table, number, width, BLOCK=TELL_BLOCK
        )
        if num_top is not None:
            self._tell_logprobs(table, num_top=num_top)
        return table

    def _tell_logprobs(self, table: Tensor, *, num_top: int) -> None:
        desk, number, num_tiles = self._desk, self._num_draws, cdiv(self._vocab, TILE)
        room = next_power_of_2(num_top) if num_top else 0
        tops, sums = self._empty(2, number, num_tiles, dtype=torch.float32)
        ahead = self._empty(number, num_tiles, dtype=torch.int32)
        likeliest = self._empty(number, num_tiles, max(1, room), dtype=torch.int64)
        kernels.facts_kernel[(num_tiles, number)](
            self._logits,
            self._request.rows,
            self._request.numbers,
            desk.tokens,
            tops,
            sums,
            ahead,
            likeliest,
            number,
            self._vocab,
            self._logits.stride(0),
            NUM_TOP=room,
            num_warps=8,
        )
        kernels.tell_logprobs_kernel[(number,)](
            self._logits,
            self._request.rows,
            self._request.numbers,
            desk.tokens,
            desk.statuses,
            tops,
            sums,
            ahead,
            likeliest,
            table,
            number,
            self._logits.stride(0),
            num_tiles,
            num_top,
            NUM_TOP=room,
            TILES=next_power_of_2(num_tiles),
            KEYS=next_power_of_2(num_tiles * max(1, room)),
        )
