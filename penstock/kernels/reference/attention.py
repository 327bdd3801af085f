"""Paged attention one query at a time, in float64.

A rounded cache keeps the D bytes of a head and behind them the four of its float32 scale.

Letters: T tokens, K visible positions of one query, H query heads, N key/value heads, G = H / N, D head
size, B slots of a block.
"""

import torch
from torch import Tensor

from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.ops import AttentionShape
from penstock.kernels.reference.quantize import round_heads


def kv_block(shape: KvShape) -> KvBlock:
    """As `ops.kv_block`: token by token."""
    if not shape.is_quantized:
        return KvBlock(shape=(shape.block_size, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype)
    return KvBlock(shape=(shape.block_size, shape.num_kv_heads, shape.head_dim + 4), dtype=torch.uint8)


def _kept(x: Tensor, shape: KvShape) -> Tensor:
    if not shape.is_quantized:
        return x
    numbers, scales = round_heads(x, shape.dtype)
    return torch.cat([numbers.view(torch.uint8), scales.unsqueeze(-1).view(torch.uint8)], dim=-1)


def write_kv(keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`."""
    block_size = slab.keys.shape[1]
    block, offset = slot_mapping // block_size, slot_mapping % block_size
    slab.keys[block, offset] = _kept(keys, slab.shape)
    slab.values[block, offset] = _kept(values, slab.shape)


def _attend(query_HD: Tensor, keys_KND: Tensor, values_KND: Tensor, shape: AttentionShape) -> Tensor:
    num_kv_heads, head_dim = keys_KND.shape[1:]
    query_NGD = query_HD.double().view(num_kv_heads, -1, head_dim)
    keys_NDK = keys_KND.double().permute(1, 2, 0).contiguous()
    scores_NGK = torch.bmm(query_NGD, keys_NDK) * shape.scale
    if shape.softcap is not None:
        scores_NGK = torch.tanh(scores_NGK / shape.softcap) * shape.softcap
    values_NKD = values_KND.double().transpose(0, 1).contiguous()
    return torch.bmm(torch.softmax(scores_NGK, dim=-1), values_NKD).view_as(query_HD)


def _read(cache: Tensor, shape: KvShape, block_table: Tensor, start: int, end: int) -> Tensor:
    # Positions [start, end) of one sequence. B = 4, table [5, 2], [3, 6): slots 23, 8, 9.
    block_size = cache.shape[1]
    positions = torch.arange(start, end, device=cache.device)
    kept = cache[block_table[positions // block_size].long(), positions % block_size]
    if not shape.is_quantized:
        return kept
    scales = kept[..., shape.head_dim :].contiguous().view(torch.float32)
    return kept[..., : shape.head_dim].contiguous().view(shape.dtype).double() * scales


def paged_attention(query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape) -> Tensor:
    """As `ops.paged_attention`."""
    out, row = torch.empty_like(query), 0
    lengths = zip(batch.query_lens_host, batch.seq_lens_host, batch.block_tables, strict=True)
    for query_len, seq_len, block_table in lengths:
        for end in range(seq_len - query_len + 1, seq_len + 1):
            start = 0 if shape.window is None else max(0, end - shape.window)
            keys, values = (
                _read(cache, slab.shape, block_table, start, end) for cache in (slab.keys, slab.values)
            )
            out[row] = _attend(query[row], keys, values, shape).to(query.dtype)
            row += 1
    return out
