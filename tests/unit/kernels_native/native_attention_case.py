"""A step of paged attention for the native kernels: its inputs, a way to run it, and the answer in float64.

The cache is filled by the native writes, so blocks are the kernels' own arrangement; everything that no query may
see (other slots, other blocks, blocks behind the window) holds the bits of NaN.
"""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.cpu import _native

NAN_BYTE = 0xFF
"""Sixteen, or thirty-two, of its bits are a NaN in bf16 and in float32."""

BF16_ROUNDOFF = 2**-8
"""The largest relative error of rounding to bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSpec:
    """What a program of attention is made for."""

    heads: tuple[int, int] = (4, 2)
    """query heads, key/value heads"""
    head_dim: int = 64
    block_size: int = 16
    kv_format: str = "bf16"
    window: int = 0
    softcap: float = 0.0
    scale: float = 0.3

    def kv_options(self) -> dict[str, int | str]:
        """Arguments that every operation on the cache takes."""
        return {
            "num_kv_heads": self.heads[1],
            "head_dim": self.head_dim,
            "block_size": self.block_size,
            "kv_format": self.kv_format,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionProblem:
    """Sequences with all their keys and values, and where these lie in the cache."""

    spec: AttentionSpec
    lengths: list[tuple[int, int]]
    """(new tokens, tokens in all) of each sequence"""
    queries: list[Tensor]
    """[new, H, D] bf16 of each sequence"""
    keys: list[Tensor]
    """[tokens in all, N, D] bf16"""
    values: list[Tensor]
    tables: list[list[int]]
    num_blocks: int


def make_problem(spec: AttentionSpec, *, lengths: list[tuple[int, int]], seed: int) -> AttentionProblem:
    """Random numbers; each sequence's blocks are out of order and far apart."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def draw(num: int, heads: int) -> Tensor:
        return torch.randn(num, heads, spec.head_dim, generator=generator).bfloat16()

    num_blocks = sum(-(-total // spec.block_size) for _, total in lengths) + 3
    free = rng.sample(range(num_blocks), num_blocks)
    return AttentionProblem(
        spec=spec,
        lengths=lengths,
        queries=[draw(new, spec.heads[0]) for new, _ in lengths],
        keys=[draw(total, spec.heads[1]) for _, total in lengths],
        values=[draw(total, spec.heads[1]) for _, total in lengths],
        tables=[[free.pop() for _ in range(-(-total // spec.block_size))] for _, total in lengths],
        num_blocks=num_blocks,
    )


class NativeCache:
    """One layer's keys and values as the kernels arrange them."""

    def __init__(self, spec: AttentionSpec, *, num_blocks: int) -> None:
        self.block_bytes = _native.kv_block_bytes(**spec.kv_options())  # type: ignore[arg-type]  # options by name
        size = (num_blocks, self.block_bytes)
        self.keys = torch.full(size, NAN_BYTE, dtype=torch.uint8)
        self.values = torch.full(size, NAN_BYTE, dtype=torch.uint8)

    def layer(self) -> _native.LayerKv:
        """Where it lies."""
        return _native.LayerKv(self.keys.data_ptr(), self.values.data_ptr(), self.block_bytes, 0)


def read_cache(cache: Tensor, *, spec: AttentionSpec, is_key: bool) -> Tensor:
    """Blocks of bytes [P, ...] as [P, B, N, D] float64, by the drawing alone."""
    item = {"bf16": 2, "int8": 1}[spec.kv_format]
    num_values = 16 * spec.head_dim
    granules = cache.view(len(cache), spec.heads[1], spec.block_size // 16, -1)
    raw = granules[..., : num_values * item].contiguous()
    values = raw.view(torch.bfloat16 if item == 2 else torch.int8).double()
    lead = granules.shape[:3]
    if is_key:  # [D / 2][16][2] -> [16][D]
        values = (
            values.view(*lead, spec.head_dim // 2, 16, 2).transpose(3, 4).reshape(*lead, 16, spec.head_dim)
        )
    else:  # [8][D][2] -> [16][D]
        values = values.view(*lead, 8, spec.head_dim, 2).transpose(4, 5).reshape(*lead, 16, spec.head_dim)
    if item == 1:
        scales = granules[..., num_values:].contiguous().view(torch.float32).double()
        values = values * scales.unsqueeze(-1)
    return values.permute(0, 2, 3, 1, 4).reshape(len(cache), spec.block_size, spec.heads[1], spec.head_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInputs:
    """The tensors behind one `AttentionInputs`, kept alive."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    slot_mapping: Tensor

    def native(self) -> _native.AttentionInputs:
        """For one run."""
        return _native.AttentionInputs(
            num_seqs=len(self.seq_lens),
            query_start_loc=self.query_start_loc.data_ptr(),
            seq_lens=self.seq_lens.data_ptr(),
            block_tables=self.block_tables.data_ptr(),
            max_num_blocks=self.block_tables.shape[1],
            slot_mapping=self.slot_mapping.data_ptr(),
        )


def step_inputs(
    lengths: list[tuple[int, int]], *, tables: list[list[int]], spec: AttentionSpec
) -> StepInputs:
    """The last `new` tokens of each sequence; table entries behind the window are -1."""
    width = max((len(table) for table in tables), default=0) + 1
    block_tables = torch.full((len(tables), width), -1, dtype=torch.int32)
    slots = []
    for row, (new, total), table in zip(block_tables, lengths, tables, strict=True):
        row[: len(table)] = torch.tensor(table, dtype=torch.int32)
        if spec.window and new:
            row[: max(0, total - new - spec.window + 1) // spec.block_size] = -1
        slots += [
            table[p // spec.block_size] * spec.block_size + p % spec.block_size
            for p in range(total - new, total)
        ]
    starts = torch.tensor([0, *(new for new, _ in lengths)]).cumsum(0).int()
    return StepInputs(
        query_start_loc=starts,
        seq_lens=torch.tensor([total for _, total in lengths], dtype=torch.int32),
        block_tables=block_tables,
        slot_mapping=torch.tensor(slots, dtype=torch.int64),
    )


def write_cache(
    problem: AttentionProblem, *, isa: str = "scalar", cache: NativeCache | None = None
) -> NativeCache:
    """Write what the step's queries may see, and nothing else."""
    spec = problem.spec
    cache = cache or NativeCache(spec, num_blocks=problem.num_blocks)
    program = _native.Program(_native.Pool(1, [], 0), isa, True)
    cols = spec.heads[1] * spec.head_dim
    keys = program.add_external(_native.DType.bf16, cols)
    values = program.add_external(_native.DType.bf16, cols)
    _native.add_write_kv(program, keys=keys, values=values, layer=0, **spec.kv_options())  # type: ignore[arg-type]
    program.set_layers([cache.layer()])
    for (new, total), table, key, value in zip(
        problem.lengths, problem.tables, problem.keys, problem.values, strict=True
    ):
        first = max(0, total - new - spec.window + 1) if spec.window else 0
        inputs = step_inputs([(total - first, total)], tables=[table], spec=spec)
        externals = [(x[first:].data_ptr(), cols * 2) for x in (key, value)]
        if total > first:
            program.run(total - first, externals, [inputs.native()])
    return cache


class AttentionRunner:
    """A program of one attention, to be run over different steps."""

    def __init__(
        self, spec: AttentionSpec, *, isa: str, threads: int = 1, deterministic: bool = True
    ) -> None:
        self._spec = spec
        self._program = _native.Program(_native.Pool(threads, [], 0), isa, deterministic)
        cols = spec.heads[0] * spec.head_dim
        self._query = self._program.add_external(_native.DType.bf16, cols)
        self._out = self._program.add_external(_native.DType.bf16, cols)
        _native.add_attention(
            self._program,
            query=self._query,
            layer=0,
            num_heads=spec.heads[0],
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            out=self._out,
            **spec.kv_options(),  # type: ignore[arg-type]  # options by name
        )

    def run(
        self,
        lengths: list[tuple[int, int]],
        *,
        queries: list[Tensor],
        tables: list[list[int]],
        cache: NativeCache,
    ) -> list[Tensor]:
        """The results [new, H, D] of each sequence."""
        query = torch.cat([*queries, torch.zeros(0, *queries[0].shape[1:], dtype=torch.bfloat16)])
        out = torch.full_like(query, 7.0)
        inputs = step_inputs(lengths, tables=tables, spec=self._spec)
        row_bytes = query.shape[1] * query.shape[2] * 2
        self._program.set_layers([cache.layer()])
        self._program.run(
            len(query), [(query.data_ptr(), row_bytes), (out.data_ptr(), row_bytes)], [inputs.native()]
        )
        return list(out.split([new for new, _ in lengths]))


def run_problem(
    problem: AttentionProblem, *, isa: str, cache: NativeCache | None = None, threads: int = 1
) -> list[Tensor]:
    """All sequences in one step."""
    runner = AttentionRunner(problem.spec, isa=isa, threads=threads)
    return runner.run(
        problem.lengths,
        queries=problem.queries,
        tables=problem.tables,
        cache=cache or write_cache(problem, isa=isa),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What attention must return, and how far a kernel may be from it."""

    out: Tensor
    """[new, H, D] float64"""
    bound: Tensor
    """[new, H, D]: the error that the roundings of the computation allow"""


def solve(spec: AttentionSpec, *, query: Tensor, keys: Tensor, values: Tensor, isa: str) -> Answer:
    """One sequence by dense math in float64: query [n, H, D] are the last n of the positions of keys [L, N, D].

    The bound, with u = 2^-8 for a rounding to bf16: the result errs by u of itself, and where weights are rounded
    to bf16 (the bf16 dot instructions) by u * sum(weight * |value|); float32 sums over D and L stay below 2^-12 of
    the same sum.
    """
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * spec.scale
    if spec.softcap:
        scores = torch.tanh(scores / spec.softcap) * spec.softcap
    at = torch.arange(len(keys) - len(query), len(keys))[:, None]
    seen = torch.arange(len(keys))[None, :] <= at
    if spec.window:
        seen &= torch.arange(len(keys))[None, :] > at - spec.window
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    out = torch.einsum("hqk,khd->qhd", weights, values)
    size = torch.einsum("hqk,khd->qhd", weights, values.abs())
    rounding = 0.0 if isa in ("scalar", "avx2") else BF16_ROUNDOFF
    return Answer(out=out, bound=size * (rounding + 2**-12) + out.abs() * BF16_ROUNDOFF + 1e-6)
