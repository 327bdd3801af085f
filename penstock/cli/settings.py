"""What `penstock serve` can be told: defaults < file < environment < flags, typed, checked, frozen.

Each room owns its config; `engine_config` and its siblings make those from `ServeSettings`. Nobody but
`build` receives the whole.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from penstock.cli.model_source import find_draft
from penstock.cli.setting import PowerOfTwo, Range, setting
from penstock.core.errors import StartupError
from penstock.engine.config import (
    GIB,
    MAX_BLOCK_SIZE,
    MAX_OFFLOADING_GIB,
    EngineConfig,
    KvConfig,
    LoraConfig,
    LoraModule,
    SchedulerConfig,
)
from penstock.text.pooling_config import PoolingConfig
from penstock.text.reading import ReadingConfig

ToolParserName = Literal[
    "auto",
    "none",
    "hermes",
    "llama3_json",
    "mistral",
    "pythonic",
    "qwen3_coder",
    "deepseek_v3",
    "deepseek_v31",
    "generic",
]
ReasoningParserName = Literal["auto", "none", "tags", "deepseek_r1", "qwen3", "glm45", "mistral", "seed_oss"]


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """Every setting of `penstock serve`; the flags bear vLLM's names where it has one."""

    host: Annotated[str, setting("Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1"
    port: Annotated[
        int, setting("Port to listen on; 0 takes a free one.", allowed=Range(low=0, high=65_535))
    ] = 8000
    served_model_name: Annotated[
        str | None, setting("Name that clients write in `model`; otherwise the hub id or folder name.")
    ] = None
    revision: Annotated[str | None, setting("Branch, tag or commit of the hub model.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"],
        setting("Type of weights and KV; auto takes the checkpoint's."),
    ] = "auto"
    kernels: Annotated[
        Literal["auto", "native", "eager", "reference", "triton"],
        setting(
            "Kernel set; native is C++ for bfloat16, eager fast torch, reference exact, triton for CUDA."
        ),
    ] = "auto"
    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        setting("Where the model computes; auto takes CUDA where torch sees a device and Triton is there."),
    ] = "auto"
    quantization: Annotated[
        Literal["none", "int8", "int4", "fp8"],
        setting(
            "Round the weights of products at load: int8 and fp8 have a scale an output, int4 one a group."
        ),
    ] = "none"
    quantization_group_size: Annotated[
        Literal[32, 64, 128], setting("Inputs that share a scale in int4.")
    ] = 128
    quantization_activations: Annotated[
        Literal["int8", "bf16"],
        setting(
            "Round the inputs of quantized products too, to int8 or fp8 (faster), or keep them in bfloat16."
        ),
    ] = "int8"
    kv_cache_dtype: Annotated[
        Literal["auto", "bfloat16", "int8", "fp8"],
        setting("Type of the KV cache; auto is the model's, int8 and fp8 (e4m3, not native) halve it."),
    ] = "auto"
    enforce_eager: Annotated[
        bool, setting("On a CUDA device, run every step launch by launch: no recorded graphs.")
    ] = False
    deterministic: Annotated[
        bool,
        setting("Make greedy answers independent of neighbours, chunks, prefix hits and threads."),
    ] = False
    max_model_len: Annotated[
        int | None,
        setting(
            "Most tokens of prompt and answer; otherwise the model's own.", allowed=Range(low=2, high=1 << 24)
        ),
    ] = None
    max_num_seqs: Annotated[int, setting("Most sequences in one step.", allowed=Range(low=1, high=4096))] = 64
    max_num_batched_tokens: Annotated[
        int,
        setting("Most tokens in one step; at least max_num_seqs.", allowed=Range(low=1, high=1 << 20)),
    ] = 2048
    step_time_target_ms: Annotated[
        float,
        setting(
            "A step with running answers takes about this many milliseconds at most: prompts are cut to fit.",
            allowed=Range(low=1, high=600_000),
        ),
    ] = 150.0
    decode_stretch: Annotated[
        float,
        setting(
            "A step that computes prompts beside running answers takes at most about so many times what the "
            "answers take alone; steps up to 50 ms are always allowed.",
            allowed=Range(low=1, high=1_000_000),
        ),
    ] = 2.0
    scheduling_policy: Annotated[
        Literal["fcfs", "priority", "fair"],
        setting(
            "Order of waiting requests; fair is priority, then least service among tenants, then arrival."
        ),
    ] = "fair"
    max_num_queued_reqs: Annotated[
        int,
        setting("Most requests that may wait; beyond it 429.", allowed=Range(low=1, high=1_000_000)),
    ] = 1024
    max_num_queued_tokens: Annotated[
        int,
        setting("Most prompt tokens that may wait; beyond it 429.", allowed=Range(low=1, high=1 << 40)),
    ] = 1_000_000
    enable_prefix_caching: Annotated[
        bool, setting("Keep the blocks of earlier prompts for later requests that begin alike.")
    ] = True
    enable_chunked_prefill: Annotated[
        bool,
        setting("Compute prompts in chunks beside running answers; off, each whole in one step."),
    ] = True
    enable_jump_forward: Annotated[
        bool,
        setting("Append the tokens that a grammar forces without a model step of their own."),
    ] = True
    async_scheduling: Annotated[
        bool | None,
        setting("Launch each step before the outcome of the last is known; on by default on a GPU alone."),
    ] = None
    block_size: Annotated[
        int,
        setting(
            "Token slots in a KV block; as many as max_model_len give each sequence its memory in one piece.",
            allowed=PowerOfTwo(low=1, high=MAX_BLOCK_SIZE),
        ),
    ] = 16
    num_kv_blocks: Annotated[
        int | None,
        setting(
            "Blocks in the KV pool; otherwise from kv_cache_memory_bytes.", allowed=Range(low=2, high=1 << 31)
        ),
    ] = None
    kv_cache_memory_bytes: Annotated[
        int | None,
        setting(
            "Bytes for the KV pool; otherwise a share of the free memory.", allowed=Range(low=1, high=1 << 50)
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float | None,
        setting(
            "Share of a CUDA device's memory that may be taken, above 0; otherwise 0.9. The KV pool gets "
            "what weights, activations and graphs leave of it.",
            allowed=Range(low=0, high=1),
        ),
    ] = None
    kv_offloading_size: Annotated[
        float,
        setting(
            "GiB of host memory for KV blocks beyond the pool: cached prefixes and preempted requests; 0 for "
            "none.",
            allowed=Range(low=0, high=MAX_OFFLOADING_GIB),
        ),
    ] = 0.0
    speculative_config: Annotated[
        dict[str, str | int] | None,
        setting(
            "Guess tokens ahead and verify them together; JSON or dotted flags: method (ngram, draft_model), "
            "model, num_speculative_tokens, prompt_lookup_min, prompt_lookup_max."
        ),
    ] = None
    num_threads: Annotated[
        int | None,
        setting(
            "Threads that compute; otherwise the CPUs this process may use.", allowed=Range(low=1, high=1024)
        ),
    ] = None
    thread_affinity: Annotated[
        str | None,
        setting("CPUs to pin the threads of the native kernels to, as 0-3,8; otherwise not pinned."),
    ] = None
    isa: Annotated[
        Literal["auto", "scalar", "avx2", "avx512", "amx_emulated", "amx"],
        setting("Instruction set of the native kernels; auto takes the best that the CPU has."),
    ] = "auto"
    enable_lora: Annotated[bool, setting("Let LoRA adapters act on the model's linear layers.")] = False
    lora_modules: Annotated[
        tuple[str, ...],
        setting("Adapters to load at start, each as name=folder (in the form of PEFT).", many=True),
    ] = ()
    lora_dir: Annotated[
        Path | None,
        setting("Folder of the adapter folders that the admin API may load, by their names."),
    ] = None
    max_loras: Annotated[
        int, setting("Most different adapters in one step.", allowed=Range(low=1, high=4096))
    ] = 64
    max_lora_rank: Annotated[int, setting("Largest rank of an adapter.", allowed=Range(low=1, high=1024))] = (
        64
    )
    max_cpu_loras: Annotated[
        int,
        setting(
            "Most adapters in memory, at least max_loras; others are read when they are asked for.",
            allowed=Range(low=1, high=1 << 20),
        ),
    ] = 256
    lora_memory_bytes: Annotated[
        int, setting("Most bytes of adapters in memory.", allowed=Range(low=1, high=1 << 50))
    ] = GIB
    tensor_parallel_size: Annotated[
        int,
        setting(
            "Ranks that share every layer, each a process; must divide num_key_value_heads.",
            allowed=Range(low=1, high=64),
        ),
    ] = 1
    chat_template: Annotated[
        Path | None, setting("File with a Jinja chat template in place of the model's.")
    ] = None
    enable_auto_tool_choice: Annotated[
        bool, setting("Let the model decide to call tools; off refuses tool_choice auto.")
    ] = True
    tool_call_parser: Annotated[
        ToolParserName,
        setting("How the model spells tool calls; auto reads it from the chat template."),
    ] = "auto"
    reasoning_parser: Annotated[
        ReasoningParserName,
        setting("How the model marks its thoughts; auto reads it from template and tokenizer."),
    ] = "auto"
    reasoning_start_str: Annotated[
        str, setting("With --reasoning-parser tags: what opens a thought, 1 to 64 characters.")
    ] = "<think>"
    reasoning_end_str: Annotated[
        str, setting("With --reasoning-parser tags: what closes a thought, 1 to 64 characters.")
    ] = "</think>"
    score_yes_token: Annotated[
        str,
        setting("Scores by a generative model: its answer to a fitting document, one token."),
    ] = "yes"  # noqa: S105 - a word, not a secret
    score_no_token: Annotated[
        str, setting("Scores by a generative model: its answer to any other, one token.")
    ] = "no"  # noqa: S105 - a word, not a secret
    api_key: Annotated[str | None, setting("Key that clients must send; none means open.")] = None
    admin_key: Annotated[
        str | None, setting("Key of the admin listener on 127.0.0.1; without one it is not opened.")
    ] = None
    admin_port: Annotated[
        int, setting("Port of the admin listener; 0 takes a free one.", allowed=Range(low=0, high=65_535))
    ] = 8001
    shutdown_timeout: Annotated[
        float,
        setting("Seconds that running requests get to finish at SIGTERM.", allowed=Range(low=0, high=86_400)),
    ] = 30.0
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], setting("Least severity of log lines.")
    ] = "info"
    config: Annotated[Path | None, setting("TOML or YAML file with settings by these names.")] = None


