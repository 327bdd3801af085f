"""`penstock doctor`: what this machine has, what Penstock makes of it, and what is missing.

It measures for about a second, changes nothing and needs no network.
"""

import importlib.util
import os
import platform
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Final

from rich.console import Console
from rich.table import Table

from penstock.cli.resolved import readable_bytes
from penstock.core.errors import StartupError
from penstock.models.embedded_model import embedded_path

BANDWIDTH_BYTES: Final = 256 << 20
"""Larger than any last-level cache in use."""
BANDWIDTH_ROUNDS: Final = 7
CPU_FEATURES: Final = ("avx2", "fma", "f16c", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
PACKAGES: Final = (
    "torch",
    "tokenizers",
    "safetensors",
    "huggingface-hub",
    "fastapi",
    "uvicorn",
    "pyzmq",
    "msgspec",
)
EXTRAS: Final = {
    "triton": "CUDA devices",
    "transformers": "the oracle tests and benchmarks",
    "openai": "the client tests and examples",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report."""

    name: str
    value: str
    is_missing: bool = False
    """True if Penstock cannot serve without it."""


def cpu_flags(cpuinfo: str) -> frozenset[str]:
    """Feature words of the first processor in the text of `/proc/cpuinfo`."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in {"flags", "Features"}:
            return frozenset(value.split())
    return frozenset()


def cpu_findings(cpuinfo: str) -> list[Finding]:
    """Model, cores and the vector features that matter to a model."""
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    flags = cpu_flags(cpuinfo)
    here = [name for name in CPU_FEATURES if name in flags]
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return [
        Finding(name="CPU", value=names[0] if names else platform.processor() or platform.machine()),
        Finding(name="cores", value=f"{usable} usable of {os.cpu_count()}"),
        Finding(name="CPU features", value=" ".join(here) or "none of those that matter are known"),
    ]


def memory_findings(meminfo: str) -> list[Finding]:
    """Total and available memory from the text of `/proc/meminfo`."""
    kib = {
        key: int(rest.split()[0])
        for key, _, rest in (line.partition(":") for line in meminfo.splitlines())
        if rest
    }
    return [
        Finding(name=name, value=readable_bytes(kib[key] << 10))
        for name, key in (("memory", "MemTotal"), ("memory available", "MemAvailable"))
        if key in kib
    ]


def measure_read_bandwidth() -> float:
    """Median bytes per second when all usable threads sum a buffer that no cache holds."""
    import torch

    buffer = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32)
    times_s = []
    for _ in range(BANDWIDTH_ROUNDS):
        start_s = time.perf_counter()
        total = float(buffer.sum())
        times_s.append(time.perf_counter() - start_s)
        assert total == buffer.numel()
    return BANDWIDTH_BYTES / statistics.median(times_s)


def _torch_findings() -> list[Finding]:
    import torch

    bandwidth = measure_read_bandwidth()
    return [
        Finding(name="threads", value=f"{torch.get_num_threads()} compute"),
        Finding(
            name="memory read",
            value=f"{bandwidth / 1e9:.1f} GB/s measured: a step with 1 GiB of weights takes at least "
            f"{(1 << 30) / bandwidth * 1e3:.0f} ms",
        ),
        gpu_finding(),
    ]


def gpu_finding() -> Finding:
    """The CUDA devices that torch sees, or what keeps it from seeing one."""
    import torch

    from penstock.kernels.devices import why_no_cuda

    missing = why_no_cuda()
    if missing is not None:
        return Finding(name="GPU", value=f"none: {missing}")
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    told = ", ".join(f"{each.name} with {readable_bytes(each.total_memory)}" for each in found)
    return Finding(name="GPU", value=f"{told}; torch is built for CUDA {torch.version.cuda}")


def auto_finding() -> Finding:
    """What `--device auto` and `--kernels auto` take here, and why."""
    import torch

    from penstock.kernels.devices import choose_device
    from penstock.kernels.registry import auto_choice

    chosen = choose_device("auto")
    kernels = {}
    for dtype in (torch.bfloat16, torch.float32):
        choice = auto_choice(device=chosen.device.type, dtype=dtype)
        kernels[str(dtype).removeprefix("torch.")] = "none" if choice is None else choice.name
    told = ", ".join(f"{name} for {dtype}" for dtype, name in kernels.items())
    return Finding(name="auto takes", value=f"{chosen.device} ({chosen.reason}); kernels {told}")


def triton_finding() -> Finding:
    """Whether the Triton kernels run here and on what, or why not."""
    from penstock.kernels.devices import why_no_cuda, why_no_triton
    from penstock.kernels.triton import availability

    missing = why_no_triton()
    if missing is None and availability.is_interpreted():
        on = f"under its interpreter on the CPU ({availability.INTERPRET_VARIABLE}=1): for tests, very slow"
        return Finding(name="kernels triton", value=f"yes: {on}")
    missing = missing or why_no_cuda()
    if missing is not None:
        return Finding(name="kernels triton", value=f"no: {missing}")
    return Finding(name="kernels triton", value=f"yes: Triton {_version('triton')} on CUDA")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def package_findings() -> list[Finding]:
    """Versions of what Penstock stands on, and of what only tests and examples need."""
    found = [Finding(name="Python", value=platform.python_version())]
    for package in PACKAGES:
        version = _version(package)
        found.append(Finding(name=package, value=version or "missing", is_missing=version is None))
    for package, use in EXTRAS.items():
        found.append(Finding(name=package, value=_version(package) or f"not installed: only for {use}"))
    return found


def native_finding() -> Finding:
    """Whether the C++ kernels run here, on which instruction set and why, or why not."""
    from penstock.kernels.cpu import extension

    missing = extension.why_missing()
    if missing is not None:
        return Finding(name="kernels native", value=f"no: {missing}; torch computes")
    try:
        isa = extension.choose_isa()
    except StartupError as error:
        return Finding(name="kernels native", value=f"no: {error.message}", is_missing=True)
    usable = extension.usable_isas()
    forced = os.environ.get(extension.ISA_VARIABLE)
    why = f"{extension.ISA_VARIABLE} asks for it" if forced else f"the best of {', '.join(usable)}"
    threads = extension.default_num_threads()
    return Finding(
        name="kernels native",
        value=f"yes: C++ on {isa} ({why}), {threads} thread{'' if threads == 1 else 's'}, bfloat16 alone",
    )


def _kernel_findings() -> list[Finding]:
    return [
        native_finding(),
        triton_finding(),
        Finding(name="kernels eager", value="yes: fast torch on the CPU"),
        Finding(name="kernels reference", value="yes: obvious torch on the CPU, independent of the batch"),
        auto_finding(),
    ]


def _model_finding() -> Finding:
    weights = embedded_path() / "model.safetensors"
    if weights.is_file():
        return Finding(name="embedded model", value=readable_bytes(weights.stat().st_size))
    return Finding(
        name="embedded model", value="missing: name a model in `penstock serve MODEL`", is_missing=True
    )


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def examine() -> list[Finding]:
    """Every finding, the measured one included."""
    found = cpu_findings(_read("/proc/cpuinfo")) + memory_findings(_read("/proc/meminfo"))
    if importlib.util.find_spec("torch") is not None:
        found += _torch_findings() + _kernel_findings()
    return [*found, _model_finding(), *package_findings()]


def report(console: Console) -> int:
    """Print the findings; the return value is 1 if something is missing, else 0."""
    found = examine()
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for finding in found:
        style = "red" if finding.is_missing else ""
        table.add_row(finding.name, f"[{style}]{finding.value}[/]" if style else finding.value)
    console.print(table)
    missing = [finding.name for finding in found if finding.is_missing]
    console.print(f"\nmissing: {', '.join(missing)}" if missing else "\nnothing is missing")
    return 1 if missing else 0
