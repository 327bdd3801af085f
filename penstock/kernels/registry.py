"""Which home runs on which device and dtype with which options, and the choice for `auto`.

`models.loader` asks here once; the object it gets is handed to the layers. A new home is one line in
`HOMES`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch

from penstock.core.errors import StartupError
from penstock.kernels.cpu import extension
from penstock.kernels.eager.kernel_set import EagerKernels
from penstock.kernels.ops import KernelSet
from penstock.kernels.options import DEFAULT_OPTIONS, KernelOptions
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.triton import availability

log = logging.getLogger("penstock.kernels")


@dataclass(frozen=True, slots=True, kw_only=True)
class Home:
    """One implementation of all operations, and where it runs."""

    build: Callable[[KernelOptions], KernelSet]
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    refusal: Callable[[KernelOptions], str | None]
    """Why it cannot serve the options; None if it can."""

    def why_not(self, *, device: str, dtype: torch.dtype, options: KernelOptions) -> str | None:
        """Why `build` cannot serve this; None if it can."""
        if device not in self.devices:
            return f"it does not run on {device}"
        if device == "cuda" and not torch.cuda.is_available():
            return "there is no CUDA device"
        if dtype not in self.dtypes:
            return f"it does not compute in {_word(dtype)}"
        if options.kv_cache_dtype == "bfloat16" and dtype != torch.bfloat16:
            return f"kv_cache_dtype bfloat16 does not go with dtype {_word(dtype)}"
        return self.refusal(options)


def _build_native(options: KernelOptions) -> KernelSet:
    # Imported here: a machine without the extension module must be able to read this file.
    from penstock.kernels.cpu import _native
    from penstock.kernels.cpu.emission import Machine
    from penstock.kernels.cpu.kernel_set import NativeKernels

    num_threads = options.num_threads or extension.default_num_threads()
    extension.check_cpus(options.cpus)
    pool = _native.Pool(threads=num_threads, cpus=list(options.cpus), linger_us=LINGER_US)
    isa = extension.choose_isa(options.isa)
    return NativeKernels(Machine(pool=pool, isa=isa, is_deterministic=options.is_deterministic))


LINGER_US: Final = 50
"""A thread that has nothing to do looks for work so long before it sleeps: longer than from one program of a
step to the next, much shorter than a step."""


def _refuse_native(options: KernelOptions) -> str | None:
    missing = extension.why_missing()
    if missing is not None:
        return missing
    if options.kv_cache_dtype == "fp8":
        return "kv_cache_dtype fp8 is not kept by it"
    if options.quantization.method == "fp8":
        return "quantization fp8 is for the kernels triton, eager and reference"
    from penstock.kernels.cpu.emission import layout_refusal  # needs the extension module

    return layout_refusal(block_size=options.block_size, head_dim=options.head_dim)


def _refuse_torch(options: KernelOptions) -> str | None:
    if options.cpus:
        return "thread_affinity pins the threads of the native kernels alone"
    if options.isa != "auto":
        return f"isa {options.isa} chooses among the native kernels"
    return None


def _refuse_eager(options: KernelOptions) -> str | None:
    if options.is_deterministic:
        return "it is not deterministic: its results depend on the batch"
    if options.kv_cache_dtype in ("int8", "fp8"):
        return f"kv_cache_dtype {options.kv_cache_dtype} is not kept by it"
    return _refuse_torch(options)


def _build_triton(options: KernelOptions) -> KernelSet:
    # Imported here: a machine without triton must be able to read this file.
    from penstock.kernels.triton.kernel_set import TritonKernels

    return TritonKernels(options)


def _refuse_triton(options: KernelOptions) -> str | None:
    return availability.why_missing() or _refuse_torch(options)


TORCH_DTYPES: Final = (torch.float32, torch.bfloat16)
HOMES: Final[dict[str, Home]] = {
    "native": Home(build=_build_native, devices=("cpu",), dtypes=(torch.bfloat16,), refusal=_refuse_native),
    "eager": Home(
        build=lambda _: EagerKernels(), devices=("cpu",), dtypes=TORCH_DTYPES, refusal=_refuse_eager
    ),
    "reference": Home(
        build=lambda _: ReferenceKernels(), devices=("cpu",), dtypes=TORCH_DTYPES, refusal=_refuse_torch
    ),
    "triton": Home(
        build=_build_triton,
        devices=availability.usable_devices(),
        dtypes=TORCH_DTYPES,
        refusal=_refuse_triton,
    ),
}
"""By name, the preferred first: `auto` takes the first that can run."""


def runnable(*, device: str, dtype: torch.dtype, options: KernelOptions = DEFAULT_OPTIONS) -> list[str]:
    """Names of the homes that can serve this, the preferred first."""
    return [
        name
        for name, home in HOMES.items()
        if home.why_not(device=device, dtype=dtype, options=options) is None
    ]


def _is_too_slow(options: KernelOptions) -> bool:
    """True where the native kernels would run in plain C++ although nobody asked for that."""
    return extension.choose_isa(options.isa) == "scalar" and extension.usable_isas()[1:2] != ["avx2"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoChoice:
    """What `--kernels auto` takes."""

    name: str
    passed_over: str | None
    """Why the native kernels are not taken on a CPU; None if they are, or cannot serve this anyway."""


def auto_choice(
    *, device: str, dtype: torch.dtype, options: KernelOptions = DEFAULT_OPTIONS
) -> AutoChoice | None:
    """The set that `auto` takes; None if none can serve this. Arguments as for `select_kernels`."""
    names = runnable(device=device, dtype=dtype, options=options)
    if not names:
        return None
    missing = extension.why_missing() if device == "cpu" else None
    if missing is None and names[0] == "native" and len(names) > 1 and _is_too_slow(options):
        return AutoChoice(name=names[1], passed_over="this CPU has no AVX2")
    return AutoChoice(name=names[0], passed_over=missing)


def select_kernels(
    name: str, *, device: str, dtype: torch.dtype, options: KernelOptions = DEFAULT_OPTIONS
) -> KernelSet:
    """Build the home that `name` asks for.

    Args:
        name: `auto` or a name in `HOMES`.
        device: torch device type, e.g. `cpu`.
        dtype: of weights and activations.
        options: what else it must serve.

    Raises:
        StartupError: it is not known or cannot run there; the message says why and lists what can.
    """
    names = runnable(device=device, dtype=dtype, options=options)
    choice = auto_choice(device=device, dtype=dtype, options=options) if name == "auto" else None
    if choice is not None:
        name = choice.name
        if choice.passed_over is not None:
            log.warning("the native kernels are not used, torch computes: %s", choice.passed_over)
    if name not in names:
        raise StartupError(
            f"kernels is {name!r}, which cannot run on {device} with {_word(dtype)}"
            f"{_why_not(name, device=device, dtype=dtype, options=options)}; "
            f"what can: {', '.join(names) or 'none'}",
            param="kernels",
        )
    return HOMES[name].build(options)


def _why_not(name: str, *, device: str, dtype: torch.dtype, options: KernelOptions) -> str:
    if name not in HOMES and name != "auto":
        return ""
    asked = HOMES if name == "auto" else {name: HOMES[name]}
    reasons = {
        each: home.why_not(device=device, dtype=dtype, options=options) for each, home in asked.items()
    }
    return ": " + ", ".join(f"{each}: {reason}" for each, reason in reasons.items())


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
