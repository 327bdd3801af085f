"""What stands on each rung, how it is started, and what the literature says that it is worth.

Each rung adds one idea to the one below. From `contiguous` on it is Penstock itself, with the same bytes of
KV memory on every rung: `kv_contexts` whole contexts.

    contiguous   one block as long as a context for each sequence, taken when it starts; prompts whole
    paged        blocks of 16 tokens, taken as the sequence grows
    prefix       the blocks of prompts that begin alike are shared
    chunked      prompts are computed in pieces beside the running answers
    int8, int4   the weights
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from penstock.bench.compare.contender import ServedContender, ServerSpec
from penstock.bench.compare.server_process import Launch, free_port

PAGE: Final = 16
MODEL_NAME: Final = "m"
STEP_TOKENS: Final = 2048
Kind = Literal["transformers", "penstock"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rung:
    """One step of the ladder."""

    name: str
    idea: str
    kind: Kind
    claim: str = ""
    """Throughput over one request at a time, as papers and vendors state it for a large GPU."""
    is_paged: bool = True
    has_prefix_cache: bool = False
    has_chunks: bool = False
    quantization: str | None = None

    @property
    def peak(self) -> Literal["bf16", "int8"]:
        """Which peak its utilisation is a share of."""
        return "bf16" if self.quantization is None else "int8"


RUNGS: Final[tuple[Rung, ...]] = (
    Rung(name="naive", idea="one request at a time", kind="transformers", claim="1x"),
    Rung(name="static", idea="static batches", kind="transformers", claim="5 to 10x"),
    Rung(
        name="contiguous",
        idea="continuous batching, contiguous KV",
        kind="penstock",
        claim="10 to 20x",
        is_paged=False,
    ),
    Rung(name="paged", idea="+ paged KV", kind="penstock", claim="20 to 50x"),
    Rung(name="prefix", idea="+ prefix cache", kind="penstock", has_prefix_cache=True),
    Rung(name="chunked", idea="+ chunked prefill", kind="penstock", has_prefix_cache=True, has_chunks=True),
    Rung(
        name="int8",
        idea="+ int8 weights",
        kind="penstock",
        has_prefix_cache=True,
        has_chunks=True,
        quantization="int8",
    ),
    Rung(
        name="int4",
        idea="+ int4 weights",
        kind="penstock",
        has_prefix_cache=True,
        has_chunks=True,
        quantization="int4",
    ),
)
RUNG_NAMES: Final = tuple(rung.name for rung in RUNGS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """What every rung is started with."""

    model: Path
    num_users: int
    max_model_len: int
    """Context that the engine promises; contiguous KV takes it whole for every sequence. A power of two."""
    kv_contexts: int
    """KV memory of the engine's rungs, in whole contexts."""
    static_batch_size: int
    static_timeout_ms: float
    num_threads: int
    dtype: Literal["bfloat16", "float32"]
    penstock_flags: tuple[str, ...]
    work_dir: Path

    def __post_init__(self) -> None:
        assert self.max_model_len & (self.max_model_len - 1) == 0, "a block is a power of two"


def make_rung(rung: Rung, *, site: Site) -> ServedContender:
    """The rung's server, not started."""
    port = free_port()
    is_naive = rung.kind == "transformers"
    command = (_transformers if is_naive else _penstock)(rung, site, port=port)
    ready_path = "/health" if is_naive else "/health/ready"
    spec = ServerSpec(
        name=rung.name,
        url=f"http://127.0.0.1:{port}",
        model=MODEL_NAME,
        facts={"command": " ".join(command[1:]).replace(str(site.model), site.model.name)},
        launch=Launch(command=command, ready_path=ready_path, start_timeout_s=180.0),
    )
    return ServedContender(spec, log_path=site.work_dir / f"{rung.name}.log")


def _transformers(rung: Rung, site: Site, *, port: int) -> tuple[str, ...]:
    batch_size = 1 if rung.name == "naive" else site.static_batch_size
    return (
        *(sys.executable, "-m", "penstock.bench.ladder.naive_server", str(site.model)),
        *("--port", str(port), "--dtype", site.dtype, "--num-threads", str(site.num_threads)),
        *("--batch-size", str(batch_size), "--batch-timeout-ms", str(site.static_timeout_ms)),
    )


def _penstock(rung: Rung, site: Site, *, port: int) -> tuple[str, ...]:
    block_size = PAGE if rung.is_paged else site.max_model_len
    num_blocks = site.kv_contexts * site.max_model_len // block_size
    budget = STEP_TOKENS if rung.has_chunks else max(STEP_TOKENS, site.max_model_len)
    weights = () if rung.quantization is None else ("--quantization", rung.quantization)
    return (
        *(sys.executable, "-m", "penstock.cli.main", "serve", str(site.model)),
        *("--served-model-name", MODEL_NAME, "--port", str(port), "--log-level", "warning"),
        *("--dtype", site.dtype, "--num-threads", str(site.num_threads)),
        *("--max-num-seqs", str(site.num_users), "--max-model-len", str(site.max_model_len)),
        *("--block-size", str(block_size), "--num-kv-blocks", str(num_blocks)),
        *("--max-num-batched-tokens", str(max(budget, site.num_users))),
        "--enable-prefix-caching" if rung.has_prefix_cache else "--no-enable-prefix-caching",
        "--enable-chunked-prefill" if rung.has_chunks else "--no-enable-chunked-prefill",
        *weights,
        *site.penstock_flags,
    )
