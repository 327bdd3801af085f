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
are. `engine/sampling/triton_sampler` builds what goes in.

**Source:** keys as ordered integers as in radix selection; the share of top-p as in Holtzman et al. (2020).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

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
NOTHING: Final[Mapping[str, Tensor | int]] = MappingProxyType({})


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


Arguments = dict[str, Tensor | int]
"""Of a kernel, by the names that it gives its parameters."""


def _desk(num_draws: int, num_splits: int, *, device: torch.device) -> Arguments:
    """Numbers of the draws under way; from torch's pool, given back after the call.

    Each is a tensor of its own: planes of one would begin at addresses that depend on the number of draws,
    and Triton compiles a kernel anew, in the middle of serving, for an address that is no multiple of 16.
    """

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=device)

    return {
        "raw_tops": empty(num_draws, num_splits, dtype=torch.float32),
        "tops": empty(num_draws, num_splits, dtype=torch.float32),
        "sums": empty(num_draws, num_splits, dtype=torch.float32),
        "best": empty(num_draws, num_splits, dtype=torch.int64),
        "tokens": empty(num_draws, dtype=torch.int64),
        "firsts": empty(num_draws, dtype=torch.int64),
        "borders": empty(num_draws, dtype=torch.int64),
        "modes": empty(num_draws, dtype=torch.int32),
        "statuses": empty(num_draws, dtype=torch.int32),
    }


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
    """The launches of one call.

    A kernel's parameters bear the same names wherever they mean the same, so a launch names only what is its
    own: the rest is looked up.
    """

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
        self._known: Arguments = {
            "logits": logits,
            "stride": logits.stride(0),
            "vocab": self._vocab,
            "num_columns": self._num_columns,
            "num_splits": self._num_splits,
            "num_draws": self._num_draws,
            "rows": request.rows,
            "places": request.places,
            "numbers": request.numbers,
            "SPLITS": next_power_of_2(self._num_splits),
            **_desk(self._num_draws, self._num_splits, device=logits.device),
        }
        self._known["edited"] = logits if request.edits is None else self._edit(request.edits)

    def run(self) -> Tensor:
        """All launches, in order."""
        self._scan()
        self._launch(kernels.settle_kernel, (self._num_draws,), num_warps=1)
        if self._request.is_random:
            self._filter_and_pick()
        return self._tell()

    def _launch(
        self,
        kernel: Any,  # triton's own type, which is another one in the interpreter
        grid: tuple[int, ...],
        own: Mapping[str, Tensor | int] = NOTHING,
        *,
        num_warps: int = 4,
    ) -> None:
        """Launch a kernel over what it names: its own arguments first, then what all have in common."""
        given = {name: own[name] if name in own else self._known[name] for name in kernel.arg_names}
        kernel[grid](**given, num_warps=num_warps)

    def _empty(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=self._logits.device)

    def _edit(self, edits: Edits) -> Tensor:
        """[edits, vocab] float32."""
        number = edits.rows.shape[0]
        edited = self._empty(number, self._vocab, dtype=torch.float32)
        own: Arguments = {
            "edited": edited,
            "rows": edits.rows,
            "mask_of": edits.mask_of,
            "masks": edits.masks,
            "mask_words": edits.masks.shape[1],
            "offsets": edits.offsets,
            "ids": edits.ids,
            "kinds": edits.kinds,
            "biases": edits.biases,
            "counts": edits.counts,
            "penalties": edits.penalties,
            "BLOCK": TOUCH_BLOCK,
        }
        self._launch(kernels.copy_kernel, (cdiv(self._vocab, TILE), number), own, num_warps=8)
        if edits.most_tokens:
            self._launch(kernels.touch_kernel, (cdiv(edits.most_tokens, TOUCH_BLOCK), number), own)
        return edited

    def _scan(self) -> None:
        """Leaves the keys of the columns too: [draws, columns], nothing in it where none are asked for."""
        number = self._num_draws if self._has_candidates else 0
        self._known["columns"] = self._empty(max(1, number), self._num_columns, dtype=torch.int64)
        self._known["KEEPS_COLUMNS"] = self._has_candidates
        self._launch(kernels.scan_kernel, (self._num_splits, self._num_draws), num_warps=8)

    def _filter_and_pick(self) -> None:
        request, each = self._request, (self._num_draws,)
        if self._has_candidates:
            self._choose()
        if request.has_top_k or request.has_top_p:
            self._launch(kernels.search_kernel, each, num_warps=16)
        if request.has_top_p or request.has_min_p:
            self._launch(kernels.filter_kernel, (self._num_splits, self._num_draws), num_warps=8)
        self._launch(kernels.pick_kernel, each, num_warps=8)

    def _choose(self) -> None:
        number = self._num_draws
        own: Arguments = {
            "chosen": self._empty(number, FEW, dtype=torch.int32),
            "limits": self._empty(number, dtype=torch.int64),
            "listed": self._empty(number, LIST, dtype=torch.int64),
            "counts": self._empty(number, dtype=torch.int32),
            "PADDED": next_power_of_2(self._num_columns),
        }
        for kernel in (kernels.columns_kernel, kernels.narrow_kernel, kernels.choose_kernel):
            self._launch(kernel, (number,), own, num_warps=8)

    def _tell(self) -> Tensor:
        """Token and status of each draw; logprobs are written over the zeros beside them."""
        number, num_top = self._num_draws, self._request.num_top
        width = TABLE_HEAD + 2 * (num_top or 0)
        table = self._empty(number, width, dtype=torch.float64)
        own: Arguments = {"table": table, "width": width, "BLOCK": TELL_BLOCK}
        self._launch(kernels.tell_kernel, (cdiv(number, TELL_BLOCK),), own)
        if num_top is not None:
            self._tell_logprobs(table, num_top=num_top)
        return table

    def _tell_logprobs(self, table: Tensor, *, num_top: int) -> None:
        number, num_tiles = self._num_draws, cdiv(self._vocab, TILE)
        room = next_power_of_2(num_top) if num_top else 0
        own: Arguments = {
            "tops": self._empty(number, num_tiles, dtype=torch.float32),
            "sums": self._empty(number, num_tiles, dtype=torch.float32),
            "ahead": self._empty(number, num_tiles, dtype=torch.int32),
            "likeliest": self._empty(number, num_tiles, max(1, room), dtype=torch.int64),
            "table": table,
            "num_tiles": num_tiles,
            "num_top": num_top,
            "NUM_TOP": room,
            "TILES": next_power_of_2(num_tiles),
            "KEYS": next_power_of_2(num_tiles * max(1, room)),
        }
        self._launch(kernels.facts_kernel, (num_tiles, number), own, num_warps=8)
        self._launch(kernels.tell_logprobs_kernel, (number,), own)
