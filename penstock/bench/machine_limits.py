"""What this machine can do at best: bytes read and numbers multiplied in a second, measured, not looked up.

With the native extension its probes read memory and multiply in registers; without it, torch's own sum and
matrix product are timed, which reach less: the record says which. Called by `offline`, `kernel_bench` and
`ladder`, whose figures are fractions of these.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from typing import Any, Final

import torch

from penstock.kernels.cpu.extension import choose_isa, why_missing

READ_BYTES: Final = 1 << 30
"""Larger than any cache of two cores, so that memory is what is read."""
READ_PASSES: Final = 5
PEAK_SECONDS: Final = 0.3
SQUARE: Final = 2048
"""Side of the matrices of torch's product: 8 MB each in bf16, enough work for every core."""
MULTIPLIED_BY: Final = {"amx_emulated": "avx512"}
"""What stands in for a unit that is not there."""
NATIVE: Final = "penstock.kernels.cpu._native"


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineLimits:
    """Best rates seen."""

    read_gb_per_s: float
    bf16_tflops: float
    int8_tops: float
    isa: str
    """Instruction set of the products."""
    method: str
    """`native probes` or `torch`, which is a lower bound."""
    num_threads: int

    def record(self) -> dict[str, object]:
        """For the JSON."""
        return {name: round(v, 3) if isinstance(v, float) else v for name, v in asdict(self).items()}


def measure_limits(*, num_threads: int, isa: str = "auto", read_bytes: int = READ_BYTES) -> MachineLimits:
    """Measure now; takes one to two seconds and `read_bytes` of memory.

    Args:
        num_threads: that read and multiply.
        isa: as `kernels/options` has it.
        read_bytes: of memory, read a few times.

    Raises:
        StartupError: `PENSTOCK_ISA` names what this CPU does not run.
    """
    if why_missing() is not None:
        return _by_torch(num_threads=num_threads, read_bytes=read_bytes)
    return _by_probes(
        import_module(NATIVE), isa=choose_isa(isa), num_threads=num_threads, read_bytes=read_bytes
    )


def _by_probes(
    native: Any,  # Any: the extension
    *,
    isa: str,
    num_threads: int,
    read_bytes: int,
) -> MachineLimits:
    pool = native.Pool(num_threads, [], 0)
    unit = MULTIPLIED_BY.get(isa, isa)
    return MachineLimits(
        read_gb_per_s=native.read_bandwidth(pool, num_bytes=read_bytes, passes=READ_PASSES) / 1e9,
        bf16_tflops=_peak(native, pool, isa=unit, dtypes=("bf16", "f32")) / 1e12,
        int8_tops=_peak(native, pool, isa=unit, dtypes=("int8", "f32")) / 1e12,
        isa=isa,
        method="native probes",
        num_threads=num_threads,
    )


def _peak(native: Any, pool: Any, *, isa: str, dtypes: tuple[str, ...]) -> float:  # Any: the extension
    """Of the first type that the instruction set multiplies: where there is no bf16, float32 does it."""
    for dtype in dtypes:
        try:
            return float(native.multiply_peak(pool, isa=isa, dtype=dtype, seconds=PEAK_SECONDS))
        except ValueError:
            continue
    raise AssertionError(f"{isa} multiplies none of {dtypes}")


def _by_torch(*, num_threads: int, read_bytes: int) -> MachineLimits:
    torch.set_num_threads(num_threads)
    memory = torch.ones(read_bytes // 8, dtype=torch.int64)
    a = torch.ones(SQUARE, SQUARE, dtype=torch.bfloat16)
    b = torch.ones(SQUARE, SQUARE, dtype=torch.int8)
    product = 2 * SQUARE**3
    return MachineLimits(
        read_gb_per_s=read_bytes / best_seconds(memory.sum, passes=READ_PASSES) / 1e9,
        bf16_tflops=product / best_seconds(lambda: a @ a, passes=READ_PASSES) / 1e12,
        int8_tops=product / best_seconds(lambda: torch._int_mm(b, b), passes=2) / 1e12,  # noqa: SLF001 - torch has no public int8 product
        isa=torch.backends.cpu.get_cpu_capability(),
        method="torch",
        num_threads=num_threads,
    )


def best_seconds(work: Callable[[], object], *, passes: int) -> float:
    """Least time of `passes` calls, after one that is not counted."""
    work()
    best_s = float("inf")
    for _ in range(passes):
        began_s = time.perf_counter()
        work()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s
