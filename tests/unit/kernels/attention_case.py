"""A paged attention problem and its answer by plain dense math in float64, without blocks."""

import math
import random
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, KvShape, KvSlab
from penstock.kernels.ops import AttentionShape


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """Inputs of `ops.paged_attention` and what it must return."""

    query: Tensor
    slab: KvSlab
    batch: AttentionBatch
    shape: AttentionShape
    expected: Tensor
    new_keys: Tensor
    """[T, N, D], of the rows of the query."""
    new_values: Tensor


def _dense(query: Tensor, keys: Tensor, values: Tensor, shape: AttentionShape) -> Tensor:
    # One sequence: query [n, H, D] are the last n of the L positions of keys [L, N, D].
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.double().repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys) * shape.scale
    if shape.softcap is not None:
        scores = torch.tanh(scores / shape.softcap) * shape.softcap
    at = torch.arange(len(keys) - len(query), len(keys))[:, None]
    seen = torch.arange(len(keys))[None, :] <= at
    if shape.window is not None:
        seen &= torch.arange(len(keys))[None, :] > at - shape.window
    weights = torch.softmax(scores.masked_fill(~seen, -math.inf), dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def _tables(seq_lens: list[int], *, block_size: int, num_blocks: int, rng: random.Random) -> list[list[int]]:
    free = list(range(num_blocks))
    rng.shuffle(free)
    return [[free.pop() for _ in range(-(-length // block_size))] for length in seq_lens]


def _make_slab(kernels: ops.KernelSet, shape: KvShape, *, num_blocks: int, strided: bool) -> KvSlab:
    slab = ops.make_slab(kernels, shape, num_blocks=num_blocks)
    if strided:
        both = torch.stack([slab.keys, slab.values], dim=1)
        slab = KvSlab(keys=both[:, 0], values=both[:, 1], shape=shape)
    for block in range(num_blocks):
        poison(slab, block)
    return slab


def poison(slab: KvSlab, block: int) -> None:
    """All bits of a block set: every number in it is NaN, however a home arranges it."""
    for cache in (slab.keys, slab.values):
        cache[block] = torch.full_like(cache[block], 0).view(torch.uint8).fill_(255).view(cache.dtype)


def make_case(
    lengths: list[tuple[int, int]],
    *,
    kernels: ops.KernelSet,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 8,
    block_size: int = 4,
    window: int | None = None,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    strided: bool = False,
    seed: int = 0,
) -> AttentionCase:
    """Build a case; blocks are out of order and all that no query may see is NaN.

    Args:
        lengths: (new tokens, tokens in all) of each sequence.
        kernels: who arranges the blocks.
        heads: query heads and key/value heads.
        head_dim: size of a head.
        block_size: slots of a block.
        window: sliding window.
        softcap: of the scores.
        dtype: of queries and pool.
        strided: keys and values of a block side by side, as a pool may hold them.
        seed: of all numbers.
    """
    rng = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    seq_lens = [total for _, total in lengths]
    num_blocks = sum(-(-total // block_size) for total in seq_lens) + 3
    kv = KvShape(block_size=block_size, num_kv_heads=heads[1], head_dim=head_dim, dtype=dtype)
    slab = _make_slab(kernels, kv, num_blocks=num_blocks, strided=strided)
    tables = _tables(seq_lens, block_size=block_size, num_blocks=num_blocks, rng=rng)
    shape = AttentionShape(scale=0.3, window=window, softcap=softcap)
    queries, answers, slots = [], [], []
    new_keys, new_values = [], []
    for (new, total), table in zip(lengths, tables, strict=True):
        query = torch.randn(new, heads[0], head_dim, generator=generator).to(dtype)
        keys, values = (
            torch.randn(total, heads[1], head_dim, generator=generator).to(dtype) for _ in range(2)
        )
        queries.append(query)
        answers.append(_dense(query, keys, values, shape))
        for block in table:  # a block's unused slots are zero, as the engine keeps them
            slab.keys[block] = slab.values[block] = 0
        places = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(total)])
        ops.write_kv(kernels, keys, values, slab, places)
        new_keys.append(keys[total - new :])
        new_values.append(values[total - new :])
        first = 0 if window is None else max(0, total - new - window + 1) // block_size
        slots += [table[p // block_size] * block_size + p % block_size for p in range(total - new, total)]
        for i in range(first):
            poison(slab, table[i])
            table[i] = -1
    width = max(map(len, tables)) + 1
    new_lens = [new for new, _ in lengths]
    batch = AttentionBatch(
        query_start_loc=torch.tensor([0, *new_lens]).cumsum(0).int(),
        seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        block_tables=torch.tensor(
            [table + [-1] * (width - len(table)) for table in tables], dtype=torch.int32
        ),
        slot_mapping=torch.tensor(slots),
        query_lens_host=tuple(new_lens),
        seq_lens_host=tuple(seq_lens),
    )
    return AttentionCase(
        query=torch.cat(queries),
        slab=slab,
        batch=batch,
        shape=shape,
        expected=torch.cat(answers),
        new_keys=torch.cat(new_keys),
        new_values=torch.cat(new_values),
    )
