"""How many KV blocks to hand out, decided once at start.

Pure arithmetic: what is free is read by `memory`, what one block costs by `kv_pool`.
`engine/memory_plan` calls it.
"""

from dataclasses import dataclass
from typing import Final

from penstock.core.errors import StartupError
from penstock.engine.config import GIB, KvConfig, SchedulerConfig
from penstock.engine.kv.block_needs import num_blocks_needed
from penstock.engine.kv.cache_groups import CacheLayout

DEFAULT_BYTES_MAX: Final = 2 * GIB
"""A laptop's share: enough for dozens of conversations, small enough to go unnoticed."""
MEMORY_SHARE: Final = 0.5
"""Of what is free at start; the rest is for activations, the API process and everybody else."""
MIN_BLOCKS: Final = 2
PROFILE_BLOCKS_PER_GROUP: Final = 4
"""Of the small pool on which the heaviest step is measured."""
GRAPHS_OVERHEAD_BYTES: Final = 256 << 20
"""What the driver keeps for a ladder of recorded decode steps, beside the activations that they share. An
estimate, not measured yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvNeeds:
    """What the model and the limits ask of the pool."""

    layout: CacheLayout
    bytes_per_block: int
    """Of one block in all slabs."""
    max_model_len: int
    """Tokens of the longest context, as resolved."""
    max_num_seqs: int
    max_num_batched_tokens: int
    block_size: int

    @classmethod
    def of(
        cls,
        config: KvConfig,
        *,
        scheduler: SchedulerConfig,
        layout: CacheLayout,
        bytes_per_block: int,
        max_model_len: int,
    ) -> "KvNeeds":
        """What two rooms' configs ask, for a model of a layout and a length."""
        return cls(
            layout=layout,
            bytes_per_block=bytes_per_block,
            max_model_len=max_model_len,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=scheduler.max_num_batched_tokens,
            block_size=config.block_size,
        )

    @property
    def blocks_per_context(self) -> int:
        """Blocks that one sequence of `max_model_len` tokens holds at most, as admission counts them."""
        return num_blocks_needed(
            self.max_model_len,
            num_shared_tokens=0,
            n=1,
            windows=self.layout.windows,
            block_size=self.block_size,
        )

    @property
    def least_blocks(self) -> int:
        """One full context and a block per cache group."""
        return max(MIN_BLOCKS, self.blocks_per_context + len(self.layout.groups))

    @property
    def usable_blocks(self) -> int:
        """What `max_num_seqs` full contexts hold, and in window groups a step's tokens, freed after it."""
        num_windowed = sum(window is not None for window in self.layout.windows)
        step_blocks = -(-self.max_num_batched_tokens // self.block_size)
        return max(
            self.least_blocks, self.max_num_seqs * self.blocks_per_context + num_windowed * step_blocks
        )


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
        scheduler: its `max_num_seqs` and `max_num_batched_tokens` bound what can be used.
        layout: how layers share blocks.
        bytes_per_block: of one block in all slabs.
        free_memory_bytes: what could be allocated now, or None if unknown.
        max_model_len: tokens of the longest context, as resolved.

    Returns:
        At least one full context and one block per cache group.

    Raises:
        StartupError: not even that fits, or more is asked for than is free; the message has the numbers.
    """
    needs = KvNeeds.of(
        config,
        scheduler=scheduler,
        layout=layout,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
    )
    if config.num_blocks is not None:
        source, num_blocks = f"num_kv_blocks={config.num_blocks}", config.num_blocks
    elif config.kv_cache_memory_bytes is not None:
        source = f"kv_cache_memory_bytes={config.kv_cache_memory_bytes}"
        num_blocks = config.kv_cache_memory_bytes // bytes_per_block
    else:
        source = f"half of the free memory ({free_memory_bytes} bytes)"
        num_blocks = _default_blocks(needs, free_memory_bytes=free_memory_bytes)
    param = "num_kv_blocks" if config.num_blocks is not None else "kv_cache_memory_bytes"
    _check_enough(num_blocks, needs=needs, source=source, param=param)
    _check_free(num_blocks * bytes_per_block, free_memory_bytes=free_memory_bytes, source=source, param=param)
    return num_blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceBudget:
    """How the memory of a device with its own is shared out; all in bytes.

    ```
    0 ............. used | activations | graphs | KV ............. utilization * total | kept free ... total
      weights, context,    measured       kept
      other processes
    ```
    """

    total: int
    utilization: float
    """Share that may be taken once the pool is there, by whomever; above 0, at most 1."""
    used: int
    """Before the pool is made: weights, the runtime's own, other processes."""
    activations: int
    """What the heaviest step takes beside KV, measured."""
    graphs: int
    """Set aside for recorded steps."""

    @property
    def kv(self) -> int:
        """What is left for KV; may be negative."""
        return int(self.utilization * self.total) - self.used - self.activations - self.graphs

    @property
    def room(self) -> int:
        """What a pool could have at the very most, with nothing kept free."""
        return self.total - self.used - self.activations - self.graphs

    def __str__(self) -> str:
        return (
            f"gpu_memory_utilization={self.utilization:g} of {self.total} bytes, less {self.used} in use, "
            f"{self.activations} for activations and {self.graphs} for graphs,"
        )


def resolve_device_blocks(
    config: KvConfig,
    *,
    scheduler: SchedulerConfig,
    layout: CacheLayout,
    bytes_per_block: int,
    budget: DeviceBudget,
    max_model_len: int,
) -> int:
    """`resolve_num_blocks` on a device with its own memory: all that its budget leaves.

    Args:
        config: what was asked for; `num_blocks` or `kv_cache_memory_bytes` go before the budget.
        scheduler: its `max_num_seqs` and `max_num_batched_tokens` bound what can be used.
        layout: how layers share blocks.
        bytes_per_block: of one block in all slabs.
        budget: the device's.
        max_model_len: tokens of the longest context, as resolved.

    Raises:
        StartupError: as `resolve_num_blocks`.
    """
    if config.num_blocks is not None or config.kv_cache_memory_bytes is not None:
        return resolve_num_blocks(
            config,
            scheduler=scheduler,
            layout=layout,
            bytes_per_block=bytes_per_block,
            free_memory_bytes=budget.room,
            max_model_len=max_model_len,
        )
    needs = KvNeeds.of(
        config,
        scheduler=scheduler,
        layout=layout,
        bytes_per_block=bytes_per_block,
        max_model_len=max_model_len,
    )
    # One block more than is handed out: the runner's scratch.
    num_blocks = max(0, budget.kv) // bytes_per_block - 1
    _check_enough(num_blocks, needs=needs, source=str(budget), param="gpu_memory_utilization")
    return num_blocks


def resolve_num_host_blocks(
    config: KvConfig, *, layout: CacheLayout, bytes_per_block: int, free_memory_bytes: int | None
) -> int:
    """How many blocks the offload tier holds.

    Args:
        config: its `offloading_bytes`.
        layout: a block of tokens takes a slot in each of its groups.
        bytes_per_block: of one block of the model in all slabs.
        free_memory_bytes: host memory that the pool leaves, or None if unknown.

    Returns:
        0 without a tier.

    Raises:
        StartupError: it would not hold a block of tokens, or is more than is free.
    """
    num_bytes = config.offloading_bytes
    least_bytes = len(layout.groups) * bytes_per_block
    if num_bytes and num_bytes < least_bytes:
        raise StartupError(
            f"kv_offloading_size is {num_bytes} bytes, it must be 0 or at least {least_bytes} for one block "
            f"of {config.block_size} tokens",
            code="kv_memory",
            param="kv_offloading_size",
        )
    if free_memory_bytes is not None and num_bytes > max(0, free_memory_bytes):
        raise StartupError(
            f"kv_offloading_size is {num_bytes} bytes, but only {max(0, free_memory_bytes)} bytes of host "
            "memory are free beside the KV pool",
            code="kv_memory",
            param="kv_offloading_size",
        )
    return num_bytes // bytes_per_block


def _default_blocks(needs: KvNeeds, *, free_memory_bytes: int | None) -> int:
    capped = max(needs.least_blocks, DEFAULT_BYTES_MAX // needs.bytes_per_block)
    wanted = min(needs.usable_blocks, capped)
    if free_memory_bytes is None:
        return wanted
    return min(wanted, int(free_memory_bytes * MEMORY_SHARE) // needs.bytes_per_block)


def _check_enough(num_blocks: int, *, needs: KvNeeds, source: str, param: str) -> None:
    if num_blocks < needs.least_blocks:
        raise StartupError(
            f"{source} holds {num_blocks} KV blocks, but one context of max_model_len={needs.max_model_len} "
            f"needs {needs.least_blocks} ({needs.least_blocks * needs.bytes_per_block} bytes, "
            f"{needs.bytes_per_block} a block): lower max_model_len or give more memory",
            code="kv_memory",
            param=param,
        )


def _check_free(num_bytes: int, *, free_memory_bytes: int | None, source: str, param: str) -> None:
    """Pages are touched on demand: too large a pool would end in mid-service, by the kernel's hand."""
    if free_memory_bytes is not None and num_bytes > free_memory_bytes:
        raise StartupError(
            f"{source} asks for {num_bytes} bytes of KV blocks, but only {free_memory_bytes} bytes are free",
            code="kv_memory",
            param=param,
        )
