"""How many blocks to hand out: each rule by numbers that fit on a hand."""

import pytest

from penstock.core.errors import StartupError
from penstock.engine.config import KvConfig, SchedulerConfig
from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.engine.runner.kv_budget import (
    DeviceBudget,
    resolve_device_blocks,
    resolve_num_blocks,
    resolve_num_host_blocks,
)

KIB, GIB = 1 << 10, 1 << 30


def blocks(*, windows=(None,), max_num_seqs=4, free=None, max_model_len=64, bytes_per_block=KIB, **kv):
    """A context of 64 tokens is 4 blocks of 16 with full attention, 3 with a window of 32."""
    return resolve_num_blocks(
        KvConfig(**kv),
        scheduler=SchedulerConfig(max_num_seqs=max_num_seqs),
        layout=make_cache_layout(windows),
        bytes_per_block=bytes_per_block,
        free_memory_bytes=free,
        max_model_len=max_model_len,
    )


def test_an_explicit_number_of_blocks_is_taken():
    assert blocks(num_blocks=77, kv_cache_memory_bytes=1) == 77


def test_explicit_bytes_are_cut_to_whole_blocks():
    assert blocks(kv_cache_memory_bytes=10 * KIB + 5) == 10


def test_by_default_the_pool_holds_what_all_sequences_can_use():
    assert blocks(free=1 * GIB) == 4 * 4
    assert blocks(free=1 * GIB, windows=(None, 32)) == 4 * (4 + 3) + 2048 // 16
    assert blocks(free=None) == 16


def test_half_of_the_free_memory_is_the_most_by_default():
    assert blocks(free=20 * KIB) == 10


def test_two_gib_is_the_most_by_default_unless_one_context_needs_more():
    assert blocks(free=100 * GIB, bytes_per_block=1 << 28, max_num_seqs=100) == 8
    assert blocks(free=100 * GIB, bytes_per_block=1 << 30, max_num_seqs=100) == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"num_blocks": 4}, ["num_kv_blocks=4", "max_model_len=64", "needs 5", "5120 bytes"]),
        ({"kv_cache_memory_bytes": 4 * KIB}, ["kv_cache_memory_bytes=4096", "4 KV blocks"]),
        ({"free": 8 * KIB}, ["half of the free memory (8192 bytes)", "4 KV blocks"]),
        ({"num_blocks": 8, "windows": (None, 32)}, ["needs 9"]),
    ],
    ids=str,
)
def test_less_than_one_context_and_a_block_per_group_is_refused_with_the_numbers(given, words):
    with pytest.raises(StartupError) as refusal:
        blocks(**given)
    assert all(word in refusal.value.message for word in words), refusal.value.message
    assert refusal.value.param in {"num_kv_blocks", "kv_cache_memory_bytes"}


def test_an_explicit_size_beyond_the_free_memory_is_refused():
    """The pool's pages are touched on demand: the kernel would kill the engine in mid-service instead."""
    with pytest.raises(StartupError, match="free"):
        blocks(num_blocks=100, free=99 * KIB)
    with pytest.raises(StartupError, match="free"):
        blocks(kv_cache_memory_bytes=100 * KIB, free=99 * KIB)


def device_blocks(*, bytes_per_block=KIB, utilization=0.5, **kv):
    """A device of 100 KiB: 20 in use, the heaviest step takes 10, graphs 5."""
    return resolve_device_blocks(
        KvConfig(**kv),
        scheduler=SchedulerConfig(max_num_seqs=4),
        layout=make_cache_layout((None,)),
        bytes_per_block=bytes_per_block,
        budget=DeviceBudget(
            total=100 * KIB, utilization=utilization, used=20 * KIB, activations=10 * KIB, graphs=5 * KIB
        ),
        max_model_len=64,
    )


def test_a_device_gives_all_that_its_share_leaves_but_the_scratch_block():
    assert device_blocks() == 50 - 20 - 10 - 5 - 1
    assert device_blocks(utilization=1.0) == 100 - 35 - 1


def test_explicit_sizes_go_before_the_share_and_may_take_what_it_keeps_free():
    assert device_blocks(num_blocks=60) == 60
    assert device_blocks(kv_cache_memory_bytes=65 * KIB) == 65


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"utilization": 0.39}, ["gpu_memory_utilization=0.39", "20480 in use", "10240 for act", "needs 5"]),
        ({"utilization": 0.1}, ["gpu_memory_utilization=0.1", "holds -1 KV blocks"]),
        ({"num_blocks": 66}, ["num_kv_blocks=66", "only 66560 bytes are free"]),
    ],
    ids=str,
)
def test_a_device_with_too_little_memory_is_refused_with_the_numbers(given, words):
    with pytest.raises(StartupError) as refusal:
        device_blocks(**given)
    assert all(word in refusal.value.message for word in words), refusal.value.message


@pytest.mark.parametrize(
    ("size", "free", "words"),
    [
        (KIB, None, "at least 2048 for one block"),
        (9 * KIB, 8 * KIB, "only 8192 bytes of host memory are free"),
        (9 * KIB, -5, "only 0 bytes"),
    ],
)
def test_an_offload_tier_that_does_not_fit_is_refused(size, free, words):
    with pytest.raises(StartupError, match=words):
        host_blocks(size, free)


def host_blocks(size, free):
    return resolve_num_host_blocks(
        KvConfig(offloading_bytes=size),
        layout=make_cache_layout((None, 32)),
        bytes_per_block=KIB,
        free_memory_bytes=free,
    )


def test_an_offload_tier_holds_whole_blocks():
    assert host_blocks(0, None) == 0
    assert host_blocks(5 * KIB + 7, 6 * KIB) == 5
