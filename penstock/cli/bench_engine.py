"""`penstock bench offline` and `kernels`: what runs the engine or its operations in this process."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from penstock.bench.compare.report import write_record
from penstock.bench.kernel_bench import FORMATS, OPERATIONS, SHAPES, make_cases, measure
from penstock.bench.kernel_bench import make_table as kernel_table
from penstock.bench.machine import environment
from penstock.bench.machine_limits import MachineLimits, measure_limits
from penstock.bench.offline import OfflineSizes, offline_record, offline_table, run_offline
from penstock.cli.bench_options import (
    MAX_BATCH,
    Model,
    Output,
    Rounds,
    Seed,
    Threads,
    check_file,
    command_line,
    numbers,
    results,
    tell,
    threads_or_all,
    until_interrupted,
    words,
)
from penstock.cli.model_source import find_model
from penstock.cli.setting import Range, setting
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, SchedulerConfig, validate_engine_config
from penstock.kernels.ops import KernelSet
from penstock.kernels.options import KernelOptions
from penstock.kernels.registry import select_kernels

Quantization = Annotated[Literal["none", "int8", "int4", "fp8"], Parameter(help="Of the weights.")]
GroupSize = Annotated[int, setting("Inputs that share a scale in int4: 32, 64 or 128.")]
Activations = Annotated[
    Literal["int8", "bf16"], Parameter(help="Inputs of quantized products, rounded to int8 or not.")
]


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
    kernels: Literal["auto", "native", "eager", "reference", "triton"] = "auto",
    quantization: Quantization = "none",
    quantization_group_size: GroupSize = 128,
    quantization_activations: Activations = "int8",
    num_threads: Threads = None,
    async_scheduling: Annotated[
        bool | None, Parameter(help="Launch each step before the outcome of the last is known.")
    ] = None,
    limits: Annotated[
        bool, Parameter(help="Measure the machine's read bandwidth and multiply peak first.")
    ] = True,
    output: Output = None,
) -> int:
    """The engine alone: tokens per second and step times, prefill and decode apart."""
    check_file(output, param="output")
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
        quantization=quantization,
        quantization_group_size=quantization_group_size,
        quantization_activations=quantization_activations,
        num_threads=threads,
        max_model_len=prompt_tokens + output_tokens,
        scheduler=_offline_limits(sizes, async_scheduling=async_scheduling),
    )
    validate_engine_config(config)
    return _run_offline(config, sizes=sizes, model=source.name, with_limits=limits, output=output)


def _offline_limits(sizes: OfflineSizes, *, async_scheduling: bool | None) -> SchedulerConfig:
    """Room for the largest batch; nobody watches the tokens come, so no prompt is cut for others."""
    return SchedulerConfig(
        max_num_seqs=max(sizes.batch_sizes),
        max_num_batched_tokens=max(2048, *sizes.batch_sizes),
        max_num_queued_tokens=1 << 40,
        max_num_queued_reqs=MAX_BATCH,
        step_time_target_ms=10_000.0,
        decode_stretch=1000.0,
        enable_prefix_caching=False,
        async_scheduling=async_scheduling,
    )


def _run_offline(
    config: EngineConfig, *, sizes: OfflineSizes, model: str, with_limits: bool, output: Path | None
) -> int:
    found = measure_limits(num_threads=config.num_threads or 1) if with_limits else None
    core = build_core(config)

    def keep(so_far: Sequence[dict[str, float]]) -> None:
        if output is not None:
            head = {"model": model, "command": command_line()}
            write_record(offline_record(so_far, sizes=sizes, info=core.info, limits=found, **head), output)

    rows, code = until_interrupted(run_offline(core, sizes, tell=tell), keep=keep)
    results().print(offline_table(rows, info=core.info, limits=found))
    return code


# -- the kernels ---------------------------------------------------------------------------------------------


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSettings:
    """Options of `kernels`."""

    shapes: Annotated[str, Parameter(help=f"Sizes of these models, with commas: {', '.join(SHAPES)}.")] = (
        "qwen2.5-0.5b"
    )
    operations: Annotated[str, Parameter(help=f"With commas: {', '.join(OPERATIONS)}.")] = ",".join(
        OPERATIONS
    )
    formats: Annotated[str, Parameter(help=f"Of the weights, with commas: {', '.join(FORMATS)}.")] = ",".join(
        FORMATS
    )
    rows: Annotated[str, Parameter(help="Tokens in a step, with commas.")] = "1,16,64,512"
    kernels: Literal["auto", "native", "eager", "reference", "triton"] = "auto"
    isa: Annotated[
        Literal["auto", "scalar", "avx2", "avx512", "amx_emulated", "amx"],
        Parameter(help="Instruction set of the native kernels; auto takes the best."),
    ] = "auto"
    num_threads: Threads = None
    seconds: Annotated[float, setting("Time for each case.", allowed=Range(low=0.001, high=60))] = 0.2
    output: Output = None

    def check(self) -> None:
        """Refuse a wrong option before anything is measured.

        Raises:
            InvalidParameterError: a word or a number is wrong.
            StartupError: `output` cannot be written.
        """
        words(self.operations, param="operations", known=OPERATIONS)
        words(self.formats, param="formats", known=FORMATS)
        numbers(self.rows, param="rows")
        check_file(self.output, param="output")


def kernels(*, settings: KernelSettings | None = None) -> int:
    """Each operation alone: GB/s, operations per second, and the share of the machine's measured limits.

    Raises:
        StartupError: the kernels cannot run here with these options; the message says why.
    """
    chosen = settings or KernelSettings()
    threads = threads_or_all(chosen.num_threads)
    torch.set_num_threads(threads)
    shapes = words(chosen.shapes, param="shapes", known=tuple(SHAPES))
    chosen.check()
    home = select_kernels(
        chosen.kernels,
        device="cpu",
        dtype=torch.bfloat16,
        options=KernelOptions(num_threads=threads, isa=chosen.isa),
    )
    limits = measure_limits(num_threads=threads, isa=chosen.isa)
    head: dict[str, object] = {
        "benchmark": "kernels",
        "command": command_line(),
        "environment": environment(packages=("penstock", "torch")),
        "kernels": home.name,
        "limits": limits.record(),
    }
    rows: dict[str, list[dict[str, object]]] = {}
    for name in shapes:

        def keep(so_far: Sequence[dict[str, object]], name: str = name) -> None:
            rows[name] = list(so_far)
            if chosen.output is not None:
                write_record({**head, "shapes": rows}, chosen.output)

        measured = _measured(home, name, chosen=chosen, limits=limits)
        found, code = until_interrupted(measured, keep=keep)
        title = f"{name}, kernels {home.name}, {limits.isa}, {threads} threads; at best {_best(limits)}"
        results().print(kernel_table(found, title=title))
        if code:
            return code
    return 0


def _best(limits: MachineLimits) -> str:
    return f"{limits.read_gb_per_s:.1f} GB/s, bf16 {limits.bf16_tflops:.2f}, int8 {limits.int8_tops:.2f} T/s"


def _measured(
    home: KernelSet, name: str, *, chosen: KernelSettings, limits: MachineLimits
) -> Iterator[dict[str, object]]:
    formats = words(chosen.formats, param="formats", known=FORMATS)
    cases = make_cases(
        home,
        SHAPES[name],
        operations=words(chosen.operations, param="operations", known=OPERATIONS),
        formats=[each for each in FORMATS if each in formats],
        rows=numbers(chosen.rows, param="rows"),
    )
    for case in cases:
        yield measure(home, case, seconds=chosen.seconds).row(limits)
