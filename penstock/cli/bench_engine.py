"""`penstock bench offline` and `kernels`: what runs the engine or its operations in this process."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from penstock.bench.compare.report import write_record
from penstock.bench.machine_limits import measure_limits
from penstock.bench.offline import OfflineSizes, offline_record, offline_table, run_offline
from penstock.cli.bench_options import (
    MAX_BATCH,
    Model,
    Output,
    Rounds,
    Seed,
    Threads,
    command_line,
    numbers,
    results,
    tell,
    threads_or_all,
)
from penstock.cli.model_source import find_model
from penstock.cli.setting import Range, setting
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, SchedulerConfig, validate_engine_config


def offline(
    model: Model = None,
    *,
    prompt_tokens: Annotated[
        int, setting("Tokens of each prompt.", allowed=Range(low=1, high=1 << 20))
    ] = 512,
    output_tokens: Annotated[
        int, setting("Tokens of each answer, at least 2.", allowed=Range(low=2, high=1 << 20))
    ] = 64,
    batch_sizes: Annotated[str, Parameter(help="Requests at once, with commas.")] = "1,2,4,8,16,32,64",
    rounds: Rounds = 3,
    seed: Seed = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    kernels: Literal["auto", "eager", "reference"] = "auto",
    num_threads: Threads = None,
    limits: Annotated[
        bool, Parameter(help="Measure the machine's read bandwidth and multiply peak first.")
    ] = True,
    output: Output = None,
) -> int:
    """The engine alone: tokens per second and step times, prefill and decode apart."""
    sizes = OfflineSizes(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch_sizes=numbers(batch_sizes, param="batch_sizes"),
        rounds=rounds,
        seed=seed,
    )
    source = find_model(model)
    threads = threads_or_all(num_threads)
    config = EngineConfig(
        model_path=str(source.path),
        model_revision=source.revision,
        dtype=dtype,
        kernels=kernels,
        num_threads=threads,
        max_model_len=prompt_tokens + output_tokens,
        scheduler=_offline_limits(sizes),
    )
    validate_engine_config(config)
    return _run_offline(config, sizes=sizes, model=source.name, with_limits=limits, output=output)


def _offline_limits(sizes: OfflineSizes) -> SchedulerConfig:
    """Room for the largest batch; nobody watches the tokens come, so no prompt is cut for others."""
    return SchedulerConfig(
        max_num_seqs=max(sizes.batch_sizes),
        max_num_batched_tokens=max(2048, *sizes.batch_sizes),
        max_num_queued_tokens=1 << 40,
        max_num_queued_reqs=MAX_BATCH,
        step_time_target_ms=10_000.0,
        decode_stretch=1000.0,
        enable_prefix_caching=False,
    )


def _run_offline(
    config: EngineConfig, *, sizes: OfflineSizes, model: str, with_limits: bool, output: Path | None
) -> int:
    found = measure_limits(num_threads=config.num_threads or 1) if with_limits else None
    core = build_core(config)
    rows = run_offline(core, sizes, tell=tell)
    record = offline_record(
        rows, sizes=sizes, info=core.info, limits=found, model=model, command=command_line()
    )
    if output is not None:
        write_record(record, output)
    results().print(offline_table(rows, info=core.info, limits=found))
    return 0
