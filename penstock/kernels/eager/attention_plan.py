"""Which rows attend together: worked out once a step on the host, used by every layer of a cache group.

A *piece* is a run of query rows of one sequence with the blocks it can see. Pieces of like shape form a
*bucket*, which one batched call computes; within a bucket shorter pieces are padded. Merging saves calls,
padding costs work, so a bucket grows while its padded work stays near its true work.

Example, block_size 4, no window: decodes of lengths 9 and 10, a chunk of rows 4..6 of a third sequence.

```
bucket 1   rows [0], [1]    3 blocks each, keys 12    masks hide slots 9.. and 10..
bucket 2   rows [2 3 4]     2 blocks,      keys 8     mask is the causal staircase from position 4
```
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.batch import AttentionBatch

MAX_MASK_ELEMENTS = 1 << 22
"""Query rows times keys of one bucket: a float32 mask of 16 MB, still inside the last-level cache."""
MAX_BUCKET_BYTES = 4 << 20
"""Keys and values that one call gathers, unless one sequence alone has more: what was gathered is read
from the cache then, not from memory (measured: 2.6 ms instead of 7.4 for 16 MB in pieces of 4)."""
CALL_COST = 4096
"""What one more batched call costs, in units of work (about 30 us on the machine measured)."""
KEY_COST = 8
"""Work to gather one key and value, beside one unit for each query row that reads it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Query rows [row, row + query_len) of the step, whose last stands at position end - 1."""

    seq_idx: int
    row: int
    query_len: int
    start_block: int
    """First block of the table that a row can see."""
    num_blocks: int
    end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Pieces that one batched call computes. S pieces, Q rows each, K keys each, after padding."""

    rows: Tensor
    """[S * Q] int64, row of the step for each padded query; padding repeats the piece's last row."""
    keep: Tensor | None
    """[n] int64, which of the S * Q results are real; None if all are."""
    targets: Tensor
    """[n] int64, the rows they belong to."""
    block_ids: Tensor
    """[S * K / block_size] int64; padding repeats the piece's own last block."""
    bias: Tensor | None
    """[S, 1, Q, K] of the query's dtype, 0 or -inf; None when `is_causal` says it all."""
    is_causal: bool
    """One piece that starts its sequence: keys beyond `num_keys` are cut off and the mask is a triangle."""
    num_pieces: int
    query_len: int
    num_keys: int


