"""The Triton kernels of attention and its cache: rounded caches, splits, bits that are a row's own."""

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, KvShape, KvSlab
from penstock.kernels.ops import AttentionShape
from penstock.kernels.options import KernelOptions
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.triton import attention, kv_write, tiles
from penstock.kernels.triton.kernel_set import TritonKernels
from tests.unit.kernels.attention_case import AttentionCase, make_case
from tests.unit.kernels.device_home import on_test_device

FAST = on_test_device(TritonKernels())
FIXED = on_test_device(TritonKernels(KernelOptions(is_deterministic=True)))
REFERENCE = ReferenceKernels()
ROUNDED = (torch.int8, torch.float8_e4m3fn)
MIXED = [(1, 70), (6, 6), (34, 65), (3, 33)]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""As in the contract: a few roundings of values of order 1."""


def rand(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Splits of 64 keys or a tile, so that short texts have several."""
    monkeypatch.setattr(tiles, "MIN_SPLIT", 32)
    monkeypatch.setattr(tiles, "MAX_SPLIT", 64)
    monkeypatch.setattr(attention, "MIN_SPLIT", 32)
    monkeypatch.setattr(tiles, "FIXED_SPLIT", 64)
    monkeypatch.setattr(attention, "FIXED_SPLIT", 64)
    monkeypatch.setattr(tiles, "FLOAT32_NUMBERS", 16 * 32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [*ROUNDED, None])
@pytest.mark.parametrize("head_dim", [8, 24])
def test_a_slot_holds_what_the_rule_of_rounding_says_and_no_other_slot_changes(
    kept: torch.dtype | None, dtype: torch.dtype, head_dim: int
) -> None:
    """Bit for bit as the reference home; strided inputs, a head of zeros, a row that is left out."""
    kv = KvShape(block_size=4, num_kv_heads=3, head_dim=head_dim, dtype=kept or dtype)
    both = rand(5, 6, head_dim, dtype=dtype, seed=1)
    keys, values = both[:, :3], both[:, 3:]
    values[2, 1] = 0
    slots = torch.tensor([9, 0, 14, -1, 3])
    slab, expected = (ops.make_slab(each, kv, num_blocks=4) for each in (FAST, REFERENCE))
    ops.write_kv(FAST, keys, values, slab, slots)
    is_row = slots >= 0
    ops.write_kv(REFERENCE, keys[is_row], values[is_row], expected, slots[is_row])
    for cache, plain in ((slab.keys, expected.keys), (slab.values, expected.values)):
        planes = kv_write.planes(cache, kv)
        numbers = planes.numbers.flatten(1)[:, : 12 * head_dim].view(4, 3, 4, head_dim).transpose(1, 2)
        if kept is None:
            assert torch.equal(numbers, plain)
            continue
        assert torch.equal(numbers.float(), plain[..., :head_dim].contiguous().view(kept).float())
        scales = planes.scales[:, :12].view(4, 3, 4).transpose(1, 2)
        assert torch.equal(scales, plain[..., head_dim:].contiguous().view(torch.float32)[..., 0])


