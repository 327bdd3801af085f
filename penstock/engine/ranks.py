"""Who computes: a rank's runner, and the group of all ranks.

`build` makes the first rank's runner and the group, `follower` the runner of a rank beside the first, and
`memory_plan` one of a few blocks to measure with.
"""

from collections.abc import Callable
from functools import partial

from penstock.engine.config import EngineConfig
from penstock.engine.loaded_engine import LoadedEngine
from penstock.engine.lora.host import AdapterHost
from penstock.engine.runner.cuda_graphs import CudaRecorder, DecodeGraphs, GraphLimits
from penstock.engine.runner.faults import FaultPoints
from penstock.engine.runner.kv_pool import KvPool
from penstock.engine.runner.overlapped_rank import OverlappedRank
from penstock.engine.runner.rank_group import LocalRank, RankGroup
from penstock.engine.runner.rank_processes import SeveralRanks, StartedRanks
from penstock.engine.runner.runner import Runner
from penstock.engine.runner.samplers import device_sampler
from penstock.kernels.adapters import AdapterLimits, AdapterTables, RecordsAdapters
from penstock.models.interface import LoadedModel


def make_runner(
    engine: LoadedEngine,
    *,
    num_blocks: int,
    num_host_blocks: int = 0,
    adapters: AdapterHost | None = None,
    faults: FaultPoints | None = None,
    graph_bytes: int | None = None,
    is_alone: bool = True,
) -> Runner:
    """The runner of the first rank.

    Args:
        engine: what it computes with.
        num_blocks: of its pool.
        num_host_blocks: of the offload tier; 0 if there is none.
        adapters: None where they are not enabled.
        faults: where tests make it fail.
        graph_bytes: that recorded steps may take; None for no limit.
        is_alone: False if there are other ranks.
    """
    config, draft, size = engine.config, engine.draft, engine.config.kv.block_size
    return Runner(
        engine.loaded,
        layout=engine.layout,
        num_blocks=num_blocks,
        block_size=size,
        num_host_blocks=num_host_blocks,
        device_sampler=device_sampler(engine.loaded),
        faults=faults,
        num_adapter_slots=0 if adapters is None else config.lora.max_loras,
        adapter_weights=None if adapters is None else adapters.weights,
        make_drafter=None
        if draft is None
        else partial(draft.drafter, num_blocks=num_blocks, block_size=size),
        make_graphs=_graphs_maker(config, engine.loaded, max_bytes=graph_bytes),
        is_alone=is_alone,
    )


def make_following_runner(config: EngineConfig, loaded: LoadedModel, *, num_blocks: int) -> Runner:
    """The runner of a rank beside the first."""
    engine = LoadedEngine.over(config, loaded=loaded, draft_model=None)
    return make_runner(engine, num_blocks=num_blocks, is_alone=False)


def make_ranks(
    runner: Runner, engine: LoadedEngine, *, started: StartedRanks | None, num_blocks: int
) -> RankGroup:
    """All ranks, `runner` the first's; a CPU works beside the host only on a thread of its own."""
    if started is not None:
        return SeveralRanks(runner, started=started, num_blocks=num_blocks)
    rank = LocalRank(runner)
    is_overlapped = engine.limits.async_scheduling and engine.loaded.device.type == "cpu"
    return OverlappedRank(rank) if is_overlapped else rank


def _graphs_maker(
    config: EngineConfig, loaded: LoadedModel, *, max_bytes: int | None
) -> Callable[[KvPool], DecodeGraphs] | None:
    """Makes the recordings of decode steps, where there is a device to record and nobody forbids it."""
    if loaded.device.type != "cuda" or config.enforce_eager or config.tensor_parallel_size > 1:
        return None  # several ranks would have to record at the same time

    def make(pool: KvPool) -> DecodeGraphs:
        return DecodeGraphs(
            model=loaded.model,
            kernels=loaded.kernels,
            limits=GraphLimits(
                max_num_seqs=config.scheduler.max_num_seqs,
                max_model_len=loaded.max_model_len,
                block_size=pool.block_size,
                scratch_block=pool.scratch_block,
            ),
            device=loaded.device,
            recorder=CudaRecorder(loaded.device),
            adapters=_adapter_tables(config, loaded),
            max_bytes=max_bytes,
        )

    return make


def _adapter_tables(config: EngineConfig, loaded: LoadedModel) -> AdapterTables | None:
    """What recorded steps read of their adapters; None if there are none, or the home cannot record them."""
    if loaded.sites is None or not isinstance(loaded.kernels, RecordsAdapters):
        return None
    limits = AdapterLimits(
        max_rows=config.scheduler.max_num_seqs,
        max_adapters=config.lora.max_loras,
        max_rank=config.lora.max_lora_rank,
    )
    return loaded.kernels.adapter_tables(limits, num_sites=len(loaded.sites.sites), dtype=loaded.dtype)
