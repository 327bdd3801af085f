"""The kernels of paged attention; `attention` launches them and says how they share the work.

A program has one key/value head and a tile of M rows, row m being new token `m // G` and query head `m % G`
of the G heads that share the keys, so that keys are read once for all of them. It walks over its keys N at a
time, looks their blocks up in the table, and keeps for each row the largest exponent so far, the sum of the
powers of two and the sum of values weighted by them, all in float32.

What several functions read together goes through them as one tuple: `state` (see `_nothing`), `cache` (see
`_head_cache`), `scoring` (scale, softcap) and `sight` (the rows' positions; keys [low, end) are there).
Constants are listed one by one, since a constant in a tuple becomes a number on the device; so are the
kernels' own parameters, which a launch names and compiles for.

Letters: M rows of a tile, N keys of a tile, D head size (filled up to a power of two), S splits.

**Source:** Dao, FlashAttention-2, 2023, section 3; Dao et al., Flash-Decoding for long-context inference,
2023; Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; paging: Kwon et al., 2023.
"""

from typing import Final

import triton
import triton.language as tl

from penstock.kernels.triton.launch import bound, dot, inlined, narrow, widen

NO_SCORE: Final = tl.constexpr(float("-inf"))


@inlined
def _exponents(products: tl.tensor, scoring: tl.tensor, HAS_SOFTCAP: tl.constexpr) -> tl.tensor:
    """Scores as exponents of 2; `tanh(x) = 1 - 2 / (e^2x + 1)` has both limits and lets NaN pass."""
    scale, softcap = scoring
    if HAS_SOFTCAP:
        return softcap * (1.0 - 2.0 / (tl.exp2(products * scale) + 1.0))
    return products * scale


@inlined
def _shift(peak: tl.tensor) -> tl.tensor:
    """What is taken off exponents: the largest, or 0 where no key was seen, for -inf - -inf is NaN."""
    return tl.where(peak == NO_SCORE, 0.0, peak)


@inlined
def _load_each(source_N: tl.tensor, is_there_N: tl.tensor, IS_MASKED: tl.constexpr) -> tl.tensor:
    """A number for each key; 0 where it is not there."""
    if IS_MASKED:
        numbers_N = tl.load(source_N, mask=is_there_N, other=0)
    else:
        numbers_N = tl.load(source_N)
    return numbers_N


@inlined
def _load_tile(
    source_ND: tl.tensor, is_there_N: tl.tensor, HEAD_DIM: tl.constexpr, IS_MASKED: tl.constexpr
) -> tl.tensor:
    """Keys or values; 0 where there is none and past the head's size."""
    is_dim_ND = (tl.arange(0, source_ND.shape[1]) < HEAD_DIM)[None, :]
    if IS_MASKED:
        numbers_ND = tl.load(source_ND, mask=is_there_N[:, None] & is_dim_ND, other=0.0)
    elif source_ND.shape[1] > HEAD_DIM:
        numbers_ND = tl.load(source_ND, mask=is_dim_ND, other=0.0)
    else:
        numbers_ND = tl.load(source_ND)
    return numbers_ND