def copied(
    case: AttentionCase, lengths: list[tuple[int, int]], *, kv: KvShape, seed: int
) -> tuple[KvSlab, KvSlab]:
    """The same new keys and values in rounded caches of both homes, on the blocks of `case`."""
    slabs = tuple(ops.make_slab(each, kv, num_blocks=len(case.slab.keys)) for each in (FAST, REFERENCE))
    for (_, total), table in zip(lengths, case.batch.block_tables.tolist(), strict=True):
        places = [at for at in range(total) if table[at // kv.block_size] >= 0]
        slots = torch.tensor(
            [table[at // kv.block_size] * kv.block_size + at % kv.block_size for at in places]
        )
        sizes = (len(places), kv.num_kv_heads, kv.head_dim)
        keys, values = (rand(*sizes, dtype=torch.float32, seed=seed + each) for each in range(2))
        for slab, home in zip(slabs, (FAST, REFERENCE), strict=True):
            ops.write_kv(home, keys, values, slab, slots)
    return slabs


@pytest.mark.parametrize("kept", ROUNDED)
@pytest.mark.parametrize(("window", "softcap", "is_fixed"), [(None, None, False), (13, 3.0, True)])
@pytest.mark.usefixtures("small_splits")
def test_a_rounded_cache_stands_for_numbers_times_scales(
    kept: torch.dtype, window: int | None, softcap: float | None, is_fixed: bool
) -> None:
    """Against float64 over the same rounded cache: what is left is the order of float32 sums."""
    case = make_case(MIXED, kernels=FAST, window=window, softcap=softcap)
    kv = replace(case.slab.shape, dtype=kept)
    slab, expected = copied(case, MIXED, kv=kv, seed=5)
    got = ops.paged_attention(FIXED if is_fixed else FAST, case.query, slab, case.batch, case.shape)
    answer = ops.paged_attention(REFERENCE, case.query, expected, case.batch, case.shape)
    torch.testing.assert_close(got, answer, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("home", [FAST, FIXED], ids=["fast", "fixed"])
@pytest.mark.parametrize(
    "seed", [1, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (0, 2, 4, 5))]
)
@pytest.mark.usefixtures("small_splits")
def test_random_problems_with_several_splits(home: TritonKernels, seed: int) -> None:
    """Block tables, ratios of heads, windows, caps, and lengths around the ends of splits and tiles."""
    rng = random.Random(seed)
    lengths = []
    for _ in range(4):
        total = rng.choice([1, 31, 32, 64, 65, 129])
        lengths.append((min(total, rng.choice([1, 1, 5, 40])), total))
    dtype = rng.choice([torch.float32, torch.bfloat16])
    case = make_case(
        lengths,
        kernels=home,
        heads=rng.choice([(4, 2), (3, 1), (7, 1), (2, 2)]),
        head_dim=rng.choice([8, 16, 20]),
        block_size=rng.choice([1, 4, 16]),
        window=rng.choice([None, 7, 40]),
        softcap=rng.choice([None, 2.0]),
        dtype=dtype,
        seed=seed,
    )
    got = ops.paged_attention(home, case.query, case.slab, case.batch, case.shape)
    torch.testing.assert_close(got.double(), case.expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def part(
    case: AttentionCase, lengths: list[tuple[int, int]], *, seq: int, first: int, last: int
) -> AttentionBatch:
    """New tokens [first, last) of one sequence as a step of their own."""
    new, total = lengths[seq]
    num, end = last - first, total - new + last
    return AttentionBatch(
        query_start_loc=torch.tensor([0, num], dtype=torch.int32),
        seq_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=case.batch.block_tables[seq : seq + 1],
        slot_mapping=torch.zeros(num, dtype=torch.int64),
        query_lens_host=(num,),
        seq_lens_host=(end,),
    )


@pytest.mark.parametrize(("window", "dtype"), [(None, torch.bfloat16), (29, torch.float32)])
@pytest.mark.usefixtures("small_splits")
def test_deterministic_rows_have_the_same_bits_alone_in_any_batch_and_in_any_chunk(
    window: int | None, dtype: torch.dtype
) -> None:
    """A sequence of 105 tokens whose last 40 are new: as one of three, alone, in two chunks, as a decode."""
    lengths = [(1, 9), (40, 105), (3, 70)]
    case = make_case(lengths, kernels=FIXED, window=window, dtype=dtype)
    whole = ops.paged_attention(FIXED, case.query, case.slab, case.batch, case.shape)
    for first, last in ((0, 40), (0, 33), (33, 40), (39, 40)):
        batch = part(case, lengths, seq=1, first=first, last=last)
        alone = ops.paged_attention(FIXED, case.query[1 + first : 1 + last], case.slab, batch, case.shape)
        assert torch.equal(alone, whole[1 + first : 1 + last]), (first, last)


@pytest.mark.parametrize("home", [FAST, FIXED], ids=["fast", "fixed"])
@pytest.mark.usefixtures("small_splits")
def test_rows_of_sequences_of_no_length_are_zero(home: TritonKernels) -> None:
    """A captured batch is filled up with them."""
    case = make_case([(1, 40), (1, 3)], kernels=home)
    lens = torch.tensor([40, 0], dtype=torch.int32)
    batch = replace(case.batch, seq_lens=lens, plans={})
    batch.block_tables[1] = -1
    got = ops.paged_attention(home, case.query, case.slab, batch, case.shape)
    torch.testing.assert_close(got[0].double(), case.expected[0], atol=1e-5, rtol=1e-5)
    assert not got[1].any()


@pytest.mark.parametrize("home", [FAST, FIXED], ids=["fast", "fixed"])
@pytest.mark.usefixtures("small_splits")
def test_a_captured_step_serves_any_lengths_up_to_the_one_it_was_made_for(home: TritonKernels) -> None:
    """Grids come from the host's lengths alone: with the longest there, what the device says counts."""
    case = make_case([(1, 70), (1, 3)], kernels=home)
    longest = replace(case.batch, seq_lens_host=(200, 200), plans={})
    got = ops.paged_attention(home, case.query, case.slab, longest, case.shape)
    torch.testing.assert_close(got.double(), case.expected, atol=1e-5, rtol=1e-5)


HEADS = tiles.Heads(group=4, num_kv_heads=8, head_dim=128, itemsize=2)


@pytest.mark.parametrize(
    ("num_seqs", "max_len", "splits"),
    [(1, 300, 1), (1, 32768, 32), (8, 32768, 8), (64, 512, 1), (64, 32768, 8), (256, 1024, 1)],
)
def test_splits_fill_the_device_and_bound_the_keys_of_a_program(
    num_seqs: int, max_len: int, splits: int
) -> None:
    """132 processors, 8 key/value heads."""
    mix = tiles.StepMix(num_seqs=num_seqs, num_rows=num_seqs, max_short=1, has_long=False, max_len=max_len)
    assert tiles.num_splits(mix, HEADS, num_processors=132) == splits


def test_short_sequences_fit_a_tile_whatever_the_ratio_of_heads() -> None:
    for group in (1, 3, 4, 7, 8, 64, 71):
        heads = replace(HEADS, group=group)
        limit = tiles.short_limit(heads)
        for new in range(1, limit + 1):
            batch = AttentionBatch(
                query_start_loc=torch.tensor([0, new]),
                seq_lens=torch.tensor([new]),
                block_tables=torch.zeros(1, 1),
                slot_mapping=torch.zeros(new),
                query_lens_host=(new,),
                seq_lens_host=(new,),
            )
            rows = tiles.step_mix(batch, heads).max_short
            assert new <= rows <= limit
            assert rows * group <= tiles.short_tile(heads, max_new=rows).block_m
            assert rows * group <= tiles.fixed_tile(heads).block_m


def test_the_sequence_of_a_tile_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new token of every long sequence is computed once: here by what the long kernel alone returns."""
    monkeypatch.setattr(tiles, "MAX_SHORT_ROWS", 2)
    lengths = [(5, 5), (1, 1), (2, 2), (17, 17), (9, 30), (64, 64)]
    case = make_case(lengths, kernels=FAST)
    got = ops.paged_attention(FAST, case.query, case.slab, case.batch, case.shape)
    torch.testing.assert_close(got.double(), case.expected, atol=1e-5, rtol=1e-5)


def test_nothing_is_launched_for_an_empty_step() -> None:
    kv = KvShape(block_size=4, num_kv_heads=2, head_dim=8, dtype=torch.float32)
    slab = ops.make_slab(FAST, kv, num_blocks=1)
    empty = torch.zeros(0, 2, 8)
    ops.write_kv(FAST, empty, empty, slab, torch.zeros(0, dtype=torch.int64))
    batch = AttentionBatch(
        query_start_loc=torch.zeros(1, dtype=torch.int32),
        seq_lens=torch.zeros(0, dtype=torch.int32),
        block_tables=torch.zeros(0, 1, dtype=torch.int32),
        slot_mapping=torch.zeros(0, dtype=torch.int64),
        query_lens_host=(),
        seq_lens_host=(),
    )
    got = ops.paged_attention(FAST, torch.zeros(0, 4, 8), slab, batch, AttentionShape(scale=1.0))
    assert got.shape == (0, 4, 8)
