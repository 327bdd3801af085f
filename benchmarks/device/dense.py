"""Products, norms, experts and adapters on a CUDA device, each beside its bound.

The bound of a kernel is the larger of its bytes over the copy bandwidth and its operations over the bf16
peak, both measured just before. Calls go round through copies that together are larger than the cache, as one
recorded graph, so that no launch is waited for. Every result is compared with plain float32 products first; a
case whose result is wrong fails the run, and so does a row of --deterministic that has other bits alone than
in a batch. Cases are in order of weight: when the time is up, the rest is left out and counted. Run by
`python -m benchmarks.device dense`, or alone: `python -m benchmarks.device.dense`.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, LoraSites, LowRankPair
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization
from penstock.kernels.reference.quantize import quantize_dequantize, round_inputs
from penstock.kernels.registry import HOMES

COLD_BYTES: Final = 256 << 20
"""Together, of the copies that calls go round through: several times the cache of an H200."""
MAX_COPIES: Final = 32
ROUNDS: Final = 7
TOLERANCE: Final = 1.5e-2
"""Largest error beside the largest value: a bfloat16 keeps 8 bits, a sum of some thousand errs less."""

LARGE: Final = {
    "gate and up": (28672, 4096),
    "down": (4096, 14336),
    "query, key, value": (6144, 4096),
    "output": (4096, 4096),
}
SMALL: Final = {
    "gate and up": (16384, 2048),
    "down": (2048, 8192),
    "query, key, value": (3072, 2048),
    "output": (2048, 2048),
}
APART: Final = {
    ("8b", "gate and up"): (14336, 14336),
    ("8b", "query, key, value"): (4096, 1024, 1024),
    ("1b", "gate and up"): (8192, 8192),
    ("1b", "query, key, value"): (2048, 512, 512),
}
"""Outputs of the products that these are made of."""
HEADS: Final = {"8b": (128_256, 4096), "1b": (128_256, 2048)}
FORMATS: Final = {
    "int8": Quantization(method="int8", activations="bf16"),
    "int8, rounded inputs": Quantization(method="int8"),
    "int4": Quantization(method="int4", activations="bf16"),
    "int4, rounded inputs": Quantization(method="int4"),
    "fp8, rounded inputs": Quantization(method="fp8"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel at one size."""

    name: str
    calls: Sequence[Callable[[], object]]
    """The same on different copies."""
    num_bytes: float
    """Read and written by one call."""
    num_flops: float
    error: float
    """Largest error of the first call over the largest value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """Where to measure."""

    device: str
    is_dry: bool

    def rand(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Of the model's dtype."""
        return torch.randn(*shape, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def size(self, real: int) -> int:
        """Tiny in a dry run, and not a round number."""
        return min(real, 40 + real % 7) if self.is_dry else real

    def copies(self, num_bytes: int) -> int:
        """How many make the caches cold."""
        return 1 if self.is_dry else max(1, min(MAX_COPIES, COLD_BYTES // max(1, num_bytes)))

    def home(self, *, deterministic: bool = False) -> ops.KernelSet:
        """The kernels."""
        return HOMES["triton"].build(KernelOptions(is_deterministic=deterministic))


def _error(got: Tensor, expected: Tensor) -> float:
    difference = (got.float() - expected).abs().max() / expected.abs().max()
    return difference.item()


def _product(
    bench: Bench,
    name: str,
    shape: tuple[int, int],
    *,
    rows: int,
    rule: Quantization,
    deterministic: bool = False,
) -> Case:
    outputs, inputs = (bench.size(each) for each in shape)
    kernels, rows = bench.home(deterministic=deterministic), bench.size(rows)
    dense = bench.rand(outputs, inputs, scale=inputs**-0.5)
    first = ops.prepare_linear(kernels, dense, quantization=rule)
    number = bench.copies(first.num_bytes)
    weights = [
        first,
        *(ops.prepare_linear(kernels, dense.clone(), quantization=rule) for _ in range(number - 1)),
    ]
    x = bench.rand(rows, inputs)
    meant = dense.float() if rule.method == "none" else quantize_dequantize(dense, rule)
    seen = round_inputs(x, rule) if rule.quantizes_activations else x.float()
    error = _error(ops.linear(kernels, x, first), seen @ meant.t())
    return Case(
        name=name,
        calls=[lambda weight=weight: ops.linear(kernels, x, weight) for weight in weights],  # type: ignore[misc]  # bound early
        num_bytes=first.num_bytes + x.nbytes + rows * outputs * 2,
        num_flops=2.0 * rows * outputs * inputs,
        error=error,
    )


def _library(bench: Bench, part: str) -> Case:
    """The same product of a single row by torch, to see which of the two should serve it."""
    outputs, inputs = (bench.size(each) for each in LARGE[part])
    weights = [
        bench.rand(outputs, inputs, scale=inputs**-0.5) for _ in range(bench.copies(2 * outputs * inputs))
    ]
    x = bench.rand(1, inputs)
    return Case(
        name=f"8b {part}, bf16, 1 row, by torch",
        calls=[lambda weight=weight: torch.nn.functional.linear(x, weight) for weight in weights],  # type: ignore[misc]  # bound early
        num_bytes=weights[0].nbytes,
        num_flops=2.0 * outputs * inputs,
        error=_error(torch.nn.functional.linear(x, weights[0]), x.float() @ weights[0].float().t()),
    )


def _apart(bench: Bench, model: str, part: str) -> Case:
    """A joined product of a single row as those that it is made of, in turn: what the join is worth."""
    sizes = [bench.size(each) for each in APART[model, part]]
    kernels, inputs = bench.home(), bench.size((LARGE if model == "8b" else SMALL)[part][1])
    dense = [
        [bench.rand(size, inputs, scale=inputs**-0.5) for size in sizes]
        for _ in range(bench.copies(2 * sum(sizes) * inputs))
    ]
    copies = [[ops.prepare_linear(kernels, each) for each in each_copy] for each_copy in dense]
    x = bench.rand(1, inputs)
    got = torch.cat([ops.linear(kernels, x, weight) for weight in copies[0]], dim=1)
    return Case(
        name=f"{model} {part}, bf16, 1 row, apart",
        calls=[lambda apart=apart: [ops.linear(kernels, x, weight) for weight in apart] for apart in copies],  # type: ignore[misc]  # bound early
        num_bytes=2 * sum(sizes) * inputs + x.nbytes + got.nbytes,
        num_flops=2.0 * sum(sizes) * inputs,
        error=_error(got, x.float() @ torch.cat(dense[0]).float().t()),
    )


SLICES: Final = ((0, 1), (63, 64), (5, 70), (64, 300), (299, 300))
"""Rows that are computed again without the others, of 300."""


def unequal_rows(bench: Bench) -> list[str]:
    """What --deterministic promises: forms of weights whose rows have other bits alone than among 300."""
    found = []
    kernels, inputs, outputs = bench.home(deterministic=True), bench.size(4096), bench.size(4096)
    for word, rule in {"bf16": NO_QUANTIZATION, **FORMATS}.items():
        weight = ops.prepare_linear(kernels, bench.rand(outputs, inputs), quantization=rule)
        x = bench.rand(300, inputs)
        whole = ops.linear(kernels, x, weight)
        if any(not torch.equal(ops.linear(kernels, x[a:b], weight), whole[a:b]) for a, b in SLICES):
            found.append(word)
    x, router = bench.rand(300, inputs), bench.rand(8, inputs)
    experts, shape = _small_experts(bench, kernels, inputs), ops.MoeShape(top_k=2, renormalize=True)
    whole = ops.moe(kernels, x, router, experts, shape)
    if any(not torch.equal(ops.moe(kernels, x[a:b], router, experts, shape), whole[a:b]) for a, b in SLICES):
        found.append("experts")
    return found


def _small_experts(bench: Bench, kernels: ops.KernelSet, inputs: int) -> list[ops.ExpertWeights]:
    inner = bench.size(768)

    def prepared(*shape: int) -> ops.LinearWeight:
        return ops.prepare_linear(kernels, bench.rand(*shape, scale=shape[1] ** -0.5))

    return [
        ops.ExpertWeights(
            gate=prepared(inner, inputs), up=prepared(inner, inputs), down=prepared(inputs, inner)
        )
        for _ in range(8)
    ]


def _comparisons(bench: Bench) -> Iterator[Callable[[], Case]]:
    """A single row by others than what serves it."""
    for part in LARGE:
        yield lambda part=part: _library(bench, part)  # type: ignore[misc]  # bound early
    for model, part in APART:
        yield lambda model=model, part=part: _apart(bench, model, part)  # type: ignore[misc]  # bound early


def _products(bench: Bench) -> Iterator[Callable[[], Case]]:
    for model, shapes in (("8b", LARGE), ("1b", SMALL)):
        for part, shape in (*shapes.items(), ("head", HEADS[model])):
            yield lambda model=model, part=part, shape=shape: _product(  # type: ignore[misc]  # bound early
                bench, f"{model} {part}, bf16, 1 row", shape, rows=1, rule=NO_QUANTIZATION
            )
    yield from _comparisons(bench)
    for rows in (1, 16, 256):
        for word, rule in FORMATS.items():
            for part in ("gate and up", "down"):
                yield lambda rows=rows, word=word, rule=rule, part=part: _product(  # type: ignore[misc]  # bound early
                    bench, f"8b {part}, {word}, {rows} rows", LARGE[part], rows=rows, rule=rule
                )
    for rows in (1, 64, 8192):
        for word, deterministic in (("bf16", False), ("bf16 deterministic", True)):
            for part in ("gate and up", "down"):
                yield lambda rows=rows, word=word, deterministic=deterministic, part=part: _product(  # type: ignore[misc]  # bound early
                    bench,
                    f"8b {part}, {word}, {rows} rows",
                    LARGE[part],
                    rows=rows,
                    rule=NO_QUANTIZATION,
                    deterministic=deterministic,
                )


def _norm(bench: Bench, rows: int) -> Case:
    kernels, rows, width = bench.home(), bench.size(rows), bench.size(4096)
    pairs = [
        (bench.rand(rows, width), bench.rand(rows, width)) for _ in range(bench.copies(4 * rows * width))
    ]
    weight, (x, residual) = bench.rand(width), pairs[0]
    summed = (x + residual).float()
    expected = summed / (summed.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.float()
    return Case(
        name=f"norm of a sum, {rows} rows of {width}",
        calls=[lambda a=a, b=b: ops.add_rms_norm(kernels, a, b, weight, eps=1e-5) for a, b in pairs],  # type: ignore[misc]  # bound early
        num_bytes=4 * 2 * rows * width,
        num_flops=0.0,
        error=_error(ops.add_rms_norm(kernels, x, residual, weight, eps=1e-5)[0], expected),
    )


def _activation(bench: Bench, rows: int) -> Case:
    kernels, rows, width = bench.home(), bench.size(rows), bench.size(14336)
    joined = [bench.rand(rows, 2 * width) for _ in range(bench.copies(4 * rows * width))]
    pairs = [each.split(width, dim=1) for each in joined]  # as the product of gate and up leaves them
    gate, up = pairs[0]
    expected = torch.nn.functional.silu(gate.float()) * up.float()
    return Case(
        name=f"SiLU of {width}, {rows} rows",
        calls=[lambda a=a, b=b: ops.silu_and_mul(kernels, a, b) for a, b in pairs],  # type: ignore[misc]  # bound early
        num_bytes=3 * 2 * rows * width,
        num_flops=0.0,
        error=_error(ops.silu_and_mul(kernels, gate, up), expected),
    )


def _rotation(bench: Bench, rows: int) -> Case:
    """Of queries and keys as the product of query, key and value leaves them."""
    kernels, rows, heads, kv_heads = bench.home(), bench.size(rows), 32, 8
    whole = heads + 2 * kv_heads
    joined = [bench.rand(rows, whole, 128) for _ in range(bench.copies(2 * rows * whole * 128))]
    copies = [(each[:, :heads], each[:, heads : heads + kv_heads]) for each in joined]
    positions = torch.arange(rows, device=bench.device)
    frequencies = 10_000.0 ** (-torch.arange(64, device=bench.device) / 64)
    angles = ops.rope_angles(kernels, positions, frequencies)
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
    first, second = joined[0][:, : heads + kv_heads].float().chunk(2, dim=-1)
    expected = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return Case(
        name=f"rotation of {heads} and {kv_heads} heads, {rows} rows",
        calls=[lambda pair=pair: ops.rope(kernels, *pair, angles) for pair in copies],  # type: ignore[misc]  # bound early
        num_bytes=2 * 2 * rows * (heads + kv_heads) * 128 + angles.nbytes,
        num_flops=0.0,
        error=_error(torch.cat(ops.rope(kernels, *copies[0], angles), dim=1), expected),
    )


def _experts(bench: Bench, rows: int) -> Case:
    """A layer of 128 small experts, 8 a token (Qwen3-30B-A3B)."""
    kernels, rows = bench.home(), bench.size(rows)
    hidden, inner = bench.size(2048), bench.size(768)
    number, top_k = (6, 2) if bench.is_dry else (128, 8)
    dense = [
        (bench.rand(inner, hidden, scale=hidden**-0.5), bench.rand(inner, hidden, scale=hidden**-0.5),
         bench.rand(hidden, inner, scale=inner**-0.5))
        for _ in range(number)
    ]  # fmt: skip
    prepared = [[ops.prepare_linear(kernels, each) for each in expert] for expert in dense]
    experts = [ops.ExpertWeights(gate=gate, up=up, down=down) for gate, up, down in prepared]
    x, router, shape = (
        bench.rand(rows, hidden),
        bench.rand(number, hidden),
        ops.MoeShape(top_k=top_k, renormalize=True),
    )
    weights, chosen = torch.softmax(x.float() @ router.float().t(), dim=-1).topk(top_k)
    used = len(set(chosen.flatten().tolist()))
    expected = torch.zeros(rows, hidden, device=bench.device)
    for expert, (gate, up, down) in enumerate(dense):
        share = (weights * (chosen == expert)).sum(1, keepdim=True) / weights.sum(1, keepdim=True)
        part = torch.nn.functional.silu(x.float() @ gate.float().t()) * (x.float() @ up.float().t())
        expected += share * (part @ down.float().t())
    return Case(
        name=f"{number} experts, {top_k} a token, {rows} rows",
        calls=[lambda: ops.moe(kernels, x, router, experts, shape)],
        num_bytes=used * 3 * hidden * inner * 2 + 2 * x.nbytes,
        num_flops=6.0 * rows * top_k * hidden * inner,
        error=_error(ops.moe(kernels, x, router, experts, shape), expected),
    )


def _adapters(bench: Bench, rows: int) -> Case:
    """A row's own adapter of rank 16 each on a product of 4096 by 4096."""
    kernels, rows = bench.home(), bench.size(rows)
    inputs, outputs, rank = bench.size(4096), bench.size(4096), 16
    site = LoraSites().add("module", in_features=inputs, out_features=outputs)
    pairs = [
        LowRankPair(
            a=bench.rand(rank, inputs, scale=inputs**-0.5), b=bench.rand(outputs, rank, scale=0.25), scale=2.0
        )
        for _ in range(rows)
    ]
    site.active.rows = tuple(
        AdapterRows(
            first_row=row,
            num_rows=1,
            weights=ops.prepare_adapter(kernels, {0: pair}, num_sites=1, dtype=torch.bfloat16),
        )
        for row, pair in enumerate(pairs)
    )
    x, y = bench.rand(rows, inputs), bench.rand(rows, outputs)
    added = [2.0 * (x[i].float() @ pair.a.float().t()) @ pair.b.float().t() for i, pair in enumerate(pairs)]
    return Case(
        name=f"{rows} adapters of rank {rank}, a row each",
        calls=[lambda: ops.lora(kernels, x, y, site)],
        num_bytes=rows * rank * (inputs + outputs) * 2 + x.nbytes + 2 * y.nbytes,
        num_flops=2.0 * rows * rank * (inputs + outputs),
        error=_error(ops.lora(kernels, x, y.clone(), site), y.float() + torch.stack(added)),
    )


def cases(bench: Bench) -> Iterator[Callable[[], Case]]:
    """All, the weightiest first; each is built when it is called."""
    yield from _products(bench)
    for rows in (64, 8192):
        yield lambda rows=rows: _norm(bench, rows)  # type: ignore[misc]  # bound early
        yield lambda rows=rows: _activation(bench, rows)  # type: ignore[misc]  # bound early
        yield lambda rows=rows: _rotation(bench, rows)  # type: ignore[misc]  # bound early
    for rows in (1, 64, 4096):
        yield lambda rows=rows: _experts(bench, rows)  # type: ignore[misc]  # bound early
    yield lambda: _adapters(bench, 64)


def seconds_of(bench: Bench, calls: Sequence[Callable[[], object]]) -> float:
    """Of one call, median over rounds of all of them."""
    for call in calls:
        call()
    if bench.is_dry:
        began_s = time.perf_counter()
        calls[0]()
        return time.perf_counter() - began_s
    turns = max(1, 16 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(turns):
            for call in calls:
                call()
    times_s = []
    for _ in range(ROUNDS + 1):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_s.append(begin.elapsed_time(end) / 1e3 / (turns * len(calls)))
    return statistics.median(times_s[1:])


def ceilings(bench: Bench) -> tuple[float, float]:
    """Bytes a second of a copy (read plus written) and operations a second of a large bf16 product."""
    size, side = (1 << 20, 64) if bench.is_dry else (1 << 30, 8192)
    source = torch.zeros(size, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    a, b = bench.rand(side, side), bench.rand(side, side)
    copy_s = seconds_of(bench, [lambda: target.copy_(source)])
    return 2 * size / copy_s, 2 * side**3 / seconds_of(bench, [lambda: a @ b])


def measure(bench: Bench, case: Case, *, bandwidth: float, peak: float) -> dict[str, Any]:
    """A row of the table."""
    seconds = seconds_of(bench, case.calls)
    bound_s = max(case.num_bytes / bandwidth, case.num_flops / peak)
    return {
        "name": case.name,
        "us": round(seconds * 1e6, 2),
        "bound_us": round(bound_s * 1e6, 2),
        "fraction": round(bound_s / seconds, 3),
        "gb_per_s": round(case.num_bytes / seconds / 1e9, 1),
        "tflop_per_s": round(case.num_flops / seconds / 1e12, 2),
        "error": round(case.error, 5),
        "is_right": case.error <= TOLERANCE,
    }


def run(bench: Bench, *, limit_s: float) -> dict[str, Any]:
    """Measure until the time is up."""
    began_s, rows, left_out = time.monotonic(), [], 0
    bandwidth, peak = ceilings(bench)
    print(f"copy {bandwidth / 1e12:.2f} TB/s, bf16 product {peak / 1e12:.0f} TFLOP/s")
    unequal = unequal_rows(bench)
    print(f"rows with other bits alone than in a batch: {', '.join(unequal) or 'none'}")
    for make in cases(bench):
        if time.monotonic() - began_s > limit_s:
            left_out += 1
            continue
        row = measure(bench, make(), bandwidth=bandwidth, peak=peak)
        rows.append(row)
        word = "" if row["is_right"] else f"  WRONG, error {row['error']}"
        print(f"{row['name']:44} {row['us']:10.1f} us  fraction {row['fraction']:6.3f}{word}", flush=True)
        if not bench.is_dry:
            torch.cuda.empty_cache()
    return {
        "copy_bytes_per_s": bandwidth,
        "bf16_flops_per_s": peak,
        "unequal_rows": unequal,
        "rows": rows,
        "left_out": left_out,
    }


def make_parser(name: str, *, doc: str | None, limit_s: float) -> argparse.ArgumentParser:
    """The options of every file that measures kernels; `name` is the file's, `limit_s` the default."""
    parser = argparse.ArgumentParser(prog=f"benchmarks.device.{name}", description=doc)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, kernels interpreted")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "results" / "device")
    parser.add_argument("--limit-s", type=float, default=limit_s, help="no case begins later")
    return parser


def run_and_write(
    name: str,
    options: argparse.Namespace,
    *,
    measured: Callable[[Bench], dict[str, Any]],  # JSON
) -> dict[str, Any]:  # JSON
    """Measure and write OUT/NAME_kernels.json; returns what was found."""
    torch.manual_seed(0)
    bench = Bench(device="cpu" if options.dry_run else "cuda", is_dry=options.dry_run)
    with torch.inference_mode():
        found = measured(bench)
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"is_dry_run": options.dry_run, **found}, indent=1) + "\n"
    (options.out / f"{name}_kernels.json").write_text(text, encoding="utf-8")
    if found["left_out"]:
        print(f"{found['left_out']} cases were left out: the time was up")
    return found


def main() -> int:
    """Measure, print, write OUT/dense_kernels.json."""
    options = make_parser("dense", doc=__doc__, limit_s=160.0).parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    found = run_and_write("dense", options, measured=lambda bench: run(bench, limit_s=options.limit_s))
    return 0 if all(row["is_right"] for row in found["rows"]) and not found["unequal_rows"] else 1


if __name__ == "__main__":
    sys.exit(main())
