"""Compiles every Triton kernel for a CUDA device that need not be there: `python -m tools.compile_kernels`.

Triton's interpreter runs kernels as Python and takes much that its compiler does not. Here the operations of
the home are called as the engine calls them, on tensors in host memory, but a launch ends when its kernel is
compiled: what is compiled is what a device would run, and nothing is computed. Parts (`attention`, `rows`,
`products`, `experts`, `adapters`, `sampling`) may be named; all is the default, about two minutes of a core.

Full compilation goes down to machine code, prints what that needs, and once more those kernels that keep
numbers on a stack: where it is no table of the kernel's own (as for a cosine), registers spill. It fails
where a kernel asks for more shared memory than there is. `--frontend` stops at Triton's own representation,
which is fast and finds what the language does not allow.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
import triton
from triton._C.libtriton import ir  # what `triton.compiler` itself calls; no public name
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.compiler import make_backend
from triton.runtime.jit import JITFunction

from tools.kernel_cases import PARTS

HOPPER: Final = 90
CUOBJDUMP: Final = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
USAGE: Final = re.compile(r"REG:(\d+) STACK:(\d+)")
WARP: Final = 32
MAX_SHARED_BYTES: Final = 227 * 1024
"""That one program may have on Hopper."""


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
    """Of each program, at most `MAX_SHARED_BYTES`."""
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


def compile_parts(compiler: Compiler, *, parts: Sequence[str], only: str = "") -> list[Compiled]:
    """Run the cases of some parts whose names contain `only`; print each kernel as it is compiled."""
    for name, call in (case for part in parts for case in PARTS[part]):
        if only in name:
            compiler.case, first = name, len(compiler.found)
            call()
            for each in compiler.found[first:]:
                print(each, flush=True)
    return compiler.found


def main(argv: Sequence[str] | None = None) -> int:
    """Entry of `python -m tools.compile_kernels`; 1 if no case has such a name, or a kernel cannot be run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all by default")
    parser.add_argument("--only", default="", help="cases whose names contain this")
    parser.add_argument("--frontend", action="store_true", help="stop before machine code")
    parser.add_argument("--arch", type=int, default=HOPPER, help="compute capability, 90 for Hopper")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - PARTS.keys():
        parser.error(f"no part {', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    compiler = Compiler(is_frontend=args.frontend)
    install(compiler, arch=args.arch)
    found = compile_parts(compiler, parts=args.parts or tuple(PARTS), only=args.only)
    for each in found:
        if each.stack_bytes:
            print("on a stack:", each)
    too_large = [each for each in found if each.shared_bytes > MAX_SHARED_BYTES]
    for each in too_large:
        print("too much shared memory:", each, file=sys.stderr)
    print(f"{len(found)} variants compiled for sm_{args.arch}")
    return 1 if too_large or not found else 0


if __name__ == "__main__":
    sys.exit(main())
