"""What the engine is told at start, and the limits it lives by."""

import re
from collections.abc import Mapping
from typing import Final, Literal, NoReturn

import msgspec

from penstock.core.errors import StartupError

DTYPES: Final = ("auto", "float32", "bfloat16")
DEVICES: Final = ("auto", "cpu", "cuda")
KERNELS: Final = ("auto", "native", "reference", "eager", "triton")
QUANTIZATIONS: Final = ("none", "int8", "int4", "fp8")
QUANTIZATION_GROUP_SIZES: Final = (32, 64, 128)
DEFAULT_GROUP_SIZE: Final = 128
QUANTIZATION_ACTIVATIONS: Final = ("int8", "bf16")
KV_CACHE_DTYPES: Final = ("auto", "bfloat16", "int8", "fp8")
ISAS: Final = ("auto", "scalar", "avx2", "avx512", "amx_emulated", "amx")
MAX_CPU: Final = 4095
AFFINITY_PART: Final = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
NGRAM_TOKENS: Final = 12
DRAFT_MODEL_TOKENS: Final = 6
MAX_SPECULATIVE_TOKENS: Final = 32
LOOKUP_MIN: Final = 3
LOOKUP_MAX: Final = 8
MAX_LOOKUP: Final = 64
MAX_RANKS: Final = 64
SPECULATIVE_METHODS: Final = ("ngram", "draft_model")
SHOWN_CHARS: Final = 100
"""Of a wrong value, in the message about it."""
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
GIB: Final = 1 << 30
DEFAULT_UTILIZATION: Final = 0.9
MAX_OFFLOADING_GIB: Final = 1 << 20
MAX_MODEL_LEN: Final = 1 << 24
MAX_BLOCK_SIZE: Final = MAX_MODEL_LEN
"""A block may hold a whole context: each sequence then owns its memory in one piece from start to end,
as engines without paging have it; `bench ladder` measures that. Useful sizes are 8 to 64."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of one step and of the queue."""

    max_num_seqs: int = 64
    """Sequences in one step, 1 to 4096."""
    max_num_batched_tokens: int = 2048
    """Tokens in one step, at least `max_num_seqs`."""
    max_model_len: int = 4096
    """Tokens of prompt and answer together."""
    step_time_target_ms: float = 150.0
    """A step with running decodes takes at most about this long: the prefill chunk is cut to fit."""
    decode_stretch: float = 2.0
    """A step that computes prompts beside running decodes takes at most about so many times what the decodes
    take alone (but steps up to 50 ms are always allowed); at least 1, large for throughput alone."""
    max_num_queued_reqs: int = 1024
    """Requests that may wait; beyond it `QueueFullError` (429)."""
    max_num_queued_tokens: int = 1_000_000
    """Prompt tokens that may wait; beyond it `QueueFullError` (429)."""
    enable_prefix_caching: bool = True
    """Keep full blocks in the prefix tree for later requests."""
    enable_chunked_prefill: bool = True
    """Compute a prompt in chunks that fit beside running decodes; False computes each whole in one step,
    however long the others wait, and needs `max_num_batched_tokens` of at least `max_model_len`."""
    enable_jump_forward: bool = True
    """Append the tokens that a grammar forces without a model step of their own."""
    async_scheduling: bool | None = None
    """Plan and launch a step before the outcome of the one before it is known; None does so on `cuda`."""
    max_preemptions: int = 3
    """After so many preemptions a request is protected from further ones."""
    policy: Literal["fcfs", "priority", "fair"] = "fair"
    """Order of waiting requests; `fair` is tier, then least service among tenants, then arrival."""


class KvConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The pool of KV blocks."""

    block_size: int = 16
    """Token slots in a block; a power of two from 1 to `MAX_BLOCK_SIZE`."""
    cache_dtype: str = "auto"
    """`auto` keeps keys and values in the model's dtype; `bfloat16`; `int8` with a scale a token and head."""
    num_blocks: int | None = None
    """Size of the pool; None derives it from `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: int | None = None
    """Memory for the pool; None takes a share of the free memory, at most what `max_num_seqs` full
    contexts could use."""
    gpu_memory_utilization: float | None = None
    """Share of a CUDA device's memory that may be taken once the pool is there, above 0, at most 1; None is
    0.9. The pool gets what weights, activations and graphs leave of it."""
    offloading_bytes: int = 0
    """Host memory for blocks beyond the pool; 0 for none."""


class SpeculativeConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who guesses tokens ahead; names as in vLLM's `speculative_config`."""

    method: Literal["ngram", "draft_model"]
    """`ngram` looks the last tokens up in the text so far; `draft_model` asks a smaller model."""
    model: str = ""
    """Local folder of the draft model; for `draft_model` alone."""
    num_speculative_tokens: int | None = None
    """Most guesses for one sequence in a step, 1 to 32; each step takes as many as pay. None takes 12 for
    `ngram`, whose guesses are free, and 6 for a model."""
    prompt_lookup_min: int | None = None
    """Tokens that must match at least, 1 to `prompt_lookup_max`; `ngram` alone. None takes 3, or
    `prompt_lookup_max` where that is less."""
    prompt_lookup_max: int | None = None
    """Tokens beyond which a longer match counts no more, to 64; `ngram` alone. None takes 8, or
    `prompt_lookup_min` where that is more."""

    @property
    def num_tokens(self) -> int:
        """Most guesses for one sequence in a step, resolved."""
        if self.num_speculative_tokens is not None:
            return self.num_speculative_tokens
        return NGRAM_TOKENS if self.method == "ngram" else DRAFT_MODEL_TOKENS

    @property
    def lookup(self) -> tuple[int, int]:
        """`prompt_lookup_min` and `prompt_lookup_max`, resolved."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is None:
            low = min(LOOKUP_MIN, high or LOOKUP_MIN)
        return low, high or max(LOOKUP_MAX, low)

    def __str__(self) -> str:
        who = (
            f"lookup of {self.lookup[0]} to {self.lookup[1]} tokens" if self.method == "ngram" else "a model"
        )
        return f"{self.method}, up to {self.num_tokens} drafts ({who})"


class LoraModule(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter by name and folder."""

    name: str
    path: str
    """Folder in the form of PEFT."""
    allow_links: bool = True
    """Its files may be symbolic links; not where a client of the admin API named the folder."""
    revision: str = ""
    """Hash of its files if it was loaded before the engine's restart: it is read when it is asked for."""


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True):
    """LoRA adapters on the model."""

    enable_lora: bool = False
    """Record passes with adapters, and accept requests for them."""
    modules: tuple[LoraModule, ...] = ()
    """Loaded at start."""
    max_loras: int = 64
    """Different adapters in one step, 1 to 4096."""
    max_lora_rank: int = 64
    """Largest rank, 1 to 1024."""
    max_cpu_loras: int = 256
    """Adapters in memory, at least `max_loras`; others are read when they are asked for."""
    lora_memory_bytes: int = 1 << 30
    """Bytes of the adapters in memory."""


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All an engine process needs to start; serialisable, so that it crosses to the child process."""

    model_path: str
    """Local folder of the checkpoint, already downloaded."""
    model_revision: str = ""
    """Content or commit id of the checkpoint, part of the prefix key."""
    dtype: str = "auto"
    """`auto` takes the checkpoint's (float32 for float32, else bfloat16), or float32, bfloat16."""
    kernels: str = "auto"
    """`auto`, `native` (C++, bfloat16), `eager` (fast torch) or `reference` (obvious, batch-invariant)."""
    quantization: str = "none"
    """`none`, `int8` (a scale an output) or `int4` (a scale an output and group of inputs)."""
    quantization_group_size: int = 128
    """Inputs that share a scale in int4: 32, 64 or 128."""
    quantization_activations: str = "int8"
    """`int8` rounds the inputs of quantized products too, with a scale a token (under fp8 to fp8); `bf16`
    does not."""
    device: str = "auto"
    """`auto` (CUDA where torch sees a device and Triton is installed, else the CPU), `cpu` or `cuda`."""
    enforce_eager: bool = False
    """Run every step launch by launch on a CUDA device, and record no graphs."""
    num_threads: int | None = None
    """Threads of the compute pool; None takes the CPUs this process may use, or
    what `OMP_NUM_THREADS` says."""
    thread_affinity: str | None = None
    """CPUs that the compute threads are pinned to, in turns, as `0-3,8`; None leaves it to the kernel."""
    isa: str = "auto"
    """Instruction set of the native kernels; auto takes `PENSTOCK_ISA` or the best that there is."""
    deterministic: bool = False
    """An answer's tokens do not depend on its neighbours, on chunks, prefix hits or the number of threads."""
    max_model_len: int | None = None
    """None takes the model's own context."""
    tensor_parallel_size: int = 1
    """Ranks that share every layer, 1 to 64; each is a process."""
    scheduler: SchedulerConfig = SchedulerConfig()
    kv: KvConfig = KvConfig()
    speculative: SpeculativeConfig | None = None
    """Speculative decoding, or None."""
    lora: LoraConfig = LoraConfig()
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    warmup: bool = True
    """Run the largest batch and chunk once before ready."""


def _bound(name: str, value: float, low: float, high: float, *, why: str = "") -> None:
    if not low <= value <= high:
        limits = f"between {low:.15g} and {high:.15g}" + (why and f": {why}")
        raise StartupError(f"{name} is {value:.15g}, it must be {limits}", param=name)


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise StartupError(f"{name} is {value!r}, it must be one of {', '.join(known)}", param=name)


