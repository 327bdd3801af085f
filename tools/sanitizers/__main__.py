"""Build the extension with a sanitizer in `build/sanitize-KIND`, then run the kernels' tests on it.

    python -m tools.sanitizers address [pytest arguments]
    python -m tools.sanitizers thread  [pytest arguments]

`address` finds reads and writes outside of memory, uses after it was freed and undefined behaviour; `thread`
finds two threads at one place without an order between them. Needs g++, CMake and Ninja; the sanitizer's
runtime is loaded before Python. What it finds ends the run with the place.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).parents[2]
TESTS: Final = ("tests/unit/kernels_native", "tests/unit/kernels")
OPTIMIZATION: Final = "-O1"
"""A third of the time that -O3 takes to compile, and the checks see the same reads and writes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sanitizer:
    """How one is built and run."""

    flags: str
    runtimes: tuple[str, ...]
    """Libraries to load before Python, by the compiler's names."""
    environment: Mapping[str, str]


SANITIZERS: Final[dict[str, Sanitizer]] = {
    "address": Sanitizer(
        # vptr needs the type of every exception that nanobind throws.
        flags="-fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=undefined",
        runtimes=("libasan.so", "libubsan.so"),
        # Python and torch keep memory until the process ends: that is no leak of ours.
        environment={"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
    ),
    "thread": Sanitizer(
        flags="-fsanitize=thread",
        runtimes=("libtsan.so",),
        # Only our code is built with the checks; torch's own threads synchronise where they cannot be seen.
        environment={"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
    ),
}


def build(name: str, sanitizer: Sanitizer) -> Path:
    """The extension with the checks in; a few minutes at the first time."""
    folder = ROOT / "build" / f"sanitize-{name}"
    configure = [
        *("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja"),
        f"-DPython_EXECUTABLE={sys.executable}",
        "-DCMAKE_BUILD_TYPE=RelWithDebInfo",
        f"-DPENSTOCK_OPTIMIZATION={OPTIMIZATION}",
        f"-DCMAKE_CXX_FLAGS={sanitizer.flags} -fno-omit-frame-pointer -g1",
    ]
    subprocess.run(configure, check=True)
    subprocess.run(["cmake", "--build", str(folder)], check=True)
    return next(folder.glob("_native*.so"))


def runtime(name: str) -> str:
    """Where the compiler keeps a library."""
    asked = ["g++", f"-print-file-name={name}"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def run_tests(extension: Path, sanitizer: Sanitizer, arguments: Sequence[str]) -> int:
    """Pytest's exit code, or the sanitizer's."""
    environment = {
        **os.environ,
        **sanitizer.environment,
        "LD_PRELOAD": " ".join(runtime(name) for name in sanitizer.runtimes),
        "PENSTOCK_SANITIZED_EXTENSION": str(extension),
        "OMP_NUM_THREADS": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "tools.sanitizers.sanitized_extension",
        "-p",
        "no:faulthandler",
    ]
    chosen = list(arguments) or ["-q", "-x", *TESTS]
    return subprocess.run([*command, *chosen], env=environment, cwd=ROOT, check=False).returncode


def main(arguments: Sequence[str]) -> int:
    """Returns the exit code."""
    if not arguments or arguments[0] not in SANITIZERS:
        sys.stderr.write(f"usage: python -m tools.sanitizers {'|'.join(SANITIZERS)} [pytest arguments]\n")
        return 2
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        sys.stderr.write("cmake and ninja are needed: pip install cmake ninja\n")
        return 2
    sanitizer = SANITIZERS[arguments[0]]
    return run_tests(build(arguments[0], sanitizer), sanitizer, arguments[1:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
