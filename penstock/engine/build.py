"""From an `EngineConfig` to a warm `EngineCore`.

Runs inside the engine process (or, for tests and the offline API, in the caller's). The order is: load the
weights (`loading`), lay out the cache (`loaded_engine`), size the pool (`memory_plan`), join the parts, warm
up (`ranks`), and say what came of it (`engine_info`).
"""

import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from penstock.core.errors import StartupError
from penstock.engine.config import (
    EngineConfig,
    LoraConfig,
    SchedulerConfig,
    SpeculativeConfig,
    validate_engine_config,
)
from penstock.engine.core import EngineCore
from penstock.engine.engine_info import describe
from penstock.engine.grammar.bitmask import MaskFiller
from penstock.engine.grammar.compile_pool import CompilePool
from penstock.engine.grammar.compiler import GrammarCompiler
from penstock.engine.kv.kv_manager import KvManager
from penstock.engine.loaded_engine import LoadedEngine
from penstock.engine.loading import load_draft, load_part
from penstock.engine.lora.host import AdapterHost
from penstock.engine.memory_plan import MemoryPlan, plan_memory
from penstock.engine.ranks import make_ranks, make_runner
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.rank_group import RankGroup
from penstock.engine.runner.rank_processes import StartedRanks
from penstock.engine.scheduler.cost import TimedStep
from penstock.engine.scheduler.drafting import Proposer, RunnerGuesses
from penstock.engine.scheduler.scheduler import Scheduler
from penstock.engine.spec.ngram import NgramProposer
from penstock.kernels.adapters import AdapterWeights, LowRankPair
from penstock.kernels.devices import DeviceChoice, choose_device
from penstock.kernels.ops import prepare_adapter
from penstock.models.interface import LoadedModel
from penstock.observe.clock import SystemClock
from penstock.parallel.rank import ALONE


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
    rank = ALONE if started is None else started.join(device=chosen.device)
    loaded = load_part(config, rank=rank, device=chosen.device, on_progress=on_progress)
    load_time_s = time.monotonic() - began_s
    draft_model = load_draft(config, target=loaded)
    return _join(
        LoadedEngine.over(config, loaded=loaded, draft_model=draft_model),
        load_time_s=load_time_s,
        faults=faults,
        device_detail=chosen.detail,
        started=started,
    )


def _refuse_eager_without_device(config: EngineConfig, chosen: DeviceChoice) -> None:
    if config.enforce_eager and chosen.device.type != "cuda":
        raise StartupError(
            "enforce_eager switches CUDA graphs off, but the model computes on the CPU "
            f"({chosen.reason}): leave it out",
            param="enforce_eager",
        )


def _join(
    engine: LoadedEngine,
    *,
    load_time_s: float,
    faults: FaultPoints | None,
    device_detail: str,
    started: StartedRanks | None,
) -> EngineCore:
    config, loaded, limits = engine.config, engine.loaded, engine.limits
    others_bytes = 0 if started is None else started.wait_loaded()
    plan = plan_memory(engine)
    adapters = _adapter_host(config.lora, loaded)
    runner = make_runner(
        engine,
        num_blocks=plan.num_blocks,
        num_host_blocks=plan.num_host_blocks,
        adapters=adapters,
        faults=faults,
        graph_bytes=plan.graph_bytes,
        is_alone=started is None,
    )
    ranks = make_ranks(runner, engine, started=started, num_blocks=plan.num_blocks)
    warm_steps, warmup_time_s = _warm_up(ranks, limits) if config.warmup else ([], 0.0)
    kv = _kv_manager(engine, num_blocks=plan.num_blocks)
    scheduler = _scheduler(engine, plan=plan, kv=kv, adapters=adapters)
    scheduler.cost.prime(warm_steps)
    return EngineCore(
        scheduler=scheduler,
        kv=kv,
        ranks=ranks,
        grammars=CompilePool(GrammarCompiler(Path(config.model_path)), vocab_size=loaded.model.vocab_size),
        masks=MaskFiller(num_words=-(-loaded.model.vocab_size // 32)),
        info=describe(
            engine,
            plan=plan,
            device_detail=device_detail,
            others_bytes=others_bytes,
            load_time_s=load_time_s,
            warmup_time_s=warmup_time_s,
            adapters=() if adapters is None else tuple(adapters.reports()),
        ),
        adapters=adapters,
        device_memory=plan.device_memory,
        is_async=bool(limits.async_scheduling),
        prepare=runner.record_next,
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


def _kv_manager(engine: LoadedEngine, *, num_blocks: int) -> KvManager:
    config, loaded = engine.config, engine.loaded
    return KvManager(
        engine.layout,
        num_blocks=num_blocks,
        block_size=config.kv.block_size,
        model_revision=f"{config.model_revision} {loaded.quantization}",
        kv_dtype=str(loaded.kv_dtype),
        enable_prefix_caching=config.scheduler.enable_prefix_caching,
    )


def _scheduler(
    engine: LoadedEngine, *, plan: MemoryPlan, kv: KvManager, adapters: AdapterHost | None
) -> Scheduler:
    return Scheduler(
        engine.limits,
        kv=kv,
        clock=SystemClock(),
        rng=random.SystemRandom(),
        connector=plan.tier,
        vocab_size=engine.loaded.model.vocab_size,
        proposer=_proposer(engine.config.speculative),
        adapters=None if adapters is None else adapters.slots,
        num_labels=len(engine.loaded.labels),
    )


def _proposer(config: SpeculativeConfig | None) -> Proposer | None:
    if config is None:
        return None
    if config.method == "draft_model":
        return RunnerGuesses(num_tokens_max=config.num_tokens)
    low, high = config.lookup
    return NgramProposer(num_min=low, num_max=high, num_tokens_max=config.num_tokens)
