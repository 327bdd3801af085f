"""What was chosen at start and why: the frozen answer to settings that were left open.

Made once from the settings and what the engine reports, shown by `start_table`, logged once.
"""

from dataclasses import dataclass

from penstock.cli.setting import plain
from penstock.cli.settings import ServeSettings
from penstock.core.tokens import EngineInfo
from penstock.engine.config import DEFAULT_UTILIZATION

TYPICAL_REQUEST_TOKENS = 512
"""Second line of the capacity row: what many chat requests need."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One resolved value."""

    name: str
    value: str
    reason: str


def concurrent_requests(info: EngineInfo, *, num_tokens: int) -> int:
    """Requests of `num_tokens` that the pool holds at once, with nothing shared.

    A window group holds at most its window and the block that is being left behind.
    """
    lengths = (
        num_tokens if window is None else min(num_tokens, window + info.block_size)
        for window in info.cache_group_windows
    )
    blocks_each = sum(-(-length // info.block_size) for length in lengths)
    return min(info.num_blocks // blocks_each, info.max_num_seqs)


def readable_bytes(num_bytes: int) -> str:
    """Bytes in the largest binary unit that keeps the number at 1 or more, e.g. `1.5 GiB`."""
    for shift, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if num_bytes >= 1 << shift:
            return f"{num_bytes / (1 << shift):.1f} {unit}"
    return f"{num_bytes} B"


def _capacity(info: EngineInfo) -> str:
    lengths = sorted({min(TYPICAL_REQUEST_TOKENS, info.max_model_len), info.max_model_len})
    parts = [f"{concurrent_requests(info, num_tokens=n)} of {n:,} tokens" for n in lengths]
    return ", ".join(parts)


def _pool_reason(settings: ServeSettings, info: EngineInfo) -> str:
    if settings.num_kv_blocks is not None:
        return "num_kv_blocks"
    if settings.kv_cache_memory_bytes is not None:
        return "kv_cache_memory_bytes"
    if info.device_bytes:
        share = settings.gpu_memory_utilization or DEFAULT_UTILIZATION
        return f"{share:g} of {readable_bytes(info.device_bytes)}, less all else"
    return "a share of the free memory, or all that max_num_seqs full contexts need"


def _memory(info: EngineInfo) -> tuple[str, str]:
    """All that is taken for as long as the engine lives, and what for; the parts add up."""
    on_host = info.kv_offload_bytes
    parts = {
        "weights": info.weights_bytes,
        "KV": info.kv_bytes,
        "activations": info.activation_bytes,
        "graphs": info.graph_bytes,
    }
    told = ", ".join(f"{name} {readable_bytes(size)}" for name, size in parts.items() if size)
    total = readable_bytes(sum(parts.values()))
    if info.device_bytes:
        total = f"{total} of {readable_bytes(info.device_bytes)}"
    return total, told + (f"; beside it {readable_bytes(on_host)} of host memory for KV" if on_host else "")


def _adapters(settings: ServeSettings, info: EngineInfo) -> tuple[tuple[str, str, str], ...]:
    """How many adapters a step, and memory, may hold; no row where they are not enabled."""
    if not info.enable_lora:
        return ()
    held = sum(report.num_bytes for report in info.adapters if report.is_in_memory)
    value = f"{settings.max_loras:,} slots, ranks up to {settings.max_lora_rank:,}"
    reason = (
        f"{len(info.adapters):,} loaded with {readable_bytes(held)} of at most "
        f"{readable_bytes(settings.lora_memory_bytes)}; in memory at most {settings.max_cpu_loras:,}"
    )
    return (("adapters", value, reason),)


def _asked(value: object, *, otherwise: str) -> str:
    return otherwise if value in {None, "auto", "none"} else "asked for"


def resolved_choices(settings: ServeSettings, info: EngineInfo) -> tuple[Choice, ...]:
    """Every choice, in the order of the start table."""
    rows = (
        ("parameters", f"{info.num_parameters:,}", info.architecture),
        ("dtype", info.dtype, _asked(settings.dtype, otherwise="the checkpoint's")),
        ("device", info.device, info.device_detail),
        (
            "kernels",
            f"{info.kernels} ({info.kernels_detail})" if info.kernels_detail else info.kernels,
            _asked(settings.kernels, otherwise=f"the fastest set here on {info.device}"),
        ),
        ("passes", info.execution.partition(":")[0], info.execution.partition(": ")[2] or "by the kernels"),
        ("quantization", info.quantization, _asked(settings.quantization, otherwise="the checkpoint's")),
        (
            "scheduling",
            "one step ahead" if info.async_scheduling else "step by step",
            _asked(settings.async_scheduling, otherwise=f"the default on {info.device.partition(':')[0]}"),
        ),
        ("speculation", info.speculation, _asked(info.speculation, otherwise="nobody guesses ahead")),
        *_adapters(settings, info),
        ("weights", readable_bytes(info.weights_bytes), f"loaded in {info.load_time_s:.2f} s"),
        (
            "context",
            f"{info.max_model_len:,} tokens",
            _asked(settings.max_model_len, otherwise="the model's own"),
        ),
        ("KV dtype", info.kv_cache_dtype, _asked(settings.kv_cache_dtype, otherwise="the model's")),
        ("KV budget", readable_bytes(info.kv_bytes), _pool_reason(settings, info)),
        (
            "KV blocks",
            f"{info.num_blocks:,} of {info.block_size} tokens",
            f"{readable_bytes(info.bytes_per_block)} each, {info.num_cache_groups} cache group(s)",
        ),
        ("memory", *_memory(info)),
        ("concurrent requests", _capacity(info), f"and at most max_num_seqs = {info.max_num_seqs}"),
        (
            "step",
            f"{info.max_num_batched_tokens:,} tokens",
            f"cut to about {plain(settings.step_time_target_ms)} ms while answers run",
        ),
    )
    return tuple(Choice(name=name, value=value, reason=reason) for name, value, reason in rows)
