"""The kernels of `sampling`, in the order in which it launches them.

A row is cut into splits of `LANES` by `COLUMNS` tokens, the same for every batch, so that no neighbour
changes a sum: column j of a row of C columns holds the tokens j, j + C, j + 2 C, ... (the CDF of
a whole row runs down the columns, as in `engine/sampling/vocabulary`). No kernel adds to a number that
another program adds to.

The order of tokens (logit falling, id rising) is that of int64 keys; "key at most a border" is therefore a
prefix of the sorted row, equal logits included, and no row is ever sorted.

What several functions read together goes through them as one tuple: `source`, where a draw's logits lie
(logits, edited, row, place, stride, vocab), and `scale`, what makes weights of them (top, sharpness). The
kernels themselves list every parameter: a launch compiles for each of them, by its name and its divisors.
"""

import triton
import triton.language as tl
from triton.language.standard import _elementwise_max, _elementwise_min, _sum_combine

from penstock.kernels.triton.launch import INTERPRETED, bound, inlined

DONE, CANDIDATES, SEARCH, PLAIN, FILTERED = (tl.constexpr(i) for i in range(5))
"""What a draw still needs: nothing; its best columns; a search in the whole row for the border of
what is kept; one draw from the sums of its splits; the same after those were summed over kept tokens only."""
DRAWN, NOT_FINITE, NONE_ALLOWED = (tl.constexpr(i) for i in range(3))
"""As `DrawStatus`."""
LANES = tl.constexpr(32)
COLUMNS = tl.constexpr(128)
FEW = tl.constexpr(128)
"""Columns looked into for candidates, and candidates after which a nucleus counts as wide."""
LIST = tl.constexpr(1024)
"""Candidates at most; as a rule little more than FEW."""
SMALL_VOCAB = tl.constexpr(8192)
"""Up to here a nucleus is drawn from in the order of columns."""
TILE = tl.constexpr(4096)
FINE_TILE = tl.constexpr(2048)
"""Of the search, which keeps many numbers of each lane in registers."""
CHUNK = tl.constexpr(128 if INTERPRETED.value else 8)
"""Keys that all keys of a list are compared with at once; registers hold few, the interpreter likes many."""
TEMPERATURE, TOP_K, TOP_P, MIN_P, UNIFORM, ASKS = (tl.constexpr(i) for i in range(6))
"""Rows of the table of numbers."""
BANNED, SEEN = tl.constexpr(1), tl.constexpr(2)
LAST_KEY = tl.constexpr(2**63 - 2)
"""Behind the key of every token."""
NO_KEY = tl.constexpr(2**63 - 1)
ID_MASK = tl.constexpr(2**32 - 1)
BELOW_ONE = tl.constexpr(1.0 - 2.0**-52)
"""A point on a CDF stays below its end even where the product is rounded up to it."""


