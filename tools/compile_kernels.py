"""Compiles every Triton kernel for a CUDA device that need not be there: `python -m tools.compile_kernels`.

The operations of the home are called as the engine calls them, on tensors in host memory, but a launch ends
when its kernel is compiled: what comes out is not computed. So every kernel meets Triton's compiler with real
arguments on a machine without a GPU, where tests otherwise only interpret it. Full compilation takes it down
to machine code and prints what that needs, and once more those that keep numbers on a stack: where it is no
table of the kernel's own (as for a cosine), registers spill. `--frontend` stops at Triton's own
representation, which is fast and finds what the language does not allow.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton._C.libtriton import ir  # what `triton.compiler` itself calls; no public name
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, KvShape
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Quantization
from penstock.kernels.triton.kernel_set import TritonKernels
from penstock.kernels.triton.sampling import DrawRequest, Edits, draw_tokens

HOPPER: Final = 90
CUOBJDUMP: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE: Final = re.compile(r"REG:(\d+) STACK:(\d+)")
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
WARP: Final = 32


class AbsentDevice(DriverBase):  # type: ignore[misc]  # triton is not typed
    """What Triton asks about a device before a launch."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, WARP)

    @classmethod
    def is_active(cls) -> bool:
        """Chosen by hand only."""
        return False

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Of launchers, which are not made."""
        return ty

    def get_current_target(self) -> GPUTarget:
        """The device compiled for."""
        return self._target

    def get_current_device(self) -> int:
        """Its number."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return device

    def get_active_torch_device(self) -> torch.device:
        """Where the arguments are."""
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Sequence[float]]:
        """Nothing can be timed."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """One kernel and what its machine code needs."""

    case: str
    kernel: str
    registers: int
    """Of each thread, at most 255."""
    stack_bytes: int
    """Of each thread."""
    shared_bytes: int
    """Of each program, at most 227 KiB on Hopper."""
    num_warps: int

    def __str__(self) -> str:
        return (
            f"{self.case:42} {self.kernel:24} {self.num_warps:3} warps {self.registers:4} registers "
            f"{self.stack_bytes:5} B stack {self.shared_bytes:7} B shared"
        )


@dataclass(slots=True, kw_only=True)
class Compiler:
    """Stands in for `triton.compiler.compile`."""

    is_frontend: bool
    case: str = ""
    found: list[Compiled] = field(default_factory=list)

    def compile(
        self,
        src: Any,  # triton's own type
        target: GPUTarget,
        options: dict[str, Any],  # of any kind
        **_: object,
    ) -> object:
        """Compile one kernel for one set of constants."""
        if self.is_frontend:
            _to_ir(src, target, options)
            self.found.append(_described(self.case, src.fn.__name__, usage=(0, 0), shared=0, num_warps=0))
            return src
        made = ORIGINAL_COMPILE(src, target=target, options=options)
        self.found.append(
            _described(
                self.case,
                src.fn.__name__,
                usage=_usage(made.asm["cubin"]),
                shared=made.metadata.shared,
                num_warps=made.metadata.num_warps,
            )
        )
        return made


ORIGINAL_COMPILE = triton.compiler.compile


def _described(case: str, kernel: str, *, usage: tuple[int, int], shared: int, num_warps: int) -> Compiled:
    return Compiled(
        case=case,
        kernel=kernel,
        registers=usage[0],
        stack_bytes=usage[1],
        shared_bytes=shared,
        num_warps=num_warps,
    )


def _to_ir(src: Any, target: GPUTarget, options: dict[str, Any]) -> None:  # triton's own types
    backend = make_backend(target)
    parsed = backend.parse_options(dict(options, **src.parse_options()))
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    codegen = backend.get_codegen_implementation(parsed)
    src.make_ir(target, parsed, codegen, backend.get_module_map(), context)


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    found = USAGE.search(done.stdout + done.stderr)
    assert found is not None, done.stdout
    return int(found[1]), int(found[2])


def install(compiler: Compiler, *, arch: int) -> None:
    """Let launches of this process compile for `arch` and end there.

    Raises:
        RuntimeError: Triton interprets kernels in this process.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("TRITON_INTERPRET is 1: kernels are interpreted, not compiled; unset it")
    original = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> object:  # as triton declares it
        del warmup
        result: object = original(self, *args, grid=grid, warmup=True, **kwargs)
        return result

    JITFunction.run = run
    triton.compiler.compile = compiler.compile
    triton.runtime.driver.set_active(AbsentDevice(arch))


