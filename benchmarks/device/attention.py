"""Paged attention on a CUDA device: decode beside the bandwidth, prefill beside torch's own flash attention.

Decode reads each key and value once, so its bound is their bytes over the copy bandwidth measured just before
(bytes read plus written). Prefill is compared with `scaled_dot_product_attention`, its flash path, on the
same keys and values without blocks, in turns in one run. Calls are recorded as one graph and go round through
copies larger than the cache. Every result is compared with plain attention first; a wrong one fails the run,
a bar that is missed is told and does not. Run by `python -m benchmarks.device attention`, or alone: `python
-m benchmarks.device.attention`; `--sweep` tries other tiles for the two cases of the bars.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.device.dense import Bench, ceilings, make_parser, run_and_write, seconds_of
from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, KvShape, KvSlab
from penstock.kernels.triton import tiles
from penstock.kernels.triton.tiles import Heads, Tile

BLOCK_SIZE: Final = 16
DECODE_BAR: Final = 0.80
"""Of the bandwidth, at 32k context."""
PREFILL_BAR: Final = 0.60
"""Of the speed of torch's flash attention."""
TOLERANCE: Final = {torch.bfloat16: 2e-2, torch.int8: 4e-2, torch.float8_e4m3fn: 1.2e-1}
"""Largest error over the largest value: bfloat16 rounds weights and answer, int8 keeps 7 bits of a key, fp8
3."""
WORDS: Final = {torch.bfloat16: "bf16", torch.int8: "int8", torch.float8_e4m3fn: "fp8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model's attention."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


LARGE: Final = Shape(name="8b", heads=32, kv_heads=8, head_dim=128)
SMALL: Final = Shape(name="1b", heads=32, kv_heads=8, head_dim=64)
DRY: Final = Shape(name="dry", heads=4, kv_heads=2, head_dim=16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One measured case."""

    name: str
    seconds: float
    fraction: float
    """Of the bound, or of torch's speed."""
    bar: float | None
    error: float
    tolerance: float
    details: dict[str, float]

    @property
    def is_right(self) -> bool:
        """True if the result is."""
        return self.error <= self.tolerance

    @property
    def is_met(self) -> bool:
        """True if the bar is reached, or if there is none."""
        return self.bar is None or self.fraction >= self.bar

    def __str__(self) -> str:
        verdict = "" if self.bar is None else f" of {self.bar:.2f} {'met' if self.is_met else 'MISSED'}"
        word = "" if self.is_right else f"  WRONG, error {self.error:.4f}"
        details = "  ".join(f"{name} {value:.4g}" for name, value in self.details.items())
        figures = f"{self.seconds * 1e6:10.1f} us  fraction {self.fraction:6.3f}{verdict}"
        return f"{self.name:44} {figures}  {details}{word}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Sequences of one length in blocks that lie anywhere."""

    query: Tensor
    """[T, H, D]"""
    keys: Tensor
    """[S, L, N, D], as they were before they were written."""
    values: Tensor
    slab: KvSlab
    batch: AttentionBatch
    shape: ops.AttentionShape
    kernels: ops.KernelSet

    def attend(self) -> Tensor:
        """What is measured."""
        return ops.paged_attention(self.kernels, self.query, self.slab, self.batch, self.shape)


def _batch(tables: Tensor, *, new: int, length: int) -> AttentionBatch:
    num_seqs, device = len(tables), tables.device
    at = torch.arange(length - new, length, device=device)
    slots = tables[:, at // BLOCK_SIZE].long() * BLOCK_SIZE + at % BLOCK_SIZE
    return AttentionBatch(
        query_start_loc=torch.arange(0, (num_seqs + 1) * new, new, dtype=torch.int32, device=device),
        seq_lens=torch.full((num_seqs,), length, dtype=torch.int32, device=device),
        block_tables=tables,
        slot_mapping=slots.flatten(),
        query_lens_host=(new,) * num_seqs,
        seq_lens_host=(length,) * num_seqs,
    )


def _problem(
    bench: Bench,
    shape: Shape,
    *,
    num_seqs: int,
    new: int,
    length: int,
    kept: torch.dtype,
    deterministic: bool,
) -> Problem:
    kernels = bench.home(deterministic=deterministic)
    kv = KvShape(block_size=BLOCK_SIZE, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=kept)
    blocks_each = -(-length // BLOCK_SIZE)
    block = ops.kv_block(kernels, kv)
    pools = [
        torch.zeros(num_seqs * blocks_each, *block.shape, dtype=block.dtype, device=bench.device)
        for _ in range(2)
    ]
    slab = KvSlab(keys=pools[0], values=pools[1], shape=kv)
    tables = torch.randperm(num_seqs * blocks_each, device=bench.device).int().view(num_seqs, blocks_each)
    sizes = (num_seqs, length, shape.kv_heads, shape.head_dim)
    keys, values = bench.rand(*sizes), bench.rand(*sizes)
    every = _batch(tables, new=length, length=length)
    ops.write_kv(kernels, keys.flatten(0, 1), values.flatten(0, 1), slab, every.slot_mapping)
    return Problem(
        query=bench.rand(num_seqs * new, shape.heads, shape.head_dim),
        keys=keys,
        values=values,
        slab=slab,
        batch=_batch(tables, new=new, length=length),
        shape=ops.AttentionShape(scale=shape.head_dim**-0.5),
        kernels=kernels,
    )


def _plain_decode(problem: Problem, seq: int) -> Tensor:
    """[H, D] float32: attention of the one new token of a sequence over all its keys."""
    keys, values = problem.keys[seq].float(), problem.values[seq].float()
    query = problem.query[seq].float().view(keys.shape[1], -1, keys.shape[2])
    scores = torch.einsum("ngd,lnd->ngl", query, keys) * problem.shape.scale
    return torch.einsum("ngl,lnd->ngd", torch.softmax(scores, -1), values).flatten(0, 1)


def _error(got: Tensor, expected: Tensor) -> float:
    difference = (got.float() - expected.float()).abs().max() / expected.float().abs().max()
    return difference.item()


def decode(
    bench: Bench,
    shape: Shape,
    *,
    num_seqs: int,
    length: int,
    bandwidth: float,
    kept: torch.dtype = torch.bfloat16,
    deterministic: bool = False,
    bar: float | None = None,
) -> Row:
    """A step of one new token a sequence."""
    num_seqs, length, shape = (2, 70, DRY) if bench.is_dry else (num_seqs, length, shape)
    num_bytes = (
        num_seqs
        * length
        * shape.kv_heads
        * 2
        * (shape.head_dim * kept.itemsize + (4 if kept.itemsize == 1 else 0))
    )
    make = partial(
        _problem,
        bench,
        shape,
        num_seqs=num_seqs,
        new=1,
        length=length,
        kept=kept,
        deterministic=deterministic,
    )
    problems = [make() for _ in range(bench.copies(num_bytes))]
    got = problems[0].attend()
    error = max(_error(got[seq], _plain_decode(problems[0], seq)) for seq in {0, num_seqs - 1})
    seconds = seconds_of(bench, [problem.attend for problem in problems])
    word = f"{WORDS[kept]}{', deterministic' if deterministic else ''}"
    return Row(
        name=f"{shape.name} decode, batch {num_seqs}, context {length}, {word}",
        seconds=seconds,
        fraction=num_bytes / bandwidth / seconds,
        bar=bar,
        error=error,
        tolerance=TOLERANCE[kept],
        details={"bound_us": num_bytes / bandwidth * 1e6, "TB/s": num_bytes / seconds / 1e12},
    )


def _flash(query: Tensor, keys: Tensor, values: Tensor, *, scale: float) -> Tensor:
    return scaled_dot_product_attention(
        query, keys, values, is_causal=True, scale=scale, enable_gqa=query.shape[1] != keys.shape[1]
    )


def prefill(
    bench: Bench,
    shape: Shape,
    *,
    num_seqs: int,
    length: int,
    peak: float,
    deterministic: bool = False,
    bar: float | None = None,
) -> Row:
    """Whole prompts, with none of their tokens computed before."""
    num_seqs, length, shape = (2, 70, DRY) if bench.is_dry else (num_seqs, length, shape)
    problem = _problem(
        bench,
        shape,
        num_seqs=num_seqs,
        new=length,
        length=length,
        kept=torch.bfloat16,
        deterministic=deterministic,
    )
    grouped = problem.query.view(num_seqs, length, shape.heads, shape.head_dim)
    query, keys, values = (
        each.transpose(1, 2).contiguous() for each in (grouped, problem.keys, problem.values)
    )
    with nullcontext() if bench.is_dry else sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        torchs = partial(_flash, query, keys, values, scale=problem.shape.scale)
        expected = torchs().transpose(1, 2).flatten(0, 1)
        torch_s = seconds_of(bench, [torchs])
    error = _error(problem.attend(), expected)
    seconds = seconds_of(bench, [problem.attend])
    num_flops = 2.0 * num_seqs * shape.heads * length**2 * shape.head_dim
    word = ", deterministic" if deterministic else ""
    return Row(
        name=f"{shape.name} prefill, {num_seqs} of {length}{word}",
        seconds=seconds,
        fraction=torch_s / seconds,
        bar=bar,
        error=error,
        tolerance=TOLERANCE[torch.bfloat16],
        details={
            "torch_us": torch_s * 1e6,
            "TFLOP/s": num_flops / seconds / 1e12,
            "of_peak": num_flops / seconds / peak,
        },
    )


def write(bench: Bench, shape: Shape, *, num_rows: int, kept: torch.dtype, bandwidth: float) -> Row:
    """New keys and values into their blocks."""
    length, shape = (70, DRY) if bench.is_dry else (num_rows, shape)
    problem = _problem(bench, shape, num_seqs=1, new=length, length=length, kept=kept, deterministic=False)
    keys, values = problem.keys[0], problem.values[0]
    num_bytes = keys.nbytes * 2 + 2 * length * shape.kv_heads * (
        shape.head_dim * kept.itemsize + (4 if kept.itemsize == 1 else 0)
    )
    call = partial(ops.write_kv, problem.kernels, keys, values, problem.slab, problem.batch.slot_mapping)
    seconds = seconds_of(bench, [call])
    return Row(
        name=f"{shape.name} write, {length} rows, {WORDS[kept]}",
        seconds=seconds,
        fraction=num_bytes / bandwidth / seconds,
        bar=None,
        error=0.0,  # attention over what it wrote is checked above
        tolerance=0.0,
        details={"TB/s": num_bytes / seconds / 1e12},
    )


def cases(bench: Bench, *, bandwidth: float, peak: float) -> Iterator[Callable[[], Row]]:
    """All, those with a bar first; each is built when it is called."""
    for shape in (LARGE, SMALL):
        for num_seqs in (1, 8):
            yield partial(
                decode, bench, shape, num_seqs=num_seqs, length=32768, bandwidth=bandwidth, bar=DECODE_BAR
            )
        yield partial(prefill, bench, shape, num_seqs=1, length=8192, peak=peak, bar=PREFILL_BAR)
        yield partial(prefill, bench, shape, num_seqs=4, length=2048, peak=peak, bar=PREFILL_BAR)
    for num_seqs, length in ((64, 2048), (256, 512)):
        yield partial(decode, bench, LARGE, num_seqs=num_seqs, length=length, bandwidth=bandwidth)
    for kept in (torch.int8, torch.float8_e4m3fn):
        for num_seqs in (1, 8):
            yield partial(
                decode, bench, LARGE, num_seqs=num_seqs, length=32768, bandwidth=bandwidth, kept=kept
            )
    for num_seqs, length in ((1, 32768), (64, 2048)):
        yield partial(
            decode, bench, LARGE, num_seqs=num_seqs, length=length, bandwidth=bandwidth, deterministic=True
        )
    yield partial(prefill, bench, LARGE, num_seqs=1, length=8192, peak=peak, deterministic=True)
    for kept in WORDS:
        for num_rows in (64, 8192):
            yield partial(write, bench, LARGE, num_rows=num_rows, kept=kept, bandwidth=bandwidth)


LONG_TILES: Final = (
    (128, 64, 8, 3),
    (64, 64, 4, 3),
    (64, 128, 4, 3),
    (128, 128, 8, 2),
    (128, 32, 4, 3),
    (128, 64, 8, 2),
)
SHORT_TILES: Final = (
    (16, 64, 4, 5),
    (16, 64, 4, 3),
    (16, 128, 4, 3),
    (16, 128, 8, 5),
    (16, 32, 4, 5),
    (16, 64, 2, 5),
)


def _always(made: Tile) -> Callable[..., Tile]:
    def tile(heads: Heads, **_: int) -> Tile:
        del heads
        return made

    return tile


def sweep(bench: Bench, *, bandwidth: float, peak: float) -> Iterator[Row]:
    """The cases of the bars with other tiles: rows, keys, warps, stages."""
    decodes = [
        partial(decode, bench, LARGE, num_seqs=num_seqs, length=32768, bandwidth=bandwidth)
        for num_seqs in (1, 8)
    ]
    prefills = partial(prefill, bench, LARGE, num_seqs=1, length=8192, peak=peak)
    runs: list[tuple[str, tuple[tuple[int, int, int, int], ...], Callable[[], Row]]] = [
        ("long_tile", LONG_TILES, prefills),
        *(("short_tile", SHORT_TILES, each) for each in decodes),
    ]
    for name, candidates, call in runs:
        usual = getattr(tiles, name)
        for block_m, block_n, num_warps, num_stages in candidates[: 1 if bench.is_dry else None]:
            tile = Tile(block_m=block_m, block_n=block_n, num_warps=num_warps, num_stages=num_stages)
            setattr(tiles, name, _always(tile))
            print(tile)
            yield call()
        setattr(tiles, name, usual)


def run(bench: Bench, *, limit_s: float, is_sweep: bool) -> dict[str, Any]:
    """Measure until the time is up."""
    began_s, rows, left_out = time.monotonic(), list[Row](), 0
    bandwidth, peak = ceilings(bench)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s")
    for make in cases(bench, bandwidth=bandwidth, peak=peak):
        if time.monotonic() - began_s > limit_s:
            left_out += 1
            continue
        rows.append(make())
        print(rows[-1], flush=True)
        if not bench.is_dry:
            torch.cuda.empty_cache()
    tried = []
    for row in sweep(bench, bandwidth=bandwidth, peak=peak) if is_sweep else ():
        print(row, flush=True)
        tried.append(row)
    return {
        "copy_bytes_per_s": bandwidth,
        "bf16_flops_per_s": peak,
        "rows": [_record(row) for row in rows],
        "sweep": [_record(row) for row in tried],
        "left_out": left_out,
    }


def _record(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "us": round(row.seconds * 1e6, 2),
        "fraction": round(row.fraction, 3),
        "bar": row.bar,
        "error": round(row.error, 5),
        "is_right": row.is_right,
        **{name: float(f"{value:.4g}") for name, value in row.details.items()},
    }


def main() -> int:
    """Measure, print, write OUT/attention_kernels.json."""
    parser = make_parser("attention", doc=__doc__, limit_s=160.0)
    parser.add_argument("--sweep", action="store_true", help="try other tiles too")
    options = parser.parse_args()

    def measured(bench: Bench) -> dict[str, Any]:  # JSON
        return run(bench, limit_s=options.limit_s, is_sweep=options.sweep)

    found = run_and_write("attention", options, measured=measured)
    return 0 if all(row["is_right"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
