"""Weights: a rank's part of the model, and the draft model, on kernels that the config names.

`build` calls it for the first rank and `follower` for those beside it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch

from penstock.engine.config import EngineConfig, read_affinity
from penstock.engine.spec.vocabulary import check_same_tokens
from penstock.kernels.cpu.extension import default_num_threads
from penstock.kernels.options import KernelOptions, KvCacheDtype
from penstock.kernels.quantization import Activations, Method, Quantization
from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from penstock.parallel.rank import Rank


def num_threads_of(config: EngineConfig) -> int:
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
    num_threads = num_threads_of(config)
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


def load_draft(config: EngineConfig, *, target: LoadedModel) -> LoadedModel | None:
    """The draft model, if one is asked for, on the threads of the model's own kernels.

    Raises:
        StartupError: as `check_same_tokens` and `load_model`.
    """
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
        options=kernel_options(config, num_threads=num_threads_of(config)),
        kernel_set=target.kernels,
    )


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
