"""Compiles the Triton kernels for Hopper on a machine without a GPU: `python -m tools.compile_triton`.

Triton's interpreter runs kernels as Python and accepts much that its compiler does not. This goes through the
same host code that launches them, with a driver that names an H200 and never launches: what is compiled is
what a device would run. Prints each kernel's registers, spilled bytes and shared memory; fails where one does
not compile or asks for more shared memory than there is. Takes about a minute of one core.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, LoraSites, LowRankPair
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Method, Quantization
from penstock.kernels.triton import elementwise, linear
from penstock.kernels.triton.kernel_set import TritonKernels
from penstock.kernels.triton.weights import FORMATS, Format, TritonLinear

HOPPER: Final = 90
MAX_SHARED_BYTES: Final = 227 * 1024
"""That one program may have on Hopper."""


class NoDriver:
    """A device that is only compiled for."""

    def get_current_target(self) -> GPUTarget:
        """An H200."""
        return GPUTarget("cuda", HOPPER, 32)

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """Triton asks before it launches."""
        del device
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Where the tensors are: here."""
        return torch.device("cpu")


class Compilations:
    """Takes the place of every launch, and keeps what was compiled."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.too_large: list[str] = []
        self._seen: set[int] = set()
        self._run: Callable[..., Any] = JITFunction.run
        driver.set_active(NoDriver())
        JITFunction.run = self._compile_only()

    def _compile_only(self) -> Callable[..., Any]:
        def run(kernel: Any, *args: object, grid: object, warmup: bool, **options: object) -> Any:
            del warmup
            compiled = self._run(kernel, *args, grid=grid, warmup=True, **options)
            if id(compiled) not in self._seen:
                self._seen.add(id(compiled))
                self._tell(kernel.fn.__name__, compiled)
            return compiled

        return run

    def _tell(self, name: str, compiled: Any) -> None:
        shared = compiled.metadata.shared
        line = f"{name:24} {_resources(compiled.asm['cubin'])} shared {shared}"
        print(line, flush=True)
        self.lines.append(line)
        if shared > MAX_SHARED_BYTES:
            self.too_large.append(line)


def _resources(cubin: bytes) -> str:
    """Registers of a thread and bytes that it spills, as the toolkit reads them from the binary."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", told)
    return f"registers {found[1]:>3} stack {found[2]:>4}" if found else told.strip()


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _weight(rule: Quantization, outputs: int, inputs: int) -> TritonLinear:
    """A weight of nothing in the right form."""
    kept = FORMATS[rule.method]
    values = {
        Format.DENSE: ((outputs, inputs), torch.bfloat16),
        Format.INT8: ((outputs, inputs), torch.int8),
        Format.INT4: ((outputs, inputs // 2), torch.uint8),
        Format.FP8: ((outputs, inputs), torch.float8_e4m3fn),
    }[kept]
    scales = _empty(outputs, dtype=torch.float32)
    if kept is Format.INT4:
        scales = _empty(outputs, inputs // rule.group_size, dtype=torch.float16)
    return TritonLinear(
        values=_empty(*values[0], dtype=values[1]),
        scales=None if kept is Format.DENSE else scales,
        bias=None,
        in_features=inputs,
        quantization=rule,
    )


def _rules() -> Iterator[Quantization]:
    yield Quantization()
    kinds: tuple[tuple[Method, int], ...] = (("int8", 128), ("int4", 32), ("int4", 128), ("fp8", 128))
    for method, size in kinds:
        yield Quantization(method=method, group_size=size)
        yield Quantization(method=method, group_size=size, activations="bf16")


def rows() -> None:
    """What is computed row by row."""
    x, weight = _empty(64, 4096), _empty(4096)
    elementwise.add_rms_norm(x, x, weight, eps=1e-5, weight_offset=0.0)
    elementwise.rms_norm(x.view(64, 32, 128), weight[:128], eps=1e-5, weight_offset=0.0)
    elementwise.layer_norm(x, weight, weight, eps=1e-5)
    positions, frequencies = torch.zeros(64, dtype=torch.int64), _empty(64, dtype=torch.float32)
    elementwise.rope(x.view(64, 32, 128), elementwise.rope_angles(positions, frequencies, factor=1.5))
    elementwise.silu_and_mul(x, x)
    elementwise.gelu_and_mul(x, x, tanh=True)
    elementwise.gelu(x, tanh=False)
    elementwise.embedding(positions, x, scale=1.0)
    elementwise.softcap(x.float(), cap=30.0)
    elementwise.not_finite(x)


def products() -> None:
    """One row, few and many, in every form, in both modes."""
    for rule in _rules():
        weight = _weight(rule, 4096, 4096)
        for num_rows, is_deterministic in ((1, False), (16, False), (256, False), (4, True), (256, True)):
            x = _empty(num_rows, 4096)
            linear.multiply(x, weight, is_deterministic=is_deterministic, dtype=torch.bfloat16)


def experts() -> None:
    """Few pairs and many."""
    for rule in _rules():
        for is_deterministic in (False, True):
            kernels = TritonKernels(KernelOptions(is_deterministic=is_deterministic))
            layer = [
                ops.ExpertWeights(
                    gate=_weight(rule, 768, 2048), up=_weight(rule, 768, 2048), down=_weight(rule, 2048, 768)
                )
                for _ in range(4)
            ]
            for num_rows in (2, 1024):
                shape = ops.MoeShape(top_k=2, renormalize=True)
                ops.moe(kernels, _empty(num_rows, 2048), _empty(4, 2048), layer, shape)


def adapters() -> None:
    """Small ranks and large."""
    kernels = TritonKernels()
    for rank in (16, 130):
        site = LoraSites().add("module", in_features=4096, out_features=4096)
        pair = LowRankPair(a=_empty(rank, 4096), b=_empty(4096, rank), scale=1.0)
        prepared = ops.prepare_adapter(kernels, {0: pair}, num_sites=1, dtype=torch.bfloat16)
        site.active.rows = (AdapterRows(first_row=0, num_rows=3, weights=prepared),)
        ops.lora(kernels, _empty(4, 4096), _empty(4, 4096), site)


PARTS: Final = (rows, products, experts, adapters)


def main() -> int:
    """Compile everything, or the parts that are named."""
    compilations = Compilations()
    for part in PARTS:
        if len(sys.argv) == 1 or part.__name__ in sys.argv[1:]:
            print(f"== {part.__name__}")
            part()
    for line in compilations.too_large:
        print(f"too much shared memory: {line}", file=sys.stderr)
    print(f"{len(compilations.lines)} variants compiled for sm_{HOPPER}")
    return 1 if compilations.too_large else 0


if __name__ == "__main__":
    sys.exit(main())