def validate_engine_config(config: EngineConfig) -> None:
    """Check every field before a process is started for it.

    Raises:
        StartupError: names the field, its value and the limit.
    """
    sched = config.scheduler
    _one_of("dtype", config.dtype, DTYPES)
    _one_of("kernels", config.kernels, KERNELS)
    _one_of("device", config.device, DEVICES)
    _check_quantization(config)
    _one_of("kv_cache_dtype", config.kv.cache_dtype, KV_CACHE_DTYPES)
    _one_of("isa", config.isa, ISAS)
    _one_of("log_level", config.log_level, LOG_LEVELS)
    _bound("max_num_seqs", sched.max_num_seqs, 1, 4096)
    _bound(
        "max_num_batched_tokens",
        sched.max_num_batched_tokens,
        sched.max_num_seqs,
        1 << 20,
        why="a step has a token of every sequence of max_num_seqs",
    )
    _bound("step_time_target_ms", sched.step_time_target_ms, 1, 600_000)
    _bound("decode_stretch", sched.decode_stretch, 1, 1_000_000)
    _bound("max_num_queued_reqs", sched.max_num_queued_reqs, 1, 1_000_000)
    _bound("max_num_queued_tokens", sched.max_num_queued_tokens, 1, 1 << 40)
    _bound("block_size", config.kv.block_size, 1, MAX_BLOCK_SIZE)
    if config.kv.block_size & (config.kv.block_size - 1):
        raise StartupError(
            f"block_size is {config.kv.block_size}, it must be a power of two from 1 to {MAX_BLOCK_SIZE}",
            param="block_size",
        )
    if config.kv.num_blocks is not None:
        _bound("num_kv_blocks", config.kv.num_blocks, 2, 1 << 31)
    _bound("kv_offloading_size", config.kv.offloading_bytes / GIB, 0, MAX_OFFLOADING_GIB)
    if config.kv.offloading_bytes and not sched.enable_prefix_caching:
        raise StartupError(
            "kv_offloading_size needs enable_prefix_caching: what is kept is found by its prefix",
            param="kv_offloading_size",
        )
    _check_utilization(config)
    if config.max_model_len is not None:
        _bound("max_model_len", config.max_model_len, 2, MAX_MODEL_LEN)
        check_whole_prompts(sched, max_model_len=config.max_model_len)
    _check_lora(config.lora)
    _check_ranks(config)
    if config.num_threads is not None:
        _bound("num_threads", config.num_threads, 1, 1024)
    read_affinity(config.thread_affinity)
    if config.speculative is not None:
        _check_speculative(config.speculative)


def read_speculative(given: Mapping[str, object] | None) -> SpeculativeConfig | None:
    """The config that a user's mapping says; texts stand for numbers, as flags give them.

    Raises:
        StartupError: names the key that is unknown, missing or of a wrong kind.
    """
    if given is None:
        return None
    named = {key.replace("-", "_"): value for key, value in given.items()}
    known = SpeculativeConfig.__struct_fields__
    for key in named:
        if key not in known:
            raise _wrong_speculative(f"{key[:SHOWN_CHARS]!r} is not known, it has {', '.join(known)}")
    method = named.get("method")
    if method not in SPECULATIVE_METHODS:
        told = "method is missing" if method is None else f"method is {str(method)[:SHOWN_CHARS]!r}"
        raise _wrong_speculative(f"{told}, it must be one of {', '.join(SPECULATIVE_METHODS)}")
    for key, value in named.items():
        try:
            msgspec.convert({"method": method, key: value}, SpeculativeConfig, strict=False)
        except msgspec.ValidationError:
            kind = "a text" if key == "model" else "a whole number"
            raise _wrong_speculative(f"{key} is {str(value)[:SHOWN_CHARS]!r}, it must be {kind}") from None
    return msgspec.convert(named, SpeculativeConfig, strict=False)


def _wrong_speculative(what: str) -> StartupError:
    return StartupError(f"speculative_config: {what}", param="speculative_config")


def _check_speculative(config: SpeculativeConfig) -> None:
    _bound("num_speculative_tokens", config.num_tokens, 1, MAX_SPECULATIVE_TOKENS)
    low, high = config.lookup
    _bound("prompt_lookup_max", high, 1, MAX_LOOKUP)
    _bound("prompt_lookup_min", low, 1, high)
    is_ngram = config.method == "ngram"
    if is_ngram == bool(config.model):
        needed = "must be left out with" if is_ngram else "is needed for"
        raise StartupError(f"speculative_config: model {needed} method {config.method}", param="model")
    if not is_ngram and (config.prompt_lookup_min, config.prompt_lookup_max) != (None, None):
        raise StartupError(
            "speculative_config: prompt_lookup_min and prompt_lookup_max must be left out with method "
            f"{config.method}",
            param="prompt_lookup_min",
        )


