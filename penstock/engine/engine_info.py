"""What an engine says about itself once it is warm; `build` asks for it last."""

from penstock.core.tokens import AdapterReport, EngineInfo
from penstock.engine.loaded_engine import LoadedEngine
from penstock.engine.loading import num_threads_of
from penstock.engine.memory_plan import MemoryPlan


def describe(
    engine: LoadedEngine,
    *,
    plan: MemoryPlan,
    device_detail: str,
    others_bytes: int,
    load_time_s: float,
    warmup_time_s: float,
    adapters: tuple[AdapterReport, ...],
) -> EngineInfo:
    """Facts of an engine for answers, metrics and the log.

    Args:
        engine: what it was built from.
        plan: what its memory was shared out to.
        device_detail: the device in words.
        others_bytes: weights that the ranks beside the first hold.
        load_time_s: seconds that the weights took.
        warmup_time_s: seconds that the warm-up took.
        adapters: loaded at the start.
    """
    config, loaded, layout, limits = engine.config, engine.loaded, engine.layout, engine.limits
    draft, budget = engine.draft, plan.budget
    return EngineInfo(
        architecture=loaded.architecture,
        num_parameters=loaded.num_parameters,
        dtype=str(loaded.dtype).removeprefix("torch."),
        kernels=loaded.kernels.name,
        kernels_detail=loaded.kernels.detail,
        execution=loaded.execution,
        quantization=loaded.quantization,
        kv_cache_dtype=str(loaded.kv_dtype).removeprefix("torch."),
        num_threads=num_threads_of(config),
        deterministic=config.deterministic,
        device=str(loaded.device),
        device_detail=device_detail,
        vocab_size=loaded.model.vocab_size,
        hidden_size=loaded.config.shape.hidden_size,
        labels=loaded.labels,
        weights_bytes=loaded.weights_bytes + others_bytes + (draft.loaded.weights_bytes if draft else 0),
        kv_bytes=plan.kv_bytes,
        bytes_per_block=plan.block_bytes,
        kv_offload_bytes=0 if plan.tier is None else plan.tier.total_bytes,
        device_bytes=budget.total if budget else 0,
        activation_bytes=budget.activations if budget else 0,
        graph_bytes=budget.graphs if budget else 0,
        block_size=config.kv.block_size,
        num_blocks=plan.num_blocks,
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
