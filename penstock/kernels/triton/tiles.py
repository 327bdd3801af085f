"""How attention is cut into programs: tile sizes, splits of the keys, what a step's mix needs.

Plain arithmetic on the host; `attention` launches what stands here. Letters: M rows of a tile (new tokens
times the query heads that share a key/value head), N keys of a tile, D head size.

A row of scores costs the same tensor instructions whether its query is real or padding, and reading keys
costs bandwidth: decode wants few rows and many programs, prefill many rows. So there are two launches in a
step at most, one for *short* sequences (whole in one tile, their keys split over programs), one for *long*
ones (tiles of new tokens, each over all its keys). Which of the two serves a sequence each program sees from
its length on the device; the host only knows that there are some.
"""

import math
from dataclasses import dataclass
from typing import Final

from penstock.kernels.batch import AttentionBatch

MIN_ROWS: Final = 16
"""Rows of the smallest tensor instruction."""
MAX_SHORT_ROWS: Final = 64
"""A sequence with more rows is long. 64 rows are one instruction of a Hopper warp group, and still take less
time than reading the keys: 128 operations for 2 bytes, where the device has 160 operations for each byte it
reads."""
STAGE_BYTES: Final = 32 << 10
"""Keys and values of one tile of a decode. Compiled with five stages (a block table's entry is read before
the keys it leads to), two such tiles lie in shared memory or are on their way, 72 KiB in all, so that two or
three programs fit on a multiprocessor (228 KiB) and it waits for 128 KiB at a time; 30 would cover the
latency."""
FLOAT32_NUMBERS: Final = 2048
"""Keys of a tile of float32: its products run outside the tensor instructions, and hold whole rows of both
sides in registers; with twice as many they spill."""
PROGRAMS_PER_PROCESSOR: Final = 2
"""As many fit side by side (see `STAGE_BYTES`); more splits than that only make the reduction longer."""
MAX_SPLITS: Final = 32
"""Splits for the sake of filling the device: what the reduction reads in one go."""
MIN_SPLIT: Final = 512
"""Keys; below, a program's start and the reduction cost more than it saves."""
MAX_SPLIT: Final = 4096
"""Keys; no program of a short sequence runs much longer than its neighbours."""
FIXED_SPLIT: Final = 1024
"""Keys of a split where results must not depend on the batch: position p belongs to split p // 1024,
always."""


def power_of_two(number: int) -> int:
    """The smallest that is not below `number`, which is 1 or more."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """One launch's tile and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Heads:
    """The constants that tiles depend on."""

    group: int
    """Query heads for each key/value head."""
    num_kv_heads: int
    head_dim: int
    itemsize: int
    """Bytes of a number of the query; those of a rounded cache are widened to it before they are
    multiplied."""

    @property
    def block_d(self) -> int:
        """D filled up to a power of two, at least what a product takes: 96 is computed as 128."""
        return max(16, power_of_two(self.head_dim))

    @property
    def min_block_m(self) -> int:
        """Rows of one new token."""
        return max(MIN_ROWS, power_of_two(self.group))


