"""From an `EngineConfig` to a warm `EngineCore`.

Runs inside the engine process (or, for tests and the offline API, in the caller's). The order is: load the
weights, lay out the cache, size the pool, join the parts, warm up.
"""

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import msgspec
import torch

from penstock.core.errors import StartupError
from penstock.core.tokens import AdapterReport, EngineInfo
from penstock.engine.config import (
    DEFAULT_UTILIZATION,
    EngineConfig,
    KvConfig,
    LoraConfig,
    SchedulerConfig,
    SpeculativeConfig,
    check_whole_prompts,
    read_affinity,
    refuse_utilization,
    validate_engine_config,
)
from penstock.engine.core import EngineCore
from penstock.engine.grammar.bitmask import MaskFiller
from penstock.engine.grammar.compile import GrammarCompiler
from penstock.engine.grammar.compile_pool import CompilePool
from penstock.engine.kv.cache_groups import CacheLayout, make_cache_layout
from penstock.engine.kv.host_tier import HostTier
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.lora.host import AdapterHost
from penstock.engine.runner.cuda_graphs import CudaRecorder, DecodeGraphs, GraphLimits
from penstock.engine.runner.device_memory import DeviceMemory, memory_of
from penstock.engine.runner.draft_passes import ModelPasses, draft_bytes_per_block, draft_layout
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.kv_budget import (
    GRAPHS_OVERHEAD_BYTES,
    PROFILE_BLOCKS_PER_GROUP,
    DeviceBudget,
    resolve_device_blocks,
    resolve_num_blocks,
    resolve_num_host_blocks,
)
from penstock.engine.runner.kv_pool import KvPool, bytes_per_block
from penstock.engine.runner.memory import available_memory_bytes
from penstock.engine.runner.out_of_memory import is_out_of_memory
from penstock.engine.runner.overlapped_rank import OverlappedRank
from penstock.engine.runner.rank_group import LocalRank, RankGroup
from penstock.engine.runner.rank_processes import SeveralRanks, StartedRanks
from penstock.engine.runner.runner import Runner
from penstock.engine.runner.warmup import StepPeaks
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.drafting import Proposer, RunnerGuesses
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.spec.draft_model import DraftModel
from penstock.engine.spec.ngram import NgramProposer
from penstock.engine.spec.vocabulary import check_same_tokens
from penstock.kernels.adapters import AdapterWeights, LowRankPair
from penstock.kernels.cpu.extension import default_num_threads
from penstock.kernels.devices import DeviceChoice, choose_device
from penstock.kernels.ops import kv_block, prepare_adapter
from penstock.kernels.options import KernelOptions, KvCacheDtype
from penstock.kernels.quantization import Activations, Method, Quantization
from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from penstock.observe.clock import SystemClock
from penstock.parallel.rank import ALONE, Rank


def build_core(
    config: EngineConfig,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    faults: FaultPoints | None = None,
    folder: Path | None = None,
) -> EngineCore:
    """Load, size, join and warm up.

    Args:
        config: checked here.
        on_progress: called with (done_bytes, total_bytes) while weights load.
        faults: where tests make the runner fail; None in production.
        folder: private, where several ranks may meet; None makes one.

    Raises:
        StartupError: names what is wrong with the config, the checkpoint or the machine.
    """
    validate_engine_config(config)
    if config.tensor_parallel_size == 1:
        return _build(config, on_progress=on_progress, faults=faults, started=None)
    started = StartedRanks(config, folder=folder)
    try:
        return _build(config, on_progress=on_progress, faults=faults, started=started)
    except BaseException:
        started.close()
        raise


def _build(
    config: EngineConfig,
    *,
    on_progress: Callable[[int, int], None] | None,
    faults: FaultPoints | None,
    started: StartedRanks | None,
) -> EngineCore:
    began_s = time.monotonic()
    chosen = choose_device(config.device, kernels=config.kernels)
    _refuse_eager_without_device(config, chosen)
    compiler = GrammarCompiler(Path(config.model_path))
    warming = threading.Thread(target=compiler.warm_up, name="penstock-vocabulary", daemon=True)
    if config.warmup:
        warming.start()  # beside the weights: it takes a second or two for a vocabulary of 150,000
    rank = ALONE if started is None else started.join(device=chosen.device)
    loaded = load_part(config, rank=rank, device=chosen.device, on_progress=on_progress)
    load_time_s = time.monotonic() - began_s
    draft_model = _load_draft(config, loaded, num_threads=_num_threads(config))
    core = _join(
        config,
        loaded,
        draft_model=draft_model,
        compiler=compiler,
        load_time_s=load_time_s,
        faults=faults,
        device_detail=chosen.detail,
        started=started,
    )
    if config.warmup:
        warming.join()
    return core