def reading_config(settings: ServeSettings) -> ReadingConfig:
    """How answers are read."""
    return ReadingConfig(
        enable_auto_tool_choice=settings.enable_auto_tool_choice,
        tool_call_parser=settings.tool_call_parser,
        reasoning_parser=settings.reasoning_parser,
        reasoning_start_str=settings.reasoning_start_str,
        reasoning_end_str=settings.reasoning_end_str,
    )


def pooling_config(settings: ServeSettings) -> PoolingConfig:
    """How prompts become scores."""
    return PoolingConfig(score_yes_token=settings.score_yes_token, score_no_token=settings.score_no_token)


def engine_config(settings: ServeSettings, *, model_path: Path, model_revision: str) -> EngineConfig:
    """The engine's part of the settings."""
    return EngineConfig(
        model_path=str(model_path),
        model_revision=model_revision,
        dtype=settings.dtype,
        kernels=settings.kernels,
        device=settings.device,
        enforce_eager=settings.enforce_eager,
        quantization=settings.quantization,
        quantization_group_size=settings.quantization_group_size,
        quantization_activations=settings.quantization_activations,
        thread_affinity=settings.thread_affinity,
        isa=settings.isa,
        deterministic=settings.deterministic,
        num_threads=settings.num_threads,
        max_model_len=settings.max_model_len,
        tensor_parallel_size=settings.tensor_parallel_size,
        log_level=settings.log_level,
        speculative=find_draft(settings.speculative_config),
        scheduler=SchedulerConfig(
            max_num_seqs=settings.max_num_seqs,
            max_num_batched_tokens=settings.max_num_batched_tokens,
            step_time_target_ms=settings.step_time_target_ms,
            decode_stretch=settings.decode_stretch,
            max_num_queued_reqs=settings.max_num_queued_reqs,
            max_num_queued_tokens=settings.max_num_queued_tokens,
            enable_prefix_caching=settings.enable_prefix_caching,
            enable_chunked_prefill=settings.enable_chunked_prefill,
            enable_jump_forward=settings.enable_jump_forward,
            async_scheduling=settings.async_scheduling,
            policy=settings.scheduling_policy,
        ),
        kv=KvConfig(
            block_size=settings.block_size,
            cache_dtype=settings.kv_cache_dtype,
            num_blocks=settings.num_kv_blocks,
            kv_cache_memory_bytes=settings.kv_cache_memory_bytes,
            gpu_memory_utilization=settings.gpu_memory_utilization,
            offloading_bytes=int(settings.kv_offloading_size * GIB),
        ),
        lora=lora_config(settings),
    )