def _check_quantization(config: EngineConfig) -> None:
    _one_of("quantization", config.quantization, QUANTIZATIONS)
    _one_of("quantization_activations", config.quantization_activations, QUANTIZATION_ACTIVATIONS)
    size = config.quantization_group_size
    _one_of("quantization_group_size", str(size), tuple(map(str, QUANTIZATION_GROUP_SIZES)))
    if config.quantization == "none" and config.quantization_activations != "int8":
        raise StartupError(
            f"quantization_activations is {config.quantization_activations!r}, which needs quantization "
            "int8, int4 or fp8",
            param="quantization_activations",
        )
    if config.quantization != "int4" and size != DEFAULT_GROUP_SIZE:
        raise StartupError(
            f"quantization_group_size is {size}, which needs quantization int4",
            param="quantization_group_size",
        )


def _check_utilization(config: EngineConfig) -> None:
    share = config.kv.gpu_memory_utilization
    if share is None:
        return
    if not 0 < share <= 1:
        raise StartupError(
            f"gpu_memory_utilization is {share:.15g}, it must be above 0 and at most 1",
            param="gpu_memory_utilization",
        )
    if config.device == "cpu":
        refuse_utilization(share)


def refuse_utilization(share: float) -> NoReturn:
    """The CPU computes in the host's memory, of which half is left to others.

    Raises:
        StartupError: always.
    """
    raise StartupError(
        f"gpu_memory_utilization is {share:.15g}, but the device is the CPU: size the pool with "
        "kv_cache_memory_bytes",
        param="gpu_memory_utilization",
    )


def _check_lora(lora: LoraConfig) -> None:
    if lora.modules and not lora.enable_lora:
        raise StartupError("lora_modules is set, which needs enable_lora", param="lora_modules")
    for name in ("max_loras", "max_lora_rank", "max_cpu_loras", "lora_memory_bytes"):
        value = getattr(lora, name)
        if not lora.enable_lora and value != getattr(LoraConfig(), name):
            raise StartupError(f"{name} is {value}, which needs enable_lora", param=name)
    _bound("max_loras", lora.max_loras, 1, 4096)
    _bound("max_lora_rank", lora.max_lora_rank, 1, 1024)
    _bound(
        "max_cpu_loras",
        lora.max_cpu_loras,
        lora.max_loras,
        1 << 20,
        why="what a step of max_loras uses is in memory",
    )
    _bound("lora_memory_bytes", lora.lora_memory_bytes, 1, 1 << 50)


def _check_ranks(config: EngineConfig) -> None:
    _bound("tensor_parallel_size", config.tensor_parallel_size, 1, MAX_RANKS)
    if config.tensor_parallel_size == 1:
        return
    is_draft = config.speculative is not None and config.speculative.method == "draft_model"
    refused = {
        "enable_lora": config.lora.enable_lora,
        "async_scheduling": config.scheduler.async_scheduling is True,
        "thread_affinity": config.thread_affinity is not None,
        "speculative_config with method draft_model": is_draft,
        "kv_offloading_size": bool(config.kv.offloading_bytes),
    }
    for name, is_set in refused.items():
        if is_set:
            raise StartupError(
                f"tensor_parallel_size is {config.tensor_parallel_size}, which does not go with {name}",
                param="tensor_parallel_size",
            )


def read_affinity(text: str | None) -> tuple[int, ...]:
    """The CPUs that `0-3,8` names, in its order; none for None.

    Raises:
        StartupError: it is not such a list.
    """
    if text is None:
        return ()
    cpus: list[int] = []
    for part in text.split(","):
        found = AFFINITY_PART.fullmatch(part.strip())
        first, last = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if not first <= last <= MAX_CPU:
            raise StartupError(
                f"thread_affinity is {text[:100]!r}, it must be CPUs from 0 to {MAX_CPU}, as 0-3,8",
                param="thread_affinity",
            )
        cpus += range(first, last + 1)
    return tuple(cpus)


def check_whole_prompts(scheduler: SchedulerConfig, *, max_model_len: int) -> None:
    """Without chunked prefill every prompt that is admitted must fit a step.

    Raises:
        StartupError: it would not; names both limits.
    """
    if scheduler.enable_chunked_prefill or scheduler.max_num_batched_tokens >= max_model_len:
        return
    raise StartupError(
        f"max_num_batched_tokens is {scheduler.max_num_batched_tokens}, it must be at least max_model_len, "
        f"which is {max_model_len}, with enable_chunked_prefill off: a prompt is then computed in one step",
        param="max_num_batched_tokens",
    )
