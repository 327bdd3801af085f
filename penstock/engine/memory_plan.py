"""Who gets which bytes: a device's budget, the blocks of the pool, the slots of the offload tier.

`build` asks once, when the weights are there. The arithmetic is `runner/kv_budget`'s; here it meets the
machine, and a look at what steps take.
"""

from dataclasses import dataclass

from penstock.core.errors import StartupError
from penstock.engine.config import DEFAULT_UTILIZATION, KvConfig, refuse_utilization
from penstock.engine.kv.host_tier import HostTier
from penstock.engine.loaded_engine import LoadedEngine
from penstock.engine.ranks import make_runner
from penstock.engine.runner.device_memory import DeviceMemory, memory_of
from penstock.engine.runner.host_memory import available_memory_bytes
from penstock.engine.runner.kv_budget import (
    GRAPHS_OVERHEAD_BYTES,
    PROFILE_BLOCKS_PER_GROUP,
    DeviceBudget,
    resolve_device_blocks,
    resolve_num_blocks,
    resolve_num_host_blocks,
)
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.runner.warmup import StepPeaks


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What is handed out beside the weights."""

    device_memory: DeviceMemory | None
    """The device's own; None on the CPU."""
    budget: DeviceBudget | None
    """How it is shared out; None on the CPU and with several ranks."""
    block_bytes: int
    """Of one block, in all ranks."""
    num_blocks: int
    """Of the pool."""
    tier: HostTier | None
    """The offload tier; None if none is asked for."""

    @property
    def kv_bytes(self) -> int:
        """Of the pool, in all ranks."""
        return self.num_blocks * self.block_bytes

    @property
    def graph_bytes(self) -> int | None:
        """That recorded steps may take; None where nothing limits them."""
        return None if self.budget is None else self.budget.graphs

    @property
    def num_host_blocks(self) -> int:
        """Of the offload tier."""
        return 0 if self.tier is None else self.tier.num_slots


def plan_memory(engine: LoadedEngine) -> MemoryPlan:
    """Look at the machine, measure where it has a memory of its own, and share out.

    Raises:
        StartupError: what is asked for does not fit, or cannot be measured; the message has the numbers.
    """
    memory = memory_of(engine.loaded.device)
    budget = _device_budget(engine, memory)
    block_bytes = engine.block_bytes
    num_blocks = _num_blocks(engine, block_bytes=block_bytes, budget=budget)
    return MemoryPlan(
        device_memory=memory,
        budget=budget,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        tier=_host_tier(engine, pool_bytes=num_blocks * block_bytes),
    )


def _device_budget(engine: LoadedEngine, memory: DeviceMemory | None) -> DeviceBudget | None:
    """How a device's own memory is shared out, after a look at what steps take; None on the CPU."""
    share = engine.config.kv.gpu_memory_utilization
    if memory is None:
        if share is not None:
            refuse_utilization(share)
        return None
    if engine.config.tensor_parallel_size > 1:
        _check_ranks_memory(engine.config.kv)
        return None
    memory.empty_cache()
    used_bytes = memory.used_bytes
    peaks = _measured_peaks(engine, memory)
    memory.empty_cache()
    return DeviceBudget(
        total=memory.total_bytes,
        utilization=DEFAULT_UTILIZATION if share is None else share,
        used=used_bytes,
        activations=max(peaks),
        graphs=0 if engine.config.enforce_eager else _graphs_bytes(engine, peaks),
    )


def _graphs_bytes(engine: LoadedEngine, peaks: StepPeaks) -> int:
    """Of recorded steps: what they compute in, the float32 logits that all write to, and the driver's own."""
    outputs = engine.limits.max_num_seqs * engine.loaded.model.vocab_size * 4
    return peaks.decodes + outputs + GRAPHS_OVERHEAD_BYTES


def _check_ranks_memory(kv: KvConfig) -> None:
    """What a step takes is measured on one rank alone, so several must be told what is theirs."""
    if kv.num_blocks is None and kv.kv_cache_memory_bytes is None:
        raise StartupError(
            "tensor_parallel_size above 1 on a device needs kv_cache_memory_bytes or num_kv_blocks",
            param="tensor_parallel_size",
        )


def _measured_peaks(engine: LoadedEngine, memory: DeviceMemory) -> StepPeaks:
    """With a runner of a few blocks, which is gone when this returns."""
    limits = engine.limits
    runner = make_runner(engine, num_blocks=PROFILE_BLOCKS_PER_GROUP * len(engine.layout.groups))
    try:
        return runner.measure_peaks(
            memory,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.max_num_batched_tokens,
            max_model_len=limits.max_model_len,
        )
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise StartupError(
            f"a step of max_num_batched_tokens={limits.max_num_batched_tokens} and "
            f"max_num_seqs={limits.max_num_seqs} does not fit into the device's memory beside the weights: "
            "lower them",
            code="device_memory",
            param="max_num_batched_tokens",
        ) from error


def _num_blocks(engine: LoadedEngine, *, block_bytes: int, budget: DeviceBudget | None) -> int:
    if budget is not None:
        return resolve_device_blocks(
            engine.config.kv,
            scheduler=engine.limits,
            layout=engine.layout,
            bytes_per_block=block_bytes,
            budget=budget,
            max_model_len=engine.limits.max_model_len,
        )
    return resolve_num_blocks(
        engine.config.kv,
        scheduler=engine.limits,
        layout=engine.layout,
        bytes_per_block=block_bytes,
        free_memory_bytes=available_memory_bytes(),
        max_model_len=engine.limits.max_model_len,
    )


def _host_tier(engine: LoadedEngine, *, pool_bytes: int) -> HostTier | None:
    num_bytes, free_bytes = engine.slot_bytes, available_memory_bytes()
    if free_bytes is not None and engine.loaded.device.type == "cpu":
        free_bytes -= pool_bytes
    num_slots = resolve_num_host_blocks(
        engine.config.kv, layout=engine.layout, bytes_per_block=num_bytes, free_memory_bytes=free_bytes
    )
    if not num_slots:
        return None
    return HostTier(
        num_slots=num_slots,
        num_groups=len(engine.layout.groups),
        block_size=engine.config.kv.block_size,
        bytes_per_slot=num_bytes,
    )