@inlined
def total_of(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """As `tl.sum`, which the interpreter would take for a kernel (see `inlined`), as the next ones too."""
    return tl.reduce(x, AXIS, _sum_combine)


@inlined
def largest(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """As `tl.max`."""
    return tl.reduce(x, AXIS, _elementwise_max)


@inlined
def least(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """As `tl.min`."""
    return tl.reduce(x, AXIS, _elementwise_min)


@inlined
def running_total(x: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """As `tl.cumsum`."""
    return tl.associative_scan(x, AXIS, _sum_combine)


@inlined
def is_nan(x: tl.tensor) -> tl.tensor:
    """True for what is no number; infinities are."""
    return (tl.abs(x) <= float("inf")) == 0


@inlined
def order_key(x: tl.tensor, ids: tl.tensor) -> tl.tensor:
    """Int64 that rises as logits fall and, among equals, as ids rise; -0 equals 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return ((~bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) << 32) | ids


@inlined
def value_of(key: tl.tensor) -> tl.tensor:
    """The logit of a key; meaningless for NO_KEY."""
    bits = ~(key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@inlined
def weigh(x: tl.tensor, top: tl.tensor, sharpness: tl.tensor) -> tl.tensor:
    """The softmax's numerators, 0 to 1."""
    return tl.exp(tl.minimum(x - top, 0.0) * sharpness)


@inlined
def number(numbers: tl.tensor, which: tl.constexpr, draw: tl.tensor, num_draws: tl.tensor) -> tl.tensor:
    """One of a draw's parameters, float64."""
    return tl.load(numbers + which * num_draws + draw)


@inlined
def sharpness_of(numbers: tl.tensor, draw: tl.tensor) -> tl.tensor:
    """1 / temperature; 1 where it is 0."""
    temperature = tl.load(numbers + draw)
    return (1.0 / tl.where(temperature > 0.0, temperature, 1.0)).to(tl.float32)


@inlined
def read(source: tl.tensor, ids: tl.tensor, mask: tl.tensor) -> tl.tensor:
    """Float32 logits as the draw sees them: raw, or of its own row in `edited` if `place` is 0 or more."""
    logits, edited, row, place, stride, vocab = source
    raw = tl.load(logits + row * stride + ids, mask=mask & (place < 0), other=-float("inf")).to(tl.float32)
    own = tl.load(edited + place * vocab + ids, mask=mask & (place >= 0), other=-float("inf"))
    return tl.where(place < 0, raw, own)


@triton.jit(do_not_specialize=["mask_words"])
def copy_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    mask_of: tl.tensor,
    masks: tl.tensor,
    stride: tl.tensor,
    vocab: tl.tensor,
    mask_words: tl.tensor,
) -> None:
    """A row as float32, without the tokens whose bit in its mask is 0."""
    ids = tl.program_id(0) * TILE + tl.arange(0, TILE)
    edit = tl.program_id(1).to(tl.int64)
    row, mask_row = tl.load(rows + edit), tl.load(mask_of + edit)
    is_token = ids < vocab
    x = tl.load(logits + row * stride + ids, mask=is_token, other=0.0).to(tl.float32)
    word = tl.load(masks + mask_row * mask_words + (ids >> 5), mask=is_token & (mask_row >= 0), other=-1)
    x = tl.where(((word >> (ids & 31)) & 1) != 0, x, -float("inf"))
    tl.store(edited + edit * vocab + ids, x, mask=is_token)


@triton.jit
def touch_kernel(
    edited: tl.tensor,
    offsets: tl.tensor,
    ids: tl.tensor,
    kinds: tl.tensor,
    biases: tl.tensor,
    counts: tl.tensor,
    penalties: tl.tensor,
    vocab: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Bans, biases and penalties of single tokens, each of which the row's list names once."""
    edit = tl.program_id(1).to(tl.int64)
    first, end = tl.load(offsets + edit), tl.load(offsets + edit + 1)
    at = first + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < end
    token = tl.load(ids + at, mask=mask, other=0)
    kind = tl.load(kinds + at, mask=mask, other=0)
    count = tl.load(counts + at, mask=mask, other=0.0)
    place = edited + edit * vocab + token
    repetition, presence = tl.load(penalties + 3 * edit), tl.load(penalties + 3 * edit + 1)
    frequency = tl.load(penalties + 3 * edit + 2)
    x = tl.load(place, mask=mask, other=0.0)
    x = tl.where((kind & BANNED) != 0, -float("inf"), x) + tl.load(biases + at, mask=mask, other=0.0)
    penalised = tl.where(x > 0.0, tl.div_rn(x, tl.broadcast_to(repetition, (BLOCK,))), x * repetition)
    x = tl.where((kind & SEEN) != 0, penalised, x)
    x = tl.where(count > 0.0, x - (count * frequency + presence), x)
    tl.store(place, x, mask=mask)


@triton.jit
def scan_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    numbers: tl.tensor,
    raw_tops: tl.tensor,
    best: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    columns: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
    KEEPS_COLUMNS: tl.constexpr,
) -> None:
    """What all draws need of a split.

    The raw maximum (NaN if there is one), the first key, the sum of the weights beside the split's own
    maximum; and the first key of each column.
    """
    draw = tl.program_id(1).to(tl.int64)
    row, place = tl.load(rows + draw), tl.load(places + draw)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.arange(0, LANES)[:, None].to(tl.int64) * num_columns + column[None, :]
    is_token = (ids < vocab) & (column < num_columns)[None, :]
    raw = tl.load(logits + row * stride + ids, mask=is_token, other=-float("inf")).to(tl.float32)
    own = tl.load(edited + place * vocab + ids, mask=is_token & (place >= 0), other=-float("inf"))
    x = tl.where(place < 0, raw, own)
    has_nan = largest(largest(is_nan(raw).to(tl.int32), 0), 0)
    raw_top = largest(largest(tl.where(is_nan(raw), -float("inf"), raw), 0), 0)
    keys = least(tl.where(is_token, order_key(x, ids), NO_KEY), 0)
    top = largest(largest(tl.where(is_nan(x), -float("inf"), x), 0), 0)
    is_usable = tl.abs(top) < float("inf")
    weights = weigh(x, tl.where(is_usable, top, 0.0), sharpness_of(numbers, draw))
    total = total_of(total_of(weights, 0), 0)
    at = draw * tl.num_programs(0) + tl.program_id(0)
    tl.store(raw_tops + at, tl.where(has_nan != 0, float("nan"), raw_top))
    tl.store(best + at, least(keys, 0))
    tl.store(tops + at, top)
    tl.store(sums + at, tl.where(is_usable, total, 0.0))
    if KEEPS_COLUMNS:
        tl.store(columns + draw * num_columns + column, keys, mask=column < num_columns)


@inlined
def shares(
    tops: tl.tensor,
    sums: tl.tensor,
    draw: tl.tensor,
    top: tl.tensor,
    sharpness: tl.tensor,
    num_splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> tl.tensor:
    """[SPLITS] float64: each split's mass beside the row's maximum."""
    split = tl.arange(0, SPLITS)
    at = draw * num_splits + split
    split_top = tl.load(tops + at, mask=split < num_splits, other=-float("inf"))
    total = tl.load(sums + at, mask=split < num_splits, other=0.0)
    return total.to(tl.float64) * weigh(split_top, top, sharpness).to(tl.float64)


@triton.jit(do_not_specialize=["num_draws"])
def settle_kernel(
    raw_tops: tl.tensor,
    best: tl.tensor,
    numbers: tl.tensor,
    modes: tl.tensor,
    tokens: tl.tensor,
    statuses: tl.tensor,
    firsts: tl.tensor,
    borders: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    num_splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> None:
    """Which rows have an answer, the greedy ones, and what the others still need."""
    draw = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    at, is_split = draw * num_splits + split, split < num_splits
    raw = tl.load(raw_tops + at, mask=is_split, other=-float("inf"))
    first = least(tl.load(best + at, mask=is_split, other=NO_KEY), 0)
    has_nan = largest(is_nan(raw).to(tl.int32), 0) != 0
    raw_top = largest(tl.where(is_nan(raw), -float("inf"), raw), 0)
    has_answer = tl.abs(value_of(first)) < float("inf")
    status = tl.where(has_answer, DRAWN, NONE_ALLOWED)
    status = tl.where(has_nan | (tl.abs(raw_top) == float("inf")), NOT_FINITE, status)
    top_k, top_p = number(numbers, TOP_K, draw, num_draws), number(numbers, TOP_P, draw, num_draws)
    mode = tl.where(number(numbers, MIN_P, draw, num_draws) > 0.0, FILTERED, PLAIN)
    mode = tl.where(top_p < 1.0, tl.where(vocab > SMALL_VOCAB, CANDIDATES, SEARCH), mode)
    mode = tl.where((top_k > 0) & (top_k < vocab), CANDIDATES, mode)
    is_greedy = number(numbers, TEMPERATURE, draw, num_draws) <= 0.0
    tl.store(modes + draw, tl.where(is_greedy | (status != DRAWN), DONE, mode))
    tl.store(tokens + draw, first & ID_MASK)
    tl.store(statuses + draw, status)
    tl.store(firsts + draw, first)
    tl.store(borders + draw, LAST_KEY)


@triton.jit
def columns_kernel(
    columns: tl.tensor,
    modes: tl.tensor,
    firsts: tl.tensor,
    chosen: tl.tensor,
    limits: tl.tensor,
    vocab: tl.tensor,
    num_columns: tl.tensor,
    PADDED: tl.constexpr,
) -> None:
    """The FEW best columns of a row, and the best key of the last of them.

    Each of those columns holds a token at or before that key, so there are at least FEW such tokens, and all
    of them lie in those columns.
    """
    draw = tl.program_id(0).to(tl.int64)
    if tl.load(modes + draw) == CANDIDATES:
        column = tl.arange(0, PADDED)
        is_column = column < num_columns
        keys = tl.load(columns + draw * num_columns + column, mask=is_column, other=NO_KEY)
        wanted = tl.minimum(num_columns, FEW)
        low, high = tl.load(firsts + draw), largest(tl.where(is_column, keys, tl.load(firsts + draw)), 0)
        while low < high:
            middle = (low & high) + ((low ^ high) >> 1)
            is_enough = total_of((keys <= middle).to(tl.int32), 0) >= wanted
            high = tl.where(is_enough, middle, high)
            low = tl.where(is_enough, low, middle + 1)
        is_chosen = is_column & (keys <= high)
        place = running_total(is_chosen.to(tl.int32), 0) - 1
        tl.store(chosen + draw * FEW + place, column, mask=is_chosen & (place < FEW))
        # A row that fits the list as a whole goes there as a whole.
        tl.store(limits + draw, tl.where(vocab <= LIST, LAST_KEY, high))


@triton.jit
def narrow_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    modes: tl.tensor,
    chosen: tl.tensor,
    limits: tl.tensor,
    listed: tl.tensor,
    counts: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
) -> None:
    """The keys at or before the limit, out of the chosen columns: a prefix of the sorted row, unsorted."""
    draw = tl.program_id(0).to(tl.int64)
    if tl.load(modes + draw) == CANDIDATES:
        source = logits, edited, tl.load(rows + draw), tl.load(places + draw), stride, vocab
        index = tl.arange(0, FEW)
        is_chosen = index < num_columns
        column = tl.load(chosen + draw * FEW + index, mask=is_chosen, other=0)
        ids = tl.arange(0, LANES)[:, None].to(tl.int64) * num_columns + column[None, :]
        is_token = (ids < vocab) & is_chosen[None, :]
        key = order_key(read(source, ids, is_token), ids)
        taken = (is_token & (key <= tl.load(limits + draw))).to(tl.int32)
        flat, keys = tl.reshape(taken, (LANES * FEW,)), tl.reshape(key, (LANES * FEW,))
        slot = running_total(flat, 0) - 1
        tl.store(listed + draw * LIST + slot, keys, mask=(flat != 0) & (slot < LIST))
        tl.store(counts + draw, total_of(flat, 0))


@inlined
def list_order(
    listed: tl.tensor, own: tl.tensor, count: tl.tensor, top: tl.tensor, sharpness: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """For each key how many come before it in the list, and their mass, by comparing all with all."""
    rank = tl.full((LIST,), 0, tl.int32)
    before = tl.full((LIST,), 0.0, tl.float64)
    for start in range(0, bound(count), CHUNK):
        index = start + tl.arange(0, CHUNK)
        other = tl.load(listed + index, mask=index < count, other=NO_KEY)
        weight = tl.where(index < count, weigh(value_of(other), top, sharpness), 0.0).to(tl.float64)
        is_before = other[None, :] < own[:, None]
        rank += total_of(is_before.to(tl.int32), 1)
        before += total_of(tl.where(is_before, weight[None, :], 0.0), 1)
    return rank, before


@triton.jit(do_not_specialize=["num_draws"])
def choose_kernel(
    listed: tl.tensor,
    counts: tl.tensor,
    numbers: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    modes: tl.tensor,
    tokens: tl.tensor,
    firsts: tl.tensor,
    borders: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    num_splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> None:
    """Top-k, top-p, min-p and the draw, where the list tells; the border of a wide nucleus, where it does."""
    draw = tl.program_id(0).to(tl.int64)
    if tl.load(modes + draw) == CANDIDATES:
        count = tl.load(counts + draw)
        top, sharpness = value_of(tl.load(firsts + draw)), sharpness_of(numbers, draw)
        index = tl.arange(0, LIST)
        in_list = index < count
        key = tl.load(listed + draw * LIST + index, mask=in_list, other=NO_KEY)
        weight = tl.where(in_list, weigh(value_of(key), top, sharpness), 0.0).to(tl.float64)
        rank, before = list_order(listed + draw * LIST, key, tl.minimum(count, LIST), top, sharpness)
        top_k, top_p = number(numbers, TOP_K, draw, num_draws), number(numbers, TOP_P, draw, num_draws)
        has_k = (top_k > 0) & (top_k < vocab)
        reach = tl.where(has_k, top_k, FEW * 1.0)
        is_near = in_list & (rank < reach)
        mass = total_of(shares(tops, sums, draw, top, sharpness, num_splits, SPLITS), 0)
        near_mass = largest(tl.where(is_near, before + weight, 0.0), 0)
        share = tl.where(top_p < 1.0, top_p * tl.where(has_k, near_mass, mass), float("inf"))
        in_nucleus = in_list & ((rank == 0) | (before < share))
        is_likely = in_list & (weight >= number(numbers, MIN_P, draw, num_draws))
        num_likely = total_of(is_likely.to(tl.int32), 0)
        by_k = (top_k <= count) | ((top_p >= 1.0) & (num_likely < count))
        by_p = (near_mass >= share) | (total_of((is_near & is_likely).to(tl.int32), 0) < FEW)
        is_known = (count <= LIST) & tl.where(has_k, by_k, by_p)
        kept = is_near & in_nucleus & is_likely
        total = largest(tl.where(kept, before + weight, 0.0), 0)
        target = number(numbers, UNIFORM, draw, num_draws) * total
        target = tl.minimum(target, total * BELOW_ONE)
        drawn = least(tl.where(kept & (before + weight > target), key, NO_KEY), 0)
        has_border = (count <= LIST) & (largest(before + weight, 0) >= share)
        border = largest(tl.where(in_nucleus, key, tl.load(firsts + draw)), 0)
        mode = tl.where(is_known, DONE, tl.where(has_border & (top_p < 1.0) & (has_k == 0), FILTERED, SEARCH))
        tl.store(modes + draw, mode)
        tl.store(tokens + draw, tl.where(is_known, drawn, tl.load(firsts + draw)) & ID_MASK)
        tl.store(borders + draw, tl.where(mode == FILTERED, border, LAST_KEY))


@inlined
def mass_upto(
    source: tl.tensor, vocab: tl.tensor, scale: tl.tensor, floor: tl.tensor, border: tl.tensor
) -> tl.tensor:
    """Mass of the tokens up to a key, without those lighter than `floor`; summed as in `shortest`."""
    top, sharpness = scale
    mass = tl.full((FINE_TILE,), 0.0, tl.float32)
    for start in range(0, bound(vocab), FINE_TILE):
        ids = start + tl.arange(0, FINE_TILE).to(tl.int64)
        x = read(source, ids, ids < vocab)
        weight = weigh(x, top, sharpness)
        mass += tl.where((order_key(x, ids) <= border) & (weight.to(tl.float64) >= floor), weight, 0.0)
    return total_of(mass.to(tl.float64), 0)


@inlined
def is_reached(mass: tl.tensor, target: tl.tensor, STRICTLY: tl.constexpr) -> tl.tensor:
    """True if a prefix of this mass is long enough."""
    total = total_of(mass.to(tl.float64), 0)
    if STRICTLY:
        reached = total > target
    else:
        reached = total >= target
    return reached


@inlined
def shortest(
    source: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    target: tl.tensor,
    COUNTS: tl.constexpr,
    STRICTLY: tl.constexpr,
) -> tl.tensor:
    """The last key of the shortest prefix whose mass (or number, if COUNTS) reaches `target`.

    A pass divides what is between `low`, the key of a token, and `high` in four, and goes on between keys of
    tokens: for each of three points it takes the mass up to it, the last key up to it and the first behind.
    A lane adds some hundred numbers in float32, the lanes are added in float64; a longer prefix never has
    less, since rounding is monotone.
    """
    top, sharpness = scale
    while low < high:
        second = (low & high) + ((low ^ high) >> 1)
        first = (low & second) + ((low ^ second) >> 1)
        third = (second & high) + ((second ^ high) >> 1)
        mass_1 = tl.full((FINE_TILE,), 0.0, tl.float32)
        mass_2, mass_3 = mass_1, mass_1
        last_1 = tl.full((FINE_TILE,), 0, tl.int64) + low
        last_2, last_3 = last_1, last_1
        next_1 = tl.full((FINE_TILE,), 0, tl.int64) + high
        next_2, next_3 = next_1, next_1
        for start in range(0, bound(vocab), FINE_TILE):
            ids = start + tl.arange(0, FINE_TILE).to(tl.int64)
            x = read(source, ids, ids < vocab)
            key = tl.where(ids < vocab, order_key(x, ids), NO_KEY)
            weight = weigh(x, top, sharpness)
            is_kept = weight.to(tl.float64) >= floor
            if COUNTS:
                weight = tl.full((FINE_TILE,), 1.0, tl.float32)
            weight = tl.where(is_kept, weight, 0.0)
            mass_1 += tl.where(key <= first, weight, 0.0)
            mass_2 += tl.where(key <= second, weight, 0.0)
            mass_3 += tl.where(key <= third, weight, 0.0)
            last_1 = tl.maximum(last_1, tl.where(key <= first, key, low))
            last_2 = tl.maximum(last_2, tl.where(key <= second, key, low))
            last_3 = tl.maximum(last_3, tl.where(key <= third, key, low))
            next_1 = tl.minimum(next_1, tl.where(key > first, key, high))
            next_2 = tl.minimum(next_2, tl.where(key > second, key, high))
            next_3 = tl.minimum(next_3, tl.where(key > third, key, high))
        by_1, by_2 = is_reached(mass_1, target, STRICTLY), is_reached(mass_2, target, STRICTLY)
        by_3 = is_reached(mass_3, target, STRICTLY)
        low = tl.where(by_2, tl.where(by_1, low, least(next_1, 0)), least(tl.where(by_3, next_2, next_3), 0))
        high = tl.where(
            by_3, tl.where(by_2, largest(tl.where(by_1, last_1, last_2), 0), largest(last_3, 0)), high
        )
    return high


@triton.jit(do_not_specialize=["num_draws"])
def search_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    numbers: tl.tensor,
    modes: tl.tensor,
    tokens: tl.tensor,
    firsts: tl.tensor,
    borders: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
) -> None:
    """Rows whose candidates did not tell: borders by passes over the whole row, which lies in the cache."""
    draw = tl.program_id(0).to(tl.int64)
    if tl.load(modes + draw) == SEARCH:
        source = logits, edited, tl.load(rows + draw), tl.load(places + draw), stride, vocab
        low = tl.load(firsts + draw)
        scale = value_of(low), sharpness_of(numbers, draw)
        top_k, top_p = number(numbers, TOP_K, draw, num_draws), number(numbers, TOP_P, draw, num_draws)
        min_p = number(numbers, MIN_P, draw, num_draws)
        has_k = (top_k > 0) & (top_k < vocab)
        border, any_weight = tl.maximum(low, LAST_KEY), top_p * 0.0
        if has_k:
            border = shortest(source, vocab, scale, any_weight, low, border, top_k, True, False)
        if top_p < 1.0:
            total = mass_upto(source, vocab, scale, any_weight, border)
            border = shortest(source, vocab, scale, any_weight, low, border, top_p * total, False, False)
        if has_k:
            total = mass_upto(source, vocab, scale, min_p, border)
            target = tl.minimum(number(numbers, UNIFORM, draw, num_draws) * total, total * BELOW_ONE)
            drawn = shortest(source, vocab, scale, min_p, low, border, target, False, True)
            tl.store(tokens + draw, drawn & ID_MASK)
        tl.store(borders + draw, border)
        tl.store(modes + draw, tl.where(has_k, DONE, FILTERED))


@triton.jit(do_not_specialize=["num_draws"])
def filter_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    numbers: tl.tensor,
    modes: tl.tensor,
    firsts: tl.tensor,
    borders: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
) -> None:
    """The sum of a split's kept tokens in place of that of all."""
    draw = tl.program_id(1).to(tl.int64)
    if tl.load(modes + draw) == FILTERED:
        source = logits, edited, tl.load(rows + draw), tl.load(places + draw), stride, vocab
        top, split = value_of(tl.load(firsts + draw)), tl.program_id(0)
        scale = top, sharpness_of(numbers, draw)
        border, floor = tl.load(borders + draw), number(numbers, MIN_P, draw, num_draws)
        weights = kept_weights(source, vocab, scale, floor, border, split, num_columns)
        at = draw * tl.num_programs(0) + tl.program_id(0)
        tl.store(tops + at, top)
        tl.store(sums + at, total_of(total_of(weights, 0), 0))


@inlined
def kept_weights(
    source: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    floor: tl.tensor,
    border: tl.tensor,
    split: tl.tensor,
    num_columns: tl.tensor,
) -> tl.tensor:
    """[LANES, COLUMNS] of a split, 0 where a filter dropped a token."""
    top, sharpness = scale
    column = split * COLUMNS + tl.arange(0, COLUMNS)
    ids = tl.arange(0, LANES)[:, None].to(tl.int64) * num_columns + column[None, :]
    is_token = (ids < vocab) & (column < num_columns)[None, :]
    x = read(source, ids, is_token)
    weights = weigh(x, top, sharpness)
    is_kept = is_token & (order_key(x, ids) <= border) & (weights.to(tl.float64) >= floor)
    return tl.where(is_kept, weights, 0.0)


@inlined
def step_down(running: tl.tensor, target: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Where a rising CDF first exceeds `target` (kept below its end), and what is left of it there."""
    end = largest(running, 0)
    within = tl.minimum(tl.maximum(target, 0.0), end * BELOW_ONE)
    is_passed = running <= within
    return total_of(is_passed.to(tl.int32), 0), within - largest(tl.where(is_passed, running, 0.0), 0)


@triton.jit(do_not_specialize=["num_draws"])
def pick_kernel(
    logits: tl.tensor,
    edited: tl.tensor,
    rows: tl.tensor,
    places: tl.tensor,
    numbers: tl.tensor,
    modes: tl.tensor,
    tokens: tl.tensor,
    firsts: tl.tensor,
    borders: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    num_columns: tl.tensor,
    num_splits: tl.tensor,
    SPLITS: tl.constexpr,
) -> None:
    """The draw in the order of columns: first the split, then the column, then the token in it."""
    draw = tl.program_id(0).to(tl.int64)
    if tl.load(modes + draw) >= PLAIN:
        source = logits, edited, tl.load(rows + draw), tl.load(places + draw), stride, vocab
        top, sharpness = value_of(tl.load(firsts + draw)), sharpness_of(numbers, draw)
        masses = shares(tops, sums, draw, top, sharpness, num_splits, SPLITS)
        running = running_total(masses, 0)
        target = number(numbers, UNIFORM, draw, num_draws) * largest(running, 0)
        split, rest = step_down(running, target)
        min_p, border = number(numbers, MIN_P, draw, num_draws), tl.load(borders + draw)
        weights = kept_weights(source, vocab, (top, sharpness), min_p, border, split, num_columns)
        weights = weights.to(tl.float64)
        column, rest = step_down(running_total(total_of(weights, 0), 0), rest)
        is_column = (tl.arange(0, COLUMNS) == column)[None, :]
        lane, _ = step_down(running_total(total_of(tl.where(is_column, weights, 0.0), 1), 0), rest)
        token = lane.to(tl.int64) * num_columns + split * COLUMNS + column
        tl.store(tokens + draw, tl.minimum(token, vocab - 1))


@triton.jit(do_not_specialize=["num_draws"])
def facts_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    tokens: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    ahead: tl.tensor,
    likeliest: tl.tensor,
    num_draws: tl.tensor,
    vocab: tl.tensor,
    stride: tl.tensor,
    NUM_TOP: tl.constexpr,
) -> None:
    """Of a tile of the raw row: maximum, sum of weights, tokens before the chosen one, the first keys."""
    draw = tl.program_id(1).to(tl.int64)
    if number(numbers, ASKS, draw, num_draws) != 0.0:
        row, token = tl.load(rows + draw), tl.load(tokens + draw)
        ids = tl.program_id(0) * TILE + tl.arange(0, TILE).to(tl.int64)
        is_token = ids < vocab
        x = tl.load(logits + row * stride + ids, mask=is_token, other=-float("inf")).to(tl.float32)
        key = tl.where(is_token, order_key(x, ids), NO_KEY)
        chosen = order_key(tl.load(logits + row * stride + token).to(tl.float32), token)
        top = largest(tl.where(is_nan(x), -float("inf"), x), 0)
        is_usable = tl.abs(top) < float("inf")
        weights = weigh(x, tl.where(is_usable, top, 0.0), 1.0)
        at = draw * tl.num_programs(0) + tl.program_id(0)
        tl.store(tops + at, top)
        tl.store(sums + at, tl.where(is_usable, total_of(weights, 0), 0.0))
        tl.store(ahead + at, total_of((key < chosen).to(tl.int32), 0))
        for i in range(NUM_TOP):
            first = least(key, 0)
            tl.store(likeliest + at * NUM_TOP + i, first)
            key = tl.where(key == first, NO_KEY, key)


@triton.jit(do_not_specialize=["num_draws"])
def tell_kernel(
    tokens: tl.tensor,
    statuses: tl.tensor,
    table: tl.tensor,
    num_draws: tl.tensor,
    width: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """The table that goes to the host, as far as no logprobs are asked for; 0 elsewhere."""
    draw = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK).to(tl.int64)[:, None]
    column = tl.arange(0, 64)[None, :]
    is_draw = draw < num_draws
    token = tl.load(tokens + draw, mask=is_draw, other=0).to(tl.float64)
    status = tl.load(statuses + draw, mask=is_draw, other=0).to(tl.float64)
    value = tl.where(column == 0, token, tl.where(column == 1, status, 0.0))
    tl.store(table + draw * width + column, value, mask=is_draw & (column < width))


@triton.jit(do_not_specialize=["num_draws"])
def tell_logprobs_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    numbers: tl.tensor,
    tokens: tl.tensor,
    statuses: tl.tensor,
    tops: tl.tensor,
    sums: tl.tensor,
    ahead: tl.tensor,
    likeliest: tl.tensor,
    table: tl.tensor,
    num_draws: tl.tensor,
    stride: tl.tensor,
    num_tiles: tl.tensor,
    num_top: tl.tensor,
    NUM_TOP: tl.constexpr,
    TILES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    """What was asked about a draw: logprob and rank of its token, the likeliest tokens and their logprobs."""
    draw = tl.program_id(0).to(tl.int64)
    if (number(numbers, ASKS, draw, num_draws) != 0.0) & (tl.load(statuses + draw) == DRAWN):
        line = table + draw * (4 + 2 * num_top)
        tile = tl.arange(0, TILES)
        at, is_tile = draw * num_tiles + tile, tile < num_tiles
        tile_tops = tl.load(tops + at, mask=is_tile, other=-float("inf"))
        top = largest(tile_tops, 0)
        masses = tl.load(sums + at, mask=is_tile, other=0.0).to(tl.float64)
        total = total_of(masses * weigh(tile_tops, top, 1.0).to(tl.float64), 0)
        log_total = top.to(tl.float64) + tl.log(total)
        logit = tl.load(logits + tl.load(rows + draw) * stride + tl.load(tokens + draw)).to(tl.float32)
        tl.store(line + 2, logit.to(tl.float64) - log_total)
        rank = total_of(tl.load(ahead + at, mask=is_tile, other=0), 0) + 1
        tl.store(line + 3, rank.to(tl.float64))
        index = tl.arange(0, KEYS)
        num_keys = num_tiles * NUM_TOP
        keys = tl.load(likeliest + draw * num_keys + index, mask=index < num_keys, other=NO_KEY)
        for i in range(NUM_TOP):
            first = least(keys, 0)
            tl.store(line + 4 + i, (first & ID_MASK).to(tl.float64), mask=i < num_top)
            logprob = value_of(first).to(tl.float64) - log_total
            tl.store(line + 4 + num_top + i, logprob, mask=i < num_top)
            keys = tl.where(keys == first, NO_KEY, keys)