@inlined
def _sweep(
    state: tl.tensor,
    q_MD: tl.tensor,
    cache: tl.tensor,
    scoring: tl.tensor,
    sight: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    IS_MASKED: tl.constexpr,
) -> tl.tensor:
    """Take in the tiles of keys from `start`, a multiple of BLOCK_N, up to `stop`.

    Keys outside [low, end) are not loaded. Without IS_MASKED all of them are there and seen by every row.
    """
    position_M, low, end = sight
    acc_MD, peak_M, total_M = state
    keys, values, key_scales, value_scales, table, block_stride, scale_stride = cache
    column_N, dim_D = tl.arange(0, BLOCK_N), tl.arange(0, q_MD.shape[1])
    for first in range(bound(start), bound(stop), BLOCK_N):
        key_N = first + column_N
        is_there_N = (key_N >= low) & (key_N < end)
        block_N = _load_each(table + key_N // BLOCK_SIZE, is_there_N, IS_MASKED).to(tl.int64)
        slot_N = key_N % BLOCK_SIZE
        place_ND = (block_N * block_stride + slot_N * HEAD_DIM)[:, None] + dim_D[None, :]
        k_ND = _load_tile(keys + place_ND, is_there_N, HEAD_DIM, IS_MASKED)
        s_MN = dot(q_MD, tl.trans(widen(k_ND, q_MD.dtype)), tl.zeros((q_MD.shape[0], BLOCK_N), tl.float32))
        if HAS_SCALES:
            place_N = block_N * scale_stride + slot_N
            s_MN *= _load_each(key_scales + place_N, is_there_N, IS_MASKED)[None, :]
        s_MN = _exponents(s_MN, scoring, HAS_SOFTCAP)
        if IS_MASKED:
            is_seen_MN = is_there_N[None, :] & (key_N[None, :] <= position_M[:, None])
            if WINDOW > 0:
                is_seen_MN &= key_N[None, :] > position_M[:, None] - WINDOW
            s_MN = tl.where(is_seen_MN, s_MN, NO_SCORE)
        new_peak_M = tl.maximum(peak_M, tl.max(s_MN, 1))
        shift_M = _shift(new_peak_M)
        p_MN = tl.exp2(s_MN - shift_M[:, None])
        kept_M = tl.exp2(peak_M - shift_M)
        total_M = total_M * kept_M + tl.sum(p_MN, 1)
        v_ND = _load_tile(values + place_ND, is_there_N, HEAD_DIM, IS_MASKED)
        if HAS_SCALES:
            p_MN *= _load_each(value_scales + place_N, is_there_N, IS_MASKED)[None, :]
        acc_MD = dot(narrow(p_MN, q_MD.dtype), widen(v_ND, q_MD.dtype), acc_MD * kept_M[:, None])
        peak_M = new_peak_M
    return acc_MD, peak_M, total_M


@inlined
def _nothing(BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr) -> tl.tensor:
    """The state of rows that have seen no key: sum of values, largest exponent, sum of powers."""
    acc_MD = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    return acc_MD, tl.full((BLOCK_M,), NO_SCORE, tl.float32), tl.zeros((BLOCK_M,), tl.float32)


@inlined
def _join(state: tl.tensor, more: tl.tensor) -> tl.tensor:
    """Two runs of keys as one; a run without keys changes no bit of the other."""
    acc_MD, peak_M, total_M = state
    more_MD, more_peak_M, more_total_M = more
    new_peak_M = tl.maximum(peak_M, more_peak_M)
    shift_M = _shift(new_peak_M)
    kept_M, joined_M = tl.exp2(peak_M - shift_M), tl.exp2(more_peak_M - shift_M)
    acc_MD = acc_MD * kept_M[:, None] + more_MD * joined_M[:, None]
    return acc_MD, new_peak_M, total_M * kept_M + more_total_M * joined_M


@inlined
def _attend_run(
    q_MD: tl.tensor,
    cache: tl.tensor,
    scoring: tl.tensor,
    sight: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    first_position: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
) -> tl.tensor:
    """Keys [start, stop) in fast mode: masks only where some row sees less than all of a tile.

    That is at the end, where rows stand, and with a window at the beginning.
    """
    state = _nothing(q_MD.shape[0], q_MD.shape[1])
    clear = start
    if WINDOW > 0:
        _position_M, _low, end = sight
        behind = tl.maximum(end - WINDOW, 0)  # keys before it the last row does not see
        clear = tl.minimum(tl.maximum(start, tl.cdiv(behind, BLOCK_N) * BLOCK_N), stop)
        state = _sweep(
            state, q_MD, cache, scoring, sight, start, clear,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, True,
        )  # fmt: skip
    clouded = tl.maximum(tl.minimum(stop, (first_position + 1) // BLOCK_N * BLOCK_N), clear)
    state = _sweep(
        state, q_MD, cache, scoring, sight, clear, clouded,
        HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, False,
    )  # fmt: skip
    return _sweep(
        state, q_MD, cache, scoring, sight, clouded, stop,
        HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, True,
    )  # fmt: skip


@inlined
def _attend_splits(
    q_MD: tl.tensor,
    cache: tl.tensor,
    scoring: tl.tensor,
    sight: tl.tensor,
    first_split: tl.tensor,
    last_split: tl.tensor,
    base: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
) -> tl.tensor:
    """Splits [first_split, last_split) in deterministic mode, each from nothing and joined to those before.

    Every tile is masked, so that there is one way to compute a score.
    """
    _position_M, low, end = sight
    state = _nothing(q_MD.shape[0], q_MD.shape[1])
    for split in range(bound(first_split), bound(last_split)):
        start = tl.maximum(base + split * FIXED_SPLIT, low // BLOCK_N * BLOCK_N)
        stop = tl.minimum(base + (split + 1) * FIXED_SPLIT, end)
        more = _sweep(
            _nothing(q_MD.shape[0], q_MD.shape[1]), q_MD, cache, scoring, sight, start, stop,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, True,
        )  # fmt: skip
        state = _join(state, more)
    return state


@inlined
def _find_sequence(
    query_start: tl.tensor, tile: tl.tensor, num_seqs: tl.tensor, ROWS: tl.constexpr
) -> tl.tensor:
    """The sequence whose tiles of ROWS new tokens hold number `tile`, by halving.

    Sequence s has its first tile at `query_start[s] // ROWS + s`: from there to the next are at least as many
    as it needs, some of them empty. Example, ROWS 4, starts [0 5 6 14]: first tiles 0, 2, 3; tile 1 has row 4
    of the first, tile 2 row 0 of the second, tiles 3 and 4 rows 0..3 and 4..7 of the third.
    """
    low, high = tile * 0, tile * 0 + num_seqs
    while low < high:
        middle = (low + high) // 2
        if tl.load(query_start + middle) // ROWS + middle <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@inlined
def _first_key(position: tl.tensor, WINDOW: tl.constexpr) -> tl.tensor:
    """The first key that a row at `position` sees."""
    if WINDOW > 0:
        return tl.maximum(position - WINDOW + 1, 0)
    return position * 0


@inlined
def _geometry(
    low: tl.tensor,
    end: tl.tensor,
    num_splits: tl.tensor,
    BLOCK_N: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
) -> tl.tensor:
    """Where the splits of keys [low, end) begin, how long each is, and how many have any; at least one."""
    if FIXED_SPLIT > 0:
        base = low // FIXED_SPLIT * FIXED_SPLIT
        piece = base * 0 + FIXED_SPLIT
    else:
        base = low // BLOCK_N * BLOCK_N
        piece = tl.maximum(tl.cdiv(tl.cdiv(end - base, num_splits), BLOCK_N) * BLOCK_N, MIN_SPLIT)
    return base, piece, tl.maximum(tl.cdiv(end - base, piece), 1)


@inlined
def _load_rows(
    query: tl.tensor,
    row: tl.tensor,
    local: tl.tensor,
    num_new: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
) -> tl.tensor:
    """Queries, new tokens, heads and whether there is such a row, for the tile from new token `local` on."""
    index_M, dim_D = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    new_M = local + index_M // GROUP
    head_M = tl.program_id(1) * GROUP + index_M % GROUP
    is_row_M = (index_M < ROWS * GROUP) & (new_M < num_new)
    place_M = (row + new_M).to(tl.int64) * stride_t + head_M * stride_h
    is_there_MD = is_row_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    q_MD = tl.load(query + place_M[:, None] + dim_D[None, :], mask=is_there_MD, other=0.0)
    return q_MD, new_M, head_M, is_row_M


@inlined
def _store_answer(
    out: tl.tensor, state: tl.tensor, place_M: tl.tensor, is_row_M: tl.tensor, HEAD_DIM: tl.constexpr
) -> None:
    """Weighted means to rows `place_M` of out [T * H, D]; 0 where no key was seen."""
    acc_MD, _peak_M, total_M = state
    dim_D = tl.arange(0, acc_MD.shape[1])
    answer_MD = acc_MD / tl.where(total_M == 0.0, 1.0, total_M)[:, None]
    place_MD = place_M.to(tl.int64)[:, None] * HEAD_DIM + dim_D[None, :]
    is_there_MD = is_row_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    tl.store(out + place_MD, narrow(answer_MD, out.dtype.element_ty), mask=is_there_MD)


@inlined
def _head_cache(
    key_numbers: tl.tensor,
    value_numbers: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    table: tl.tensor,
    block_stride: tl.tensor,
    scale_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """What `_sweep` reads for the program's key/value head."""
    slots = tl.program_id(1) * BLOCK_SIZE
    keys, values = key_numbers + slots * HEAD_DIM, value_numbers + slots * HEAD_DIM
    return keys, values, key_scales + slots, value_scales + slots, table, block_stride, scale_stride


@triton.jit(do_not_specialize=["table_stride", "short_limit", "num_splits"])
def short_kernel(
    query: tl.tensor,
    out: tl.tensor,
    partial_acc: tl.tensor,
    partial_peak: tl.tensor,
    partial_total: tl.tensor,
    key_numbers: tl.tensor,
    value_numbers: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    block_tables: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    block_stride: tl.tensor,
    scale_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    short_limit: tl.tensor,
    num_splits: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
) -> None:
    """A short sequence, one of its splits, all its new tokens; see `attention`."""
    seq, split = tl.program_id(0), tl.program_id(2)
    row = tl.load(query_start + seq)
    num_new, end = tl.load(query_start + seq + 1) - row, tl.load(seq_lens + seq)
    first_position = end - num_new
    low = _first_key(first_position, WINDOW)
    base, piece, num_live = _geometry(low, end, num_splits, BLOCK_N, MIN_SPLIT, FIXED_SPLIT)
    if (num_new == 0) | (num_new > short_limit) | (split >= num_live):
        return
    q_MD, new_M, head_M, is_row_M = _load_rows(
        query, row, 0, num_new, stride_t, stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, ROWS
    )
    cache = _head_cache(
        key_numbers, value_numbers, key_scales, value_scales, block_tables + seq.to(tl.int64) * table_stride,
        block_stride, scale_stride, HEAD_DIM, BLOCK_SIZE,
    )  # fmt: skip
    scoring = scale, softcap
    sight = first_position + new_M, low, end
    if FIXED_SPLIT > 0:
        state = _attend_splits(
            q_MD, cache, scoring, sight, split, split + 1, base,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, FIXED_SPLIT,
        )  # fmt: skip
    else:
        start = base + split * piece
        state = _attend_run(
            q_MD, cache, scoring, sight, start, tl.minimum(start + piece, end), first_position,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES,
        )  # fmt: skip
    if num_live == 1:
        _store_answer(out, state, (row + new_M) * NUM_HEADS + head_M, is_row_M, HEAD_DIM)
    else:
        place_M = ((seq * ROWS + new_M) * NUM_HEADS + head_M).to(tl.int64) * num_splits + split
        _store_partial((partial_acc, partial_peak, partial_total), state, place_M, is_row_M, HEAD_DIM)


@triton.jit(do_not_specialize=["table_stride", "short_limit", "num_seqs"])
def long_kernel(
    query: tl.tensor,
    out: tl.tensor,
    key_numbers: tl.tensor,
    value_numbers: tl.tensor,
    key_scales: tl.tensor,
    value_scales: tl.tensor,
    block_tables: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    stride_t: tl.tensor,
    stride_h: tl.tensor,
    block_stride: tl.tensor,
    scale_stride: tl.tensor,
    table_stride: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    short_limit: tl.tensor,
    num_seqs: tl.tensor,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SCALES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
) -> None:
    """A tile of new tokens of a long sequence, over all their keys; see `attention`."""
    # The last tiles of a prompt see the most keys: they start first, so that none is left over at the end.
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    seq = _find_sequence(query_start, tile, num_seqs, ROWS)
    row = tl.load(query_start + seq)
    num_new = tl.load(query_start + seq + 1) - row
    local = (tile - row // ROWS - seq) * ROWS
    if (num_new <= short_limit) | (local >= num_new):
        return
    before = tl.load(seq_lens + seq) - num_new
    first_position, end = before + local, before + tl.minimum(local + ROWS, num_new)
    low = _first_key(first_position, WINDOW)
    q_MD, new_M, head_M, is_row_M = _load_rows(
        query, row, local, num_new, stride_t, stride_h, GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, ROWS
    )
    cache = _head_cache(
        key_numbers, value_numbers, key_scales, value_scales, block_tables + seq.to(tl.int64) * table_stride,
        block_stride, scale_stride, HEAD_DIM, BLOCK_SIZE,
    )  # fmt: skip
    scoring = scale, softcap
    sight = before + new_M, low, end
    if FIXED_SPLIT > 0:
        base, _piece, num_live = _geometry(low, end, 1, BLOCK_N, 0, FIXED_SPLIT)
        state = _attend_splits(
            q_MD, cache, scoring, sight, 0, num_live, base,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES, FIXED_SPLIT,
        )  # fmt: skip
    else:
        state = _attend_run(
            q_MD, cache, scoring, sight, low // BLOCK_N * BLOCK_N, end, first_position,
            HEAD_DIM, BLOCK_SIZE, BLOCK_N, WINDOW, HAS_SOFTCAP, HAS_SCALES,
        )  # fmt: skip
    _store_answer(out, state, (row + new_M) * NUM_HEADS + head_M, is_row_M, HEAD_DIM)


@inlined
def _store_partial(
    partial: tl.tensor, state: tl.tensor, place_M: tl.tensor, is_row_M: tl.tensor, HEAD_DIM: tl.constexpr
) -> None:
    """The state of one split of each row, for `reduce_kernel`."""
    partial_acc, partial_peak, partial_total = partial
    acc_MD, peak_M, total_M = state
    dim_D = tl.arange(0, acc_MD.shape[1])
    is_there_MD = is_row_M[:, None] & (dim_D < HEAD_DIM)[None, :]
    tl.store(partial_peak + place_M, peak_M, mask=is_row_M)
    tl.store(partial_total + place_M, total_M, mask=is_row_M)
    tl.store(partial_acc + place_M[:, None] * HEAD_DIM + dim_D[None, :], acc_MD, mask=is_there_MD)


@inlined
def _load_partial(
    partial: tl.tensor,
    first: tl.tensor,
    count: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr,
) -> tl.tensor:
    """Splits `first` to `first + count - 1`, at most CHUNK, as the state of one row; 1 as it is."""
    partial_acc, partial_peak, partial_total = partial
    split_S, dim_D = tl.arange(0, CHUNK), tl.arange(0, BLOCK_D)
    is_there_S = split_S < count
    peak_S = tl.load(partial_peak + first + split_S, mask=is_there_S, other=NO_SCORE)
    total_S = tl.load(partial_total + first + split_S, mask=is_there_S, other=0.0)
    acc_SD = tl.load(
        partial_acc + (first + split_S)[:, None] * HEAD_DIM + dim_D[None, :],
        mask=is_there_S[:, None] & (dim_D < HEAD_DIM)[None, :],
        other=0.0,
    )
    peak = tl.max(peak_S, 0)
    weight_S = tl.exp2(peak_S - _shift(peak))
    one = tl.zeros((1,), tl.float32)
    total = tl.sum(total_S * weight_S, 0)
    return tl.sum(acc_SD * weight_S[:, None], 0)[None, :], one + peak, one + total


@triton.jit(do_not_specialize=["short_limit", "num_splits"])
def reduce_kernel(
    out: tl.tensor,
    partial_acc: tl.tensor,
    partial_peak: tl.tensor,
    partial_total: tl.tensor,
    query_start: tl.tensor,
    seq_lens: tl.tensor,
    short_limit: tl.tensor,
    num_splits: tl.tensor,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    FIXED_SPLIT: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    """The splits of one new token and head of a short sequence put together."""
    seq, new, head = tl.program_id(0) // ROWS, tl.program_id(0) % ROWS, tl.program_id(1)
    row = tl.load(query_start + seq)
    num_new, end = tl.load(query_start + seq + 1) - row, tl.load(seq_lens + seq)
    low = _first_key(end - num_new, WINDOW)
    _base, _piece, num_live = _geometry(low, end, num_splits, BLOCK_N, MIN_SPLIT, FIXED_SPLIT)
    if (num_new > short_limit) | (new >= num_new) | (num_live == 1):
        return  # one split has stored the answer itself
    first = (tl.program_id(0) * NUM_HEADS + head).to(tl.int64) * num_splits
    partial = partial_acc, partial_peak, partial_total
    state = _nothing(1, BLOCK_D)
    for split in range(0, bound(num_live), CHUNK):
        more = _load_partial(partial, first + split, num_live - split, HEAD_DIM, BLOCK_D, CHUNK)
        state = _join(state, more)
    place = (row + new) * NUM_HEADS + head + tl.zeros((1,), tl.int32)
    _store_answer(out, state, place, place >= 0, HEAD_DIM)