def lora_config(settings: ServeSettings) -> LoraConfig:
    """The engine's part of the settings about adapters.

    Raises:
        StartupError: a module is not name=folder, or `lora_dir` is no folder or of no use.
    """
    folder = settings.lora_dir
    if folder is not None and not settings.enable_lora:
        raise StartupError("lora_dir is set, which needs enable_lora", param="lora_dir")
    if folder is not None and not folder.is_dir():
        raise StartupError(f"lora_dir is {str(folder)!r:.200}, there is no such folder", param="lora_dir")
    return LoraConfig(
        enable_lora=settings.enable_lora,
        modules=lora_modules(settings.lora_modules),
        max_loras=settings.max_loras,
        max_lora_rank=settings.max_lora_rank,
        max_cpu_loras=settings.max_cpu_loras,
        lora_memory_bytes=settings.lora_memory_bytes,
    )


def lora_modules(given: tuple[str, ...]) -> tuple[LoraModule, ...]:
    """Adapters by name and folder, from `name=folder` each.

    Raises:
        StartupError: one is not of this form.
    """
    modules = []
    for text in given:
        name, _, path = text.partition("=")
        if not name or not path:
            raise StartupError(
                f"lora_modules has {text!r:.200}, it must be name=folder", param="lora_modules"
            )
        modules.append(LoraModule(name=name, path=path))
    return tuple(modules)
