"""How many KV blocks to hand out, decided once at start.

Pure arithmetic: what is free is read by `memory`, what one block costs by `kv_pool`. `engine/build` calls it.
"""

from typing import Final

from penstock.core.errors import StartupError
from penstock.engine.config import KvConfig, SchedulerConfig
from penstock.engine.kv.cache_groups import CacheLayout

GIB: Final = 1 << 30
DEFAULT_BYTES_MAX: Final = 2 * GIB
"""A laptop's share: enough for dozens of conversations, small enough to go unnoticed."""
MEMORY_SHARE: Final = 0.5
"""Of what is free at start; the rest is for activations, the API process and everybody else."""
MIN_BLOCKS: Final = 2


def blocks_per_context(layout: CacheLayout, *, block_size: int, max_model_len: int) -> int:
    """Blocks that one sequence of `max_model_len` tokens owns at most.

    A window group is counted like the others: a long prompt may be computed in one chunk, and only then are
    the blocks behind the window given back.
    """
    return len(layout.groups) * -(-max_model_len // block_size)


def resolve_num_blocks(
    config: KvConfig,
    *,
    scheduler: SchedulerConfig,
    layout: CacheLayout,
    bytes_per_block: int,
    free_memory_bytes: int | None,
    max_model_len: int,
) -> int:
    """Choose the size of the pool, in blocks.

    `num_blocks` if it is given; else what fits into `kv_cache_memory_bytes` if that is given; else the least
    of: what `max_num_seqs` full contexts can use, half of the free memory, and 2 GiB (or the memory of one
    full context where that is more).

    Args:
        config: what was asked for.
        scheduler: its `max_num_seqs` bounds what can be used.
        layout: how layers share blocks.
        bytes_per_block: of one block in all slabs.
        free_memory_bytes: what could be allocated now, or None if unknown.
        max_model_len: tokens of the longest context, as resolved.

    Returns:
        At least one full context and one block per cache group.

    Raises:
        StartupError: not even that fits; the message has the numbers.
    """
    per_context = blocks_per_context(layout, block_size=config.block_size, max_model_len=max_model_len)
    least = max(MIN_BLOCKS, per_context + len(layout.groups))
    room = _share_of_free(free_memory_bytes, bytes_per_block=bytes_per_block)
    if config.num_blocks is not None:
        field, num_blocks = f"num_blocks={config.num_blocks}", config.num_blocks
    elif config.kv_cache_memory_bytes is not None:
        field = f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
    else:
        field = f"half of the free memory ({free_memory_bytes} bytes)"
        usable = max(least, scheduler.max_num_seqs * per_context)
        num_blocks = min(usable, max(least, DEFAULT_BYTES_MAX // bytes_per_block))
        num_blocks = num_blocks if room is None else min(num_blocks, room)
    if num_blocks < least:
        raise StartupError(
            f"{field} holds {num_blocks} KV blocks, but one context of max_model_len={max_model_len} needs "
            f"{least} ({least * bytes_per_block} bytes, {bytes_per_block} a block): lower max_model_len or "
            "give more memory",
            code="kv_memory",
            param="num_blocks" if config.num_blocks is not None else "kv_cache_memory_bytes",
        )
    return num_blocks


def _share_of_free(free_memory_bytes: int | None, *, bytes_per_block: int) -> int | None:
    if free_memory_bytes is None:
        return None
    return int(free_memory_bytes * MEMORY_SHARE) // bytes_per_block