def _float32_tile(heads: Heads, *, block_m: int) -> Tile:
    # Four rows a warp: with more they spill.
    block_n = min(128, max(16, FLOAT32_NUMBERS // heads.block_d))
    return Tile(block_m=block_m, block_n=block_n, num_warps=min(16, block_m // 4), num_stages=2)


def _keys_of_a_stage(heads: Heads) -> int:
    # bfloat16: 128 keys of 64, 64 of 128 (and 96), 32 of 256.
    return min(128, max(16, STAGE_BYTES // (2 * heads.block_d * heads.itemsize)))


def short_tile(heads: Heads, *, max_new: int) -> Tile:
    """For sequences with at most `max_new` new tokens."""
    block_m = max(heads.min_block_m, power_of_two(max_new * heads.group))
    if heads.itemsize == 4:
        return _float32_tile(heads, block_m=block_m)
    num_stages = 5 if block_m <= 32 else 3  # 64 rows and five stages spill
    return Tile(block_m=block_m, block_n=_keys_of_a_stage(heads), num_warps=4, num_stages=num_stages)


def long_tile(heads: Heads) -> Tile:
    """For prefill: two warp groups with 64 rows each, as many keys as registers allow.

    At D = 128 the queries take 32 KiB and two tiles of keys and values each 16 KiB of shared memory; of 256
    threads each keeps 64 numbers of the output and 32 scores, 185 registers in all. At D = 256 64 keys
    would spill; at D = 64 128 keys would leave room for one program on a multiprocessor only.
    """
    if heads.itemsize == 4:
        return _float32_tile(heads, block_m=max(64, heads.min_block_m))
    block_n = 32 if heads.block_d > 128 else 64
    return Tile(block_m=max(128, heads.min_block_m), block_n=block_n, num_warps=8, num_stages=3)


def fixed_tile(heads: Heads) -> Tile:
    """The one tile of deterministic mode: a row's products run through the same instruction in every step."""
    block_m = max(MAX_SHORT_ROWS, heads.min_block_m)
    if heads.itemsize == 4:
        return _float32_tile(heads, block_m=block_m)
    block_n = 32 if heads.block_d > 128 else 64
    return Tile(block_m=block_m, block_n=block_n, num_warps=4, num_stages=2)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepMix:
    """What the launches of a step depend on; host numbers only, so that decode can be captured."""

    num_seqs: int
    num_rows: int
    max_short: int
    """Most new tokens of a short sequence, filled up to a power of two: each number is a kernel to compile;
    0 if there is none."""
    has_long: bool
    max_len: int
    """Tokens of the longest sequence."""


def _mix(batch: AttentionBatch, *, short_limit: int) -> StepMix:
    lengths = batch.query_lens_host
    most = max((each for each in lengths if each <= short_limit), default=0)
    return StepMix(
        num_seqs=len(lengths),
        num_rows=sum(lengths),
        max_short=min(power_of_two(most), short_limit) if most else 0,
        has_long=any(each > short_limit for each in lengths),
        max_len=max(batch.seq_lens_host, default=0),
    )


def short_limit(heads: Heads) -> int:
    """New tokens up to which a sequence is short."""
    return max(1, MAX_SHORT_ROWS // heads.group)


def step_mix(batch: AttentionBatch, heads: Heads) -> StepMix:
    """The step's mix, worked out once for all layers of a cache group."""
    limit = short_limit(heads)
    key = ("triton", limit)
    mix = batch.plans.get(key)
    if mix is None:
        mix = batch.plans[key] = _mix(batch, short_limit=limit)
    assert isinstance(mix, StepMix)
    return mix


def num_splits(mix: StepMix, heads: Heads, *, num_processors: int) -> int:
    """Programs that share the keys of one short sequence and key/value head, in fast mode.

    Enough to fill the device, and so many that none has more than `MAX_SPLIT` keys; but none that would have
    less than `MIN_SPLIT`. A shorter sequence of the step uses fewer.
    """
    pairs = max(1, mix.num_seqs * heads.num_kv_heads)
    filling = min(MAX_SPLITS, PROGRAMS_PER_PROCESSOR * num_processors // pairs)
    wanted = max(filling, math.ceil(mix.max_len / MAX_SPLIT))
    return max(1, min(wanted, math.ceil(mix.max_len / MIN_SPLIT)))


def num_fixed_splits(mix: StepMix) -> int:
    """The same in deterministic mode: by the longest sequence alone."""
    return max(1, math.ceil(mix.max_len / FIXED_SPLIT))


def chunk(num_splits: int) -> int:
    """Splits that the reduction reads at once, in fast mode: all of them, mostly."""
    return min(MAX_SPLITS, power_of_two(num_splits))