def _num_threads(config: EngineConfig) -> int:
    """Threads of one rank."""
    return config.num_threads or max(1, default_num_threads() // config.tensor_parallel_size)


def load_part(
    config: EngineConfig,
    *,
    rank: Rank,
    device: torch.device,
    on_progress: Callable[[int, int], None] | None = None,
) -> LoadedModel:
    """Load a rank's part of the model, and give its process as many threads as the rank may use.

    Raises:
        StartupError: as `load_model`.
    """
    num_threads = _num_threads(config)
    torch.set_num_threads(num_threads)
    loaded = load_model(
        Path(config.model_path),
        dtype=config.dtype,
        kernels=config.kernels,
        device=device,
        max_model_len=config.max_model_len,
        options=kernel_options(config, num_threads=num_threads),
        on_progress=on_progress,
        rank=rank,
    )
    if loaded.kernels.has_own_threads:
        torch.set_num_threads(1)  # what is left to torch is small, and two pools would fight for the CPUs
    return loaded


def make_following_runner(config: EngineConfig, loaded: LoadedModel, *, num_blocks: int) -> Runner:
    """The runner of a rank beside the first."""
    return _make_runner(
        config,
        loaded,
        layout=make_cache_layout(loaded.model.layer_windows),
        num_blocks=num_blocks,
        num_host_blocks=0,
        draft=None,
        adapters=None,
        faults=None,
        is_alone=False,
    )


def _load_draft(config: EngineConfig, target: LoadedModel, *, num_threads: int) -> LoadedModel | None:
    """The draft model, if one is asked for, on the threads of the model's own kernels."""
    if config.speculative is None or config.speculative.method != "draft_model":
        return None
    path = Path(config.speculative.model)
    check_same_tokens(path, target=Path(config.model_path))
    return load_model(
        path,
        dtype=str(target.dtype).removeprefix("torch."),
        kernels=target.kernels.name,
        device=target.device,
        max_model_len=target.max_model_len,
        options=kernel_options(config, num_threads=num_threads),
        kernel_set=target.kernels,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A loaded draft model that fits the model."""

    loaded: LoadedModel
    layout: CacheLayout

    @classmethod
    def over(cls, loaded: LoadedModel, *, target: LoadedModel, target_layout: CacheLayout) -> "Draft":
        """Check that it fits.

        Raises:
            StartupError: as `draft_layout`.
        """
        return cls(loaded=loaded, layout=draft_layout(loaded, target=target, target_layout=target_layout))

    def drafter(self, sampler: Sampler, *, num_blocks: int, block_size: int) -> DraftModel:
        """Who guesses with it, with the target's sampler."""
        passes = ModelPasses(self.loaded, layout=self.layout, num_blocks=num_blocks, block_size=block_size)
        return DraftModel(passes, sampler=sampler, num_blocks=num_blocks, block_size=block_size)


def kernel_options(config: EngineConfig, *, num_threads: int) -> KernelOptions:
    """The kernels' part of a checked config."""
    quantization = Quantization(
        method=cast("Method", config.quantization),
        group_size=config.quantization_group_size,
        activations=cast("Activations", config.quantization_activations),
    )
    return KernelOptions(
        quantization=quantization,
        kv_cache_dtype=cast("KvCacheDtype", config.kv.cache_dtype),
        block_size=config.kv.block_size,
        num_threads=num_threads,
        cpus=read_affinity(config.thread_affinity),
        is_deterministic=config.deterministic,
        isa=config.isa,
        enable_lora=config.lora.enable_lora,
    )


def _join(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    draft_model: LoadedModel | None,
    compiler: GrammarCompiler,
    load_time_s: float,
    faults: FaultPoints | None,
    device_detail: str,
    started: StartedRanks | None,
) -> EngineCore:
    layout = make_cache_layout(loaded.model.layer_windows)
    limits = _resolved_limits(config, loaded)
    check_whole_prompts(limits, max_model_len=limits.max_model_len)
    draft = None if draft_model is None else Draft.over(draft_model, target=loaded, target_layout=layout)
    others_bytes = 0 if started is None else started.wait_loaded()
    # On the CPU all ranks share one memory, and each holds its heads of a block.
    block_bytes = _block_bytes(config, loaded, layout, draft) * config.tensor_parallel_size
    budget = _device_budget(config, loaded, limits=limits, layout=layout, draft=draft)
    num_blocks = _num_blocks(config.kv, limits, layout=layout, block_bytes=block_bytes, budget=budget)
    tier = _host_tier(config, loaded, layout, pool_bytes=num_blocks * block_bytes)
    adapters = _adapter_host(config.lora, loaded)
    runner = _make_runner(
        config,
        loaded,
        layout=layout,
        num_blocks=num_blocks,
        num_host_blocks=0 if tier is None else tier.num_slots,
        draft=draft,
        adapters=adapters,
        faults=faults,
        graph_bytes=budget.graphs if budget else None,
        is_alone=started is None,
    )
    ranks = _ranks(runner, loaded, limits=limits, started=started, num_blocks=num_blocks)
    warm_steps, warmup_time_s = _warm_up(ranks, limits) if config.warmup else ([], 0.0)
    kv = _kv_manager(config, loaded, layout, num_blocks)
    scheduler = _scheduler(config, loaded, limits=limits, kv=kv, tier=tier, adapters=adapters)
    scheduler.cost.prime(warm_steps)
    return EngineCore(
        scheduler=scheduler,
        kv=kv,
        ranks=ranks,
        grammars=CompilePool(compiler, vocab_size=loaded.model.vocab_size),
        masks=MaskFiller(num_words=-(-loaded.model.vocab_size // 32)),
        info=_info(
            config,
            loaded,
            draft=draft,
            limits=limits,
            layout=layout,
            num_blocks=num_blocks,
            block_bytes=block_bytes,
            budget=budget,
            host_bytes=0 if tier is None else tier.total_bytes,
            others_bytes=others_bytes,
            load_time_s=load_time_s,
            warmup_time_s=warmup_time_s,
            adapters=() if adapters is None else tuple(adapters.reports()),
            device_detail=device_detail,
        ),
        adapters=adapters,
        device_memory=memory_of(loaded.device),
        is_async=bool(limits.async_scheduling),
        prepare=runner.record_next,
    )


def _make_runner(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    layout: CacheLayout,
    num_blocks: int,
    num_host_blocks: int,
    draft: Draft | None,
    adapters: AdapterHost | None,
    faults: FaultPoints | None,
    graph_bytes: int | None = None,
    is_alone: bool = True,
) -> Runner:
    return Runner(
        loaded,
        layout=layout,
        num_blocks=num_blocks,
        block_size=config.kv.block_size,
        num_host_blocks=num_host_blocks,
        faults=faults,
        num_adapter_slots=0 if adapters is None else config.lora.max_loras,
        adapter_weights=None if adapters is None else adapters.weights,
        make_drafter=None
        if draft is None
        else partial(draft.drafter, num_blocks=num_blocks, block_size=config.kv.block_size),
        make_graphs=_graphs_maker(config, loaded, max_bytes=graph_bytes),
        is_alone=is_alone,
    )


def _graphs_maker(
    config: EngineConfig, loaded: LoadedModel, *, max_bytes: int | None
) -> Callable[[KvPool], DecodeGraphs] | None:
    """Makes the recordings of decode steps, where there is a device to record and nobody forbids it."""
    if loaded.device.type != "cuda" or config.enforce_eager or config.tensor_parallel_size > 1:
        return None  # several ranks would have to record at the same time

    def make(pool: KvPool) -> DecodeGraphs:
        return DecodeGraphs(
            model=loaded.model,
            limits=GraphLimits(
                max_num_seqs=config.scheduler.max_num_seqs,
                max_model_len=loaded.max_model_len,
                block_size=pool.block_size,
                scratch_block=pool.scratch_block,
            ),
            device=loaded.device,
            recorder=CudaRecorder(loaded.device),
            max_bytes=max_bytes,
        )

    return make


def _refuse_eager_without_device(config: EngineConfig, chosen: DeviceChoice) -> None:
    if config.enforce_eager and chosen.device.type != "cuda":
        raise StartupError(
            "enforce_eager switches CUDA graphs off, but the model computes on the CPU "
            f"({chosen.reason}): leave it out",
            param="enforce_eager",
        )


def _ranks(
    runner: Runner,
    loaded: LoadedModel,
    *,
    limits: SchedulerConfig,
    started: StartedRanks | None,
    num_blocks: int,
) -> RankGroup:
    """Who computes; a CPU works beside the host only on a thread of its own."""
    if started is not None:
        return SeveralRanks(runner, started=started, num_blocks=num_blocks)
    rank = LocalRank(runner)
    return OverlappedRank(rank) if limits.async_scheduling and loaded.device.type == "cpu" else rank


def _resolved_limits(config: EngineConfig, loaded: LoadedModel) -> SchedulerConfig:
    """The limits with all that was left to the model and the device."""
    looks_ahead = config.scheduler.async_scheduling
    return msgspec.structs.replace(
        config.scheduler,
        max_model_len=loaded.max_model_len,
        async_scheduling=looks_ahead
        if looks_ahead is not None
        else loaded.device.type == "cuda" and config.tensor_parallel_size == 1,
    )


def _scheduler(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    limits: SchedulerConfig,
    kv: KvManager,
    tier: HostTier | None,
    adapters: AdapterHost | None,
) -> Scheduler:
    return Scheduler(
        limits,
        kv=kv,
        clock=SystemClock(),
        rng=random.SystemRandom(),
        connector=tier,
        vocab_size=loaded.model.vocab_size,
        proposer=_proposer(config.speculative),
        adapters=None if adapters is None else adapters.slots,
        num_labels=len(loaded.labels),
    )


def _device_budget(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    limits: SchedulerConfig,
    layout: CacheLayout,
    draft: Draft | None,
) -> DeviceBudget | None:
    """How a device's own memory is shared out, after a look at what steps take; None on the CPU."""
    memory = memory_of(loaded.device)
    share = config.kv.gpu_memory_utilization
    if memory is None:
        if share is not None:
            refuse_utilization(share)
        return None
    if config.tensor_parallel_size > 1:
        _check_ranks_memory(config.kv)
        return None
    memory.empty_cache()
    used_bytes = memory.used_bytes
    peaks = _measured_peaks(config, loaded, memory, limits=limits, layout=layout, draft=draft)
    memory.empty_cache()
    return DeviceBudget(
        total=memory.total_bytes,
        utilization=DEFAULT_UTILIZATION if share is None else share,
        used=used_bytes,
        activations=max(peaks),
        graphs=peaks.decodes + GRAPHS_OVERHEAD_BYTES,
    )


def _check_ranks_memory(kv: KvConfig) -> None:
    """What a step takes is measured on one rank alone, so several must be told what is theirs."""
    if kv.num_blocks is None and kv.kv_cache_memory_bytes is None:
        raise StartupError(
            "tensor_parallel_size above 1 on a device needs kv_cache_memory_bytes or num_kv_blocks",
            param="tensor_parallel_size",
        )


def _measured_peaks(
    config: EngineConfig,
    loaded: LoadedModel,
    memory: DeviceMemory,
    *,
    limits: SchedulerConfig,
    layout: CacheLayout,
    draft: Draft | None,
) -> StepPeaks:
    """With a runner of a few blocks, which is gone when this returns."""
    runner = _make_runner(
        config,
        loaded,
        layout=layout,
        num_blocks=PROFILE_BLOCKS_PER_GROUP * len(layout.groups),
        num_host_blocks=0,
        draft=draft,
        adapters=None,
        faults=None,
    )
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


def _num_blocks(
    config: KvConfig,
    limits: SchedulerConfig,
    *,
    layout: CacheLayout,
    block_bytes: int,
    budget: DeviceBudget | None,
) -> int:
    if budget is not None:
        return resolve_device_blocks(
            config,
            scheduler=limits,
            layout=layout,
            bytes_per_block=block_bytes,
            budget=budget,
            max_model_len=limits.max_model_len,
        )
    return resolve_num_blocks(
        config,
        scheduler=limits,
        layout=layout,
        bytes_per_block=block_bytes,
        free_memory_bytes=available_memory_bytes(),
        max_model_len=limits.max_model_len,
    )


def _host_tier(
    config: EngineConfig, loaded: LoadedModel, layout: CacheLayout, *, pool_bytes: int
) -> HostTier | None:
    """The offload tier; None if none is asked for."""
    size = config.kv.block_size
    num_bytes = bytes_per_block(layout, block=kv_block(loaded.kernels, loaded.kv_shape(block_size=size)))
    free_bytes = available_memory_bytes()
    if free_bytes is not None and loaded.device.type == "cpu":
        free_bytes -= pool_bytes
    num_slots = resolve_num_host_blocks(
        config.kv, layout=layout, bytes_per_block=num_bytes, free_memory_bytes=free_bytes
    )
    if not num_slots:
        return None
    return HostTier(
        num_slots=num_slots, num_groups=len(layout.groups), block_size=size, bytes_per_slot=num_bytes
    )


def _adapter_host(config: LoraConfig, loaded: LoadedModel) -> AdapterHost | None:
    """The adapters of the model, those of the command line loaded; None where they are not enabled."""
    sites = loaded.sites
    if sites is None:
        return None
    host = AdapterHost(
        config,
        sites=sites,
        prepare=partial(_prepare_adapter, loaded, num_sites=len(sites.sites)),
    )
    host.load_at_start(config.modules)
    return host


def _prepare_adapter(loaded: LoadedModel, pairs: dict[int, LowRankPair], *, num_sites: int) -> AdapterWeights:
    """On the model's device, in the form of its kernels."""
    placed = {site: pair.to(loaded.device) for site, pair in pairs.items()}
    return prepare_adapter(loaded.kernels, placed, num_sites=num_sites, dtype=loaded.dtype)


def _warm_up(ranks: RankGroup, limits: SchedulerConfig) -> tuple[list[TimedStep], float]:
    """What was run, and how many seconds it took in all."""
    began_s = time.monotonic()
    steps = ranks.warm_up(
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        max_model_len=limits.max_model_len,
    )
    return steps, time.monotonic() - began_s


def _proposer(config: SpeculativeConfig | None) -> Proposer | None:
    if config is None:
        return None
    if config.method == "draft_model":
        return RunnerGuesses(num_tokens_max=config.num_tokens)
    low, high = config.lookup
    return NgramProposer(num_min=low, num_max=high, num_tokens_max=config.num_tokens)


def _block_bytes(config: EngineConfig, loaded: LoadedModel, layout: CacheLayout, draft: Draft | None) -> int:
    size = config.kv.block_size
    shape = loaded.kv_shape(block_size=size)
    of_draft = draft_bytes_per_block(draft.loaded, draft.layout, block_size=size) if draft else 0
    return bytes_per_block(layout, block=kv_block(loaded.kernels, shape)) + of_draft


def _kv_manager(config: EngineConfig, loaded: LoadedModel, layout: CacheLayout, num_blocks: int) -> KvManager:
    return KvManager(
        layout,
        num_blocks=num_blocks,
        block_size=config.kv.block_size,
        model_revision=f"{config.model_revision} {loaded.quantization}",
        kv_dtype=str(loaded.kv_dtype),
        enable_prefix_caching=config.scheduler.enable_prefix_caching,
    )


def _info(
    config: EngineConfig,
    loaded: LoadedModel,
    *,
    draft: Draft | None,
    limits: SchedulerConfig,
    layout: CacheLayout,
    num_blocks: int,
    block_bytes: int,
    budget: DeviceBudget | None,
    host_bytes: int,
    others_bytes: int,
    load_time_s: float,
    warmup_time_s: float,
    adapters: tuple[AdapterReport, ...],
    device_detail: str,
) -> EngineInfo:
    return EngineInfo(
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=loaded.kernels.name,
        kernels_detail=loaded.kernels.detail,
        execution=loaded.execution,
        quantization=loaded.quantization,
        kv_cache_dtype=str(loaded.kv_dtype).removeprefix("torch."),
        num_threads=_num_threads(config),
        deterministic=config.deterministic,
        device=str(loaded.device),
        device_detail=device_detail,
        vocab_size=loaded.model.vocab_size,
        hidden_size=loaded.config.shape.hidden_size,
        labels=loaded.labels,
        weights_bytes=loaded.weights_bytes + others_bytes + (draft.loaded.weights_bytes if draft else 0),
        kv_bytes=num_blocks * block_bytes,
        bytes_per_block=block_bytes,
        kv_offload_bytes=host_bytes,
        device_bytes=budget.total if budget else 0,
        activation_bytes=budget.activations if budget else 0,
        graph_bytes=budget.graphs if budget else 0,
        block_size=config.kv.block_size,
        num_blocks=num_blocks,
        num_cache_groups=len(layout.groups),
        cache_group_windows=layout.windows,
        max_model_len=limits.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        load_time_s=load_time_s,
        warmup_time_s=warmup_time_s,
        async_scheduling=bool(limits.async_scheduling),
        speculation="none" if config.speculative is None else str(config.speculative),
        enable_lora=config.lora.enable_lora,
        adapters=adapters,
    )