def _pieces(batch: AttentionBatch, block_size: int, window: int | None) -> Iterator[Piece]:
    row = 0
    for seq_idx, (query_len, seq_len) in enumerate(
        zip(batch.query_lens_host, batch.seq_lens_host, strict=True)
    ):
        whole = query_len == seq_len and (window is None or seq_len <= window)
        step = query_len if whole else max(1, MAX_MASK_ELEMENTS // seq_len)
        for first in range(0, query_len, step):
            size = min(step, query_len - first)
            end = seq_len - query_len + first + size
            start_block = 0 if window is None else max(0, end - size + 1 - window) // block_size
            num_blocks = -(-end // block_size) - start_block
            yield Piece(
                seq_idx=seq_idx,
                row=row + first,
                query_len=size,
                start_block=start_block,
                num_blocks=num_blocks,
                end=end,
            )
        row += query_len


def _work(query_len: int, num_keys: int) -> int:
    return (query_len + KEY_COST) * num_keys


def _groups(pieces: list[Piece], *, block_size: int, max_keys: int) -> Iterator[list[Piece]]:
    # Sorted from large to small, so that the first of a group sets its padded shape.
    pieces = sorted(pieces, key=lambda piece: (-piece.query_len, -piece.num_blocks))
    group: list[Piece] = []
    true_work = 0
    query_len = num_keys = 0
    for piece in pieces:
        keys = piece.num_blocks * block_size
        own = _work(piece.query_len, keys)
        widest = max(num_keys, keys)
        count = len(group) + 1
        padded = count * _work(query_len, widest)
        fits = count * widest <= max_keys and count * query_len * widest <= MAX_MASK_ELEMENTS
        if group and (not fits or padded > true_work + own + CALL_COST + (true_work + own) // 8):
            yield group
            group, true_work, num_keys = [], 0, 0
        if not group:
            query_len = piece.query_len
        group.append(piece)
        true_work += own
        num_keys = max(num_keys, keys)
    if group:
        yield group


def _bias(group: list[Piece], *, num_keys: int, block_size: int, window: int | None) -> Tensor:
    # [S, 1, Q, K] bool: which gathered keys each row sees.
    query_lens = torch.tensor([piece.query_len for piece in group])
    ends = torch.tensor([piece.end for piece in group])
    starts = torch.tensor([piece.start_block * block_size for piece in group])
    rows_Q = torch.arange(group[0].query_len)
    position_SQ = (ends - query_lens)[:, None] + torch.minimum(rows_Q[None, :], query_lens[:, None] - 1)
    key_SK = starts[:, None] + torch.arange(num_keys)[None, :]
    visible_SQK = key_SK[:, None, :] <= position_SQ[:, :, None]
    if window is not None:
        visible_SQK &= key_SK[:, None, :] > position_SQ[:, :, None] - window
    return visible_SQK[:, None]


def _row_indices(group: list[Piece]) -> tuple[Tensor, Tensor | None, Tensor]:
    # Two pieces of 2 and 1 rows at rows 4 and 9: rows [4 5 9 9], keep [0 1 2], targets [4 5 9].
    query_lens = torch.tensor([piece.query_len for piece in group])
    firsts = torch.tensor([piece.row for piece in group])
    steps_Q = torch.arange(group[0].query_len)
    rows_SQ = firsts[:, None] + torch.minimum(steps_Q[None, :], query_lens[:, None] - 1)
    rows = rows_SQ.flatten()
    if group[-1].query_len == group[0].query_len:
        return rows, None, rows
    keep = (steps_Q[None, :] < query_lens[:, None]).flatten().nonzero().squeeze(1)
    return rows, keep, rows[keep]


def _block_ids(group: list[Piece], block_tables: Tensor, num_blocks: int) -> Tensor:
    seqs = torch.tensor([piece.seq_idx for piece in group])
    starts = torch.tensor([piece.start_block for piece in group])
    counts = torch.tensor([piece.num_blocks for piece in group])
    # Padding reads the piece's own last block: never a neighbour's, whose NaN would reach this row.
    steps_SC = torch.minimum(torch.arange(num_blocks)[None, :], counts[:, None] - 1)
    return block_tables[seqs[:, None], starts[:, None] + steps_SC].long().flatten()


def _bucket(
    group: list[Piece], batch: AttentionBatch, *, block_size: int, window: int | None, dtype: torch.dtype
) -> Bucket:
    num_blocks = max(piece.num_blocks for piece in group)
    first = group[0]
    is_causal = (
        len(group) == 1 and first.query_len == first.end > 1 and (window is None or first.end <= window)
    )
    bias = None
    if not is_causal:
        visible = _bias(group, num_keys=num_blocks * block_size, block_size=block_size, window=window)
        bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
    rows, keep, targets = _row_indices(group)
    return Bucket(
        rows=rows,
        keep=keep,
        targets=targets,
        block_ids=_block_ids(group, batch.block_tables, num_blocks),
        bias=bias,
        is_causal=is_causal,
        num_pieces=len(group),
        query_len=first.query_len,
        num_keys=first.end if is_causal else num_blocks * block_size,
    )


def make_plan(
    batch: AttentionBatch, *, block_size: int, window: int | None, dtype: torch.dtype, key_bytes: int
) -> tuple[Bucket, ...]:
    """Bucket the sequences of a step.

    Args:
        batch: the step's lengths and tables.
        block_size: slots of a block.
        window: of the layers that will use the plan.
        dtype: of the queries, for the masks.
        key_bytes: size of one token's keys and values in one layer.

    Returns:
        Buckets that cover every row once. Cost: O(rows * keys) for the masks.
    """
    pieces = list(_pieces(batch, block_size, window))
    return tuple(
        _bucket(group, batch, block_size=block_size, window=window, dtype=dtype)
        for group in _groups(pieces, block_size=block_size, max_keys=MAX_BUCKET_BYTES // key_bytes)
    )
