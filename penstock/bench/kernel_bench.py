"""Each operation alone: time, bytes and operations a second, and the share of what the machine can do.

The bound of an operation is the larger of (bytes it must move / read bandwidth) and (operations / multiply
peak); the share reached is that bound over the time taken. Both limits are measured just before. Weights are
taken from a row of copies larger than the caches, so that a weight is read from memory as in a decode step.
A home that records models (the native one) is timed as a model runs on it: the calls behind one another in
one program, each timed inside it. Other homes are called one by one through `kernels/ops`, and a call's own
cost counts.
"""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final, Literal, Protocol, runtime_checkable

import torch
from rich.table import Table
from torch import Tensor

from penstock.bench.machine_limits import MachineLimits
from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, KvShape
from penstock.kernels.ops import AttentionShape, KernelSet
from penstock.kernels.quantization import Quantization

Format = Literal["bf16", "int8", "int4"]
FORMATS: Final[tuple[Format, ...]] = ("bf16", "int8", "int4")
KV_DTYPES: Final[dict[Format, torch.dtype]] = {"bf16": torch.bfloat16, "int8": torch.int8}
COLD_BYTES: Final = 96 << 20
"""Of all copies of a weight together: three times the last cache of a small server."""
COPIES_MAX: Final = 48
COPIES_MIN: Final = 3
CALLS_MIN: Final = 5
CALLS_MAX: Final = 10_000
ALIKE: Final = 16
"""Calls in a row of what reads nothing large."""
BLOCK_SIZE: Final = 16
KEPT_BYTES: Final[dict[Format, float]] = {"bf16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a decoder that its operations have."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int

    @property
    def products(self) -> dict[str, tuple[int, int]]:
        """[O, I] of each product of a layer, as the layers join them, and of the head."""
        qkv = (self.heads + 2 * self.kv_heads) * self.head_dim
        return {
            "qkv": (qkv, self.hidden),
            "attention out": (self.hidden, self.heads * self.head_dim),
            "gate and up": (2 * self.inner, self.hidden),
            "down": (self.hidden, self.inner),
            "head": (self.vocab, self.hidden),
        }


SHAPES: Final[dict[str, ModelShape]] = {
    "tiny": ModelShape(name="tiny", hidden=64, heads=4, kv_heads=2, head_dim=32, inner=128, vocab=512),
    "qwen2.5-0.5b": ModelShape(
        name="qwen2.5-0.5b", hidden=896, heads=14, kv_heads=2, head_dim=64, inner=4864, vocab=151_936
    ),
    "llama-3.2-1b": ModelShape(
        name="llama-3.2-1b", hidden=2048, heads=32, kv_heads=8, head_dim=64, inner=8192, vocab=128_256
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation of one size, ready to be called."""

    operation: str
    size: str
    num_bytes: float
    """That must be read or written at least."""
    num_operations: float
    """Multiplies and adds."""
    peak: Format
    """int4 and int8 multiply int8, if activations are rounded too."""
    calls: tuple[Callable[[], object], ...]
    """The same operation, two or more times, over memory of its own where that is large."""
    rows: int
    batch: AttentionBatch | None = None


@runtime_checkable
class TimesCalls(Protocol):
    """A home that times calls inside its recorded programs."""

    def time_calls(
        self,
        calls: Sequence[Callable[[], object]],
        *,
        rows: int,
        batch: AttentionBatch | None,
        repeats: int,
    ) -> list[float]:
        """For each repeat the mean seconds of all but the first."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a case took."""

    case: Case
    median_s: float
    least_s: float

    def row(self, limits: MachineLimits) -> dict[str, object]:
        """For the JSON; `share` is the bound over the median time."""
        peak = (limits.bf16_tflops if self.case.peak == "bf16" else limits.int8_tops) * 1e12
        bandwidth_s = self.case.num_bytes / (limits.read_gb_per_s * 1e9)
        bound_s = max(bandwidth_s, self.case.num_operations / peak)
        return {
            "operation": self.case.operation,
            "size": self.case.size,
            "median_us": round(self.median_s * 1e6, 2),
            "least_us": round(self.least_s * 1e6, 2),
            "gb_per_s": round(self.case.num_bytes / self.median_s / 1e9, 3),
            "gop_per_s": round(self.case.num_operations / self.median_s / 1e9, 3),
            "bound": "bandwidth" if bound_s == bandwidth_s else "multiply",
            "share": round(bound_s / self.median_s, 4),
        }


def measure(kernels: KernelSet, case: Case, *, seconds: float) -> Measured:
    """Call it for about `seconds`, at least five times, after a round of calls that are not counted."""
    if isinstance(kernels, TimesCalls):
        once = partial(kernels.time_calls, case.calls, rows=case.rows, batch=case.batch)
        began_s = time.perf_counter()
        once(repeats=1)
        round_s = time.perf_counter() - began_s
        repeats = min(max(seconds / round_s, CALLS_MIN), CALLS_MAX)
        times_s = once(repeats=math.ceil(repeats))
    else:
        times_s = _call_one_by_one(case, seconds=seconds)
    return Measured(case=case, median_s=statistics.median(times_s), least_s=min(times_s))


def _call_one_by_one(case: Case, *, seconds: float) -> list[float]:
    for call in case.calls[:2]:
        call()
    times_s: list[float] = []
    end_s = time.perf_counter() + seconds
    for call in itertools.islice(itertools.cycle(case.calls), CALLS_MAX):
        if len(times_s) >= CALLS_MIN and time.perf_counter() > end_s:
            break
        began_s = time.perf_counter()
        call()
        times_s.append(time.perf_counter() - began_s)
    return times_s


# -- the cases -----------------------------------------------------------------------------------------------


def make_cases(
    kernels: KernelSet,
    shape: ModelShape,
    *,
    operations: Sequence[str],
    formats: Sequence[Format],
    rows: Sequence[int],
    cold_bytes: int = COLD_BYTES,
) -> Iterator[Case]:
    """Cases one by one, so that the weights of one are gone before the next are made."""
    if "linear" in operations:
        for name, product in shape.products.items():
            for kept in formats:
                yield from _linear(kernels, name, product, kept=kept, rows=rows, cold_bytes=cold_bytes)
    for each, make in MAKERS.items():
        if each in operations:
            for num_rows in rows:
                yield make(kernels, shape, num_rows)
    if "attention" in operations:
        decodes = [(num_rows, 512) for num_rows in rows] + [(1, 4096), (8, 4096)]
        sizes = [([1] * num, [length] * num) for num, length in decodes] + [([512], [512])]
        for kept in (each for each in formats if each in KV_DTYPES):
            for query_lens, lens in sizes:
                yield _attention(
                    kernels, shape, kept=kept, query_lens=query_lens, lens=lens, cold_bytes=cold_bytes
                )


def _linear(
    kernels: KernelSet,
    name: str,
    product: tuple[int, int],
    *,
    kept: Format,
    rows: Sequence[int],
    cold_bytes: int,
) -> Iterator[Case]:
    num_out, num_in = product
    quantization = Quantization(method="none" if kept == "bf16" else kept)
    weight_bytes = num_out * num_in * KEPT_BYTES[kept]
    num_copies = _num_copies(int(weight_bytes), cold_bytes)
    dense = torch.randn(num_out, num_in).mul_(0.02).to(torch.bfloat16)
    weights = [ops.prepare_linear(kernels, dense, quantization=quantization) for _ in range(num_copies)]
    repeats = -(-COPIES_MIN // num_copies)  # a weight larger than the caches is cold each time
    for num_rows in rows:
        x = torch.randn(num_rows, num_in).to(torch.bfloat16)
        yield Case(
            operation=f"linear {name} {kept}",
            size=f"{num_rows} x {num_in} -> {num_out}",
            num_bytes=weight_bytes + 2.0 * num_rows * (num_in + num_out),
            num_operations=2.0 * num_rows * num_in * num_out,
            peak=kept,
            calls=tuple(partial(ops.linear, kernels, x, weight) for weight in weights * repeats),
            rows=num_rows,
        )


def _num_copies(num_bytes: int, cold_bytes: int) -> int:
    """Of memory that a call reads, so that all together are larger than the caches."""
    return min(COPIES_MAX, max(1, -(-cold_bytes // num_bytes)))


def _rows(num_rows: int, width: int) -> Tensor:
    return torch.randn(num_rows, width).to(torch.bfloat16)


def _norm(kernels: KernelSet, shape: ModelShape, num_rows: int) -> Case:
    x, residual = _rows(num_rows, shape.hidden), _rows(num_rows, shape.hidden)
    weight = torch.ones(shape.hidden, dtype=torch.bfloat16)
    return Case(
        operation="add and rms norm",
        size=f"{num_rows} x {shape.hidden}",
        num_bytes=2.0 * 4 * x.numel(),
        num_operations=4.0 * x.numel(),
        peak="bf16",
        calls=(partial(ops.add_rms_norm, kernels, x, residual, weight, eps=1e-6),) * ALIKE,
        rows=num_rows,
    )


def _activation(kernels: KernelSet, shape: ModelShape, num_rows: int) -> Case:
    gate, up = _rows(num_rows, shape.inner), _rows(num_rows, shape.inner)
    return Case(
        operation="silu and mul",
        size=f"{num_rows} x {shape.inner}",
        num_bytes=2.0 * 3 * gate.numel(),
        num_operations=4.0 * gate.numel(),
        peak="bf16",
        calls=(partial(ops.silu_and_mul, kernels, gate, up),) * ALIKE,
        rows=num_rows,
    )


def _rope(kernels: KernelSet, shape: ModelShape, num_rows: int) -> Case:
    query, key = (
        torch.randn(num_rows, heads, shape.head_dim).to(torch.bfloat16)
        for heads in (shape.heads, shape.kv_heads)
    )
    numel = query.numel() + key.numel()
    frequencies = 1.0 / 10_000 ** (torch.arange(shape.head_dim // 2) * 2 / shape.head_dim)
    angles = ops.rope_angles(kernels, torch.arange(num_rows), frequencies.float())
    return Case(
        operation="rope",
        size=f"{num_rows} x ({shape.heads} + {shape.kv_heads}) x {shape.head_dim}",
        num_bytes=2.0 * 2 * numel + 4.0 * angles.numel(),
        num_operations=3.0 * numel,
        peak="bf16",
        calls=(partial(ops.rope, kernels, query, key, angles),) * ALIKE,
        rows=num_rows,
    )


def _embedding(kernels: KernelSet, shape: ModelShape, num_rows: int) -> Case:
    table = torch.zeros(shape.vocab, shape.hidden, dtype=torch.bfloat16)
    token_ids = torch.randint(shape.vocab, (num_rows,))
    return Case(
        operation="embedding",
        size=f"{num_rows} x {shape.hidden}",
        num_bytes=2.0 * 2 * num_rows * shape.hidden,
        num_operations=0.0,
        peak="bf16",
        calls=(partial(ops.embedding, kernels, token_ids, table),) * ALIKE,
        rows=num_rows,
    )


MAKERS: Final[dict[str, Callable[[KernelSet, ModelShape, int], Case]]] = {
    "norm": _norm,
    "activation": _activation,
    "rope": _rope,
    "embedding": _embedding,
}
OPERATIONS: Final = ("linear", *MAKERS, "attention")


def _attention(
    kernels: KernelSet,
    shape: ModelShape,
    *,
    kept: Format,
    query_lens: Sequence[int],
    lens: Sequence[int],
    cold_bytes: int,
) -> Case:
    """Sequences with blocks of their own, the table of each in order, for as many layers as are cold."""
    num_blocks = [-(-length // BLOCK_SIZE) for length in lens]
    kv = KvShape(
        block_size=BLOCK_SIZE, num_kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=KV_DTYPES[kept]
    )
    kv_bytes = 2 * ops.kv_block(kernels, kv).num_bytes * sum(lens) // BLOCK_SIZE
    num_slabs = max(COPIES_MIN, _num_copies(kv_bytes, cold_bytes))
    slabs = [ops.make_slab(kernels, kv, num_blocks=sum(num_blocks)) for _ in range(num_slabs)]
    for slab in slabs:
        slab.keys.zero_()  # memory that was never written is one page of zeros
        slab.values.zero_()
    batch = _batch(query_lens=query_lens, lens=lens, num_blocks=num_blocks)
    query = torch.randn(sum(query_lens), shape.heads, shape.head_dim).to(torch.bfloat16)
    pairs = sum(n * (length - n) + n * (n + 1) // 2 for n, length in zip(query_lens, lens, strict=True))
    how = AttentionShape(scale=shape.head_dim**-0.5)
    return Case(
        operation=f"attention {'decode' if query_lens[0] == 1 else 'prefill'} {kept}",
        size=f"{len(lens)} x {lens[0]} tokens",
        num_bytes=float(kv_bytes + 2 * 2 * query.numel()),
        num_operations=4.0 * pairs * shape.heads * shape.head_dim,
        peak="bf16",
        calls=tuple(partial(ops.paged_attention, kernels, query, slab, batch, how) for slab in slabs),
        rows=sum(query_lens),
        batch=batch,
    )


def _batch(*, query_lens: Sequence[int], lens: Sequence[int], num_blocks: Sequence[int]) -> AttentionBatch:
    tables = torch.full((len(lens), max(num_blocks)), -1, dtype=torch.int32)
    slots, first = [], 0
    for row, (num_new, length, count) in enumerate(zip(query_lens, lens, num_blocks, strict=True)):
        tables[row, :count] = torch.arange(first, first + count)
        slots += [first * BLOCK_SIZE + position for position in range(length - num_new, length)]
        first += count
    starts = [0, *itertools.accumulate(query_lens)]
    return AttentionBatch(
        query_start_loc=torch.tensor(starts, dtype=torch.int32),
        seq_lens=torch.tensor(lens, dtype=torch.int32),
        block_tables=tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
        query_lens_host=tuple(query_lens),
        seq_lens_host=tuple(lens),
    )


COLUMNS: Final = ("operation", "size", "median_us", "gb_per_s", "gop_per_s", "bound", "share")


def make_table(rows: Sequence[dict[str, object]], *, title: str) -> Table:
    """One line a case."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column.replace("_", " "), justify="left" if column in COLUMNS[:2] else "right")
    for row in rows:
        cells = [str(row[column]) for column in COLUMNS[:-1]]
        table.add_row(*cells, f"{float(str(row['share'])):.0%}")
    return table