def _batch(lengths: Sequence[tuple[int, int]], *, block_size: int) -> AttentionBatch:
    new = [each for each, _ in lengths]
    most = max(length for _, length in lengths)
    return AttentionBatch(
        query_start_loc=torch.tensor([0, *new]).cumsum(0).int(),
        seq_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32),
        block_tables=torch.zeros(len(lengths), -(-most // block_size), dtype=torch.int32),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64),
        query_lens_host=tuple(new),
        seq_lens_host=tuple(length for _, length in lengths),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One call of attention, and the write before it."""

    name: str
    head_dim: int = 128
    group: int = 4
    kept: torch.dtype = BFLOAT16
    dtype: torch.dtype = BFLOAT16
    window: int | None = None
    softcap: float | None = None
    is_deterministic: bool = False
    lengths: tuple[tuple[int, int], ...] = ((1, 32768), (300, 300))
    """New tokens and tokens in all of the sequences, each a step: a decode far into a text, a prompt."""

    def run(self) -> None:
        """Each step writes and attends."""
        kernels = TritonKernels(KernelOptions(is_deterministic=self.is_deterministic))
        kv = KvShape(block_size=16, num_kv_heads=2, head_dim=self.head_dim, dtype=self.kept)
        slab = ops.make_slab(kernels, kv, num_blocks=2)
        shape = ops.AttentionShape(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)
        for lengths in self.lengths:
            batch = _batch([lengths], block_size=16)
            num_rows = sum(batch.query_lens_host)
            query = torch.zeros(num_rows, 2 * self.group, self.head_dim, dtype=self.dtype)
            new = torch.zeros(num_rows, 2, self.head_dim, dtype=self.dtype)
            ops.write_kv(kernels, new, new, slab, batch.slot_mapping)
            ops.paged_attention(kernels, query, slab, batch, shape)


ATTENTION: Final = (
    AttentionCase(name="attention, Llama"),
    AttentionCase(name="attention, guesses", lengths=((3, 3000), (16, 3000))),
    AttentionCase(name="attention, head size 64, 7 to 1", head_dim=64, group=7),
    AttentionCase(name="attention, head size 96", head_dim=96, group=1),
    AttentionCase(name="attention, head size 256, window, cap", head_dim=256, window=4096, softcap=50.0),
    AttentionCase(name="attention, int8", kept=torch.int8),
    AttentionCase(name="attention, fp8", kept=torch.float8_e4m3fn),
    AttentionCase(name="attention, deterministic", is_deterministic=True),
    AttentionCase(name="attention, float32", kept=FLOAT32, dtype=FLOAT32),
)


def _elementwise(kernels: TritonKernels, dtype: torch.dtype) -> None:
    x, heads = torch.zeros(4, 256, dtype=dtype), torch.zeros(4, 2, 128, dtype=dtype)
    weight, token_ids = torch.zeros(256, dtype=dtype), torch.zeros(4, dtype=torch.int64)
    ops.rms_norm(kernels, x, weight, eps=1e-5)
    ops.add_rms_norm(kernels, x, x, weight, eps=1e-5)
    ops.layer_norm(kernels, x, weight, weight, eps=1e-5)
    angles = ops.rope_angles(kernels, token_ids, torch.zeros(64))
    ops.rope(kernels, heads, angles)
    ops.silu_and_mul(kernels, x, x)
    for tanh in (False, True):
        ops.gelu_and_mul(kernels, x, x, tanh=tanh)
        ops.gelu(kernels, x, tanh=tanh)
    ops.embedding(kernels, token_ids, torch.zeros(8, 256, dtype=dtype), scale=2.0)
    ops.softcap(kernels, x.float(), cap=30.0)


def _linear(kernels: TritonKernels, quantization: Quantization) -> None:
    weight = torch.ones(512, 512, dtype=BFLOAT16)
    prepared = ops.prepare_linear(kernels, weight, quantization=quantization)
    for num_rows in (1, 64):
        ops.linear(kernels, torch.zeros(num_rows, 512, dtype=BFLOAT16), prepared)


def _moe(kernels: TritonKernels) -> None:
    prepared = [ops.prepare_linear(kernels, torch.zeros(256, 256, dtype=BFLOAT16)) for _ in range(4)]
    experts = [ops.ExpertWeights(gate=each, up=each, down=each) for each in prepared]
    router, shape = torch.zeros(4, 256, dtype=BFLOAT16), ops.MoeShape(top_k=2, renormalize=True)
    for num_rows in (1, 64):
        ops.moe(kernels, torch.zeros(num_rows, 256, dtype=BFLOAT16), router, experts, shape)


def _sampling(dtype: torch.dtype) -> None:
    """Every launch, at the largest vocabulary of a family."""
    vocab, num_draws = 151_936, 4
    longs, words = torch.zeros(num_draws, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    edits = Edits(
        rows=longs,
        mask_of=longs,
        masks=torch.zeros(1, vocab // 32, dtype=torch.int32),
        offsets=torch.zeros(num_draws + 1, dtype=torch.int64),
        ids=longs,
        kinds=words,
        biases=torch.zeros(1),
        counts=torch.zeros(1),
        penalties=torch.zeros(num_draws, 3),
        most_tokens=1,
    )
    for num_top in (None, 0, 20):
        request = DrawRequest(
            rows=longs,
            places=longs,
            numbers=torch.zeros(6, num_draws, dtype=torch.float64),
            edits=edits,
            is_random=True,
            has_top_k=True,
            has_top_p=True,
            has_min_p=True,
            num_top=num_top,
        )
        draw_tokens(torch.zeros(num_draws, vocab, dtype=dtype), request)


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    """Names and calls."""
    for attention in ATTENTION:
        yield attention.name, attention.run
    kernels = TritonKernels()
    for dtype in (BFLOAT16, FLOAT32):
        yield f"elementwise, {dtype}", partial(_elementwise, kernels, dtype)
    for quantization in (
        Quantization(method="int8"),
        Quantization(method="int8", activations="bf16"),
        Quantization(method="int4"),
        Quantization(method="int4", group_size=32, activations="bf16"),
    ):
        yield f"linear, {quantization}", partial(_linear, kernels, quantization)
    yield "moe", partial(_moe, kernels)
    for dtype in (FLOAT32, BFLOAT16):
        yield f"sampling, {dtype}", partial(_sampling, dtype)


def compile_all(*, only: str, is_frontend: bool, arch: int = HOPPER) -> list[Compiled]:
    """Run the cases whose names contain `only`, print each kernel as it is compiled, and return them."""
    compiler = Compiler(is_frontend=is_frontend)
    install(compiler, arch=arch)
    for name, call in cases():
        if only in name:
            compiler.case, first = name, len(compiler.found)
            call()
            for each in compiler.found[first:]:
                print(each)
    return compiler.found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m tools.compile_kernels`; 1 if no case has such a name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--frontend", action="store_true", help="stop before machine code")
    parser.add_argument("--arch", type=int, default=HOPPER, help="compute capability, 90 for Hopper")
    args = parser.parse_args(argv)
    found = compile_all(only=args.only, is_frontend=args.frontend, arch=args.arch)
    for each in found:
        if each.stack_bytes:
            print("on a stack:", each)
    return 0 if found else 1


if __name__ == "__main__":
    sys.exit(main())
