"""Paged attention over buckets of like sequences with torch's fused attention.

It gathers the blocks of one bucket of one layer at a time, never more. Letters: S pieces, Q query rows
each, K keys each, H query heads, N key/value heads, G = H / N, D head size.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.eager.attention_plan import Bucket, make_plan
from penstock.kernels.ops import AttentionShape


def write_kv(keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
    """As `ops.write_kv`."""
    if slab.keys.is_contiguous() and slab.values.is_contiguous():
        slab.keys.flatten(0, 1).index_copy_(0, slot_mapping, keys)
        slab.values.flatten(0, 1).index_copy_(0, slot_mapping, values)
        return
    block_size = slab.keys.shape[1]
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    slab.keys.index_put_(slots, keys)
    slab.values.index_put_(slots, values)


MIN_WIDE_PIECES = 4
"""Sequences from which `_decode_bfloat16` wins over the fused attention (measured at 1 and 16)."""
MAX_WIDE_KV_HEADS = 8
"""Key/value heads up to which `_decode_bfloat16` wins in spite of its extra work (measured at 2 and 8)."""


class Workspace:
    """Memory for gathered blocks, kept between calls: fresh pages for each would cost more than the copy.

    Grows to the largest bucket met. Serves one step at a time.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def take(self, name: str, *, like: Tensor, num_blocks: int) -> Tensor:
        """Uninitialised [num_blocks, ...] with the dtype and block shape of `like`; overwrites the last."""
        size = num_blocks * like[0].numel()
        buffer = self._buffers.get(name)
        if buffer is None or buffer.dtype != like.dtype or buffer.numel() < size:
            buffer = self._buffers[name] = torch.empty(size, dtype=like.dtype, device=like.device)
        return buffer[:size].view(num_blocks, *like.shape[1:])


def _plan(batch: AttentionBatch, slab: KvSlab, window: int | None) -> tuple[Bucket, ...]:
    block_size, num_heads, head_dim = slab.keys.shape[1:]
    dtype = slab.keys.dtype
    key = ("eager", block_size, window, dtype)
    plan = batch.plans.get(key)
    if plan is None:
        key_bytes = 2 * num_heads * head_dim * dtype.itemsize
        plan = make_plan(batch, block_size=block_size, window=window, dtype=dtype, key_bytes=key_bytes)
        batch.plans[key] = plan
    assert isinstance(plan, tuple)
    return plan


def _gather(cache: Tensor, bucket: Bucket, *, out: Tensor) -> Tensor:
    # [P, B, N, D] -> [S, N, K, D], a view of the gathered copy.
    blocks = torch.index_select(cache, 0, bucket.block_ids, out=out)
    return blocks.view(bucket.num_pieces, -1, *cache.shape[2:])[:, : bucket.num_keys].transpose(1, 2)


def _fold(query: Tensor, bucket: Bucket, num_kv_heads: int) -> Tensor:
    # [S * Q, H, D] -> [S, N, G * Q, D]: heads that share keys become rows of one product.
    heads, head_dim = query.shape[1:]
    query = query.view(bucket.num_pieces, bucket.query_len, num_kv_heads, heads // num_kv_heads, head_dim)
    return query.permute(0, 2, 3, 1, 4).reshape(bucket.num_pieces, num_kv_heads, -1, head_dim)


def _unfold(out: Tensor, bucket: Bucket) -> Tensor:
    # [S, N, G * Q, D] -> [S * Q, H, D]
    pieces, num_kv_heads, _, head_dim = out.shape
    out = out.view(pieces, num_kv_heads, -1, bucket.query_len, head_dim)
    return out.permute(0, 3, 1, 2, 4).reshape(pieces * bucket.query_len, -1, head_dim)


def _fused(query: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float) -> Tensor:
    if bucket.query_len == 1:
        folded = _fold(query, bucket, keys.shape[1])
        out = scaled_dot_product_attention(folded, keys, values, attn_mask=bucket.bias, scale=scale)
        return _unfold(out, bucket)
    query = query.view(bucket.num_pieces, bucket.query_len, *query.shape[1:]).transpose(1, 2)
    out = scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=bucket.bias,
        is_causal=bucket.is_causal,
        scale=scale,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return out.transpose(1, 2).flatten(0, 1)


def _is_wide(bucket: Bucket, keys: Tensor) -> bool:
    # The extra calls cost a lone sequence 0.1 ms a layer, the extra work costs many heads too much.
    is_decode = bucket.query_len == 1 and keys.dtype == torch.bfloat16
    return is_decode and bucket.num_pieces >= MIN_WIDE_PIECES and keys.shape[1] <= MAX_WIDE_KV_HEADS


def _decode_bfloat16(query: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, scale: float) -> Tensor:
    # One matrix product over all heads of a token's keys side by side, N times the work of what is needed
    # and yet 1.5 to 3 times faster than the fused attention: the gathered keys are read as they lie. Each
    # query is spread over N times its width, zero but at its own key head: N = 2, G = 1: [a 0], [0 b].
    pieces, num_kv_heads, num_keys, head_dim = keys.shape
    spread = query.new_zeros(pieces, num_kv_heads, query.shape[1] // num_kv_heads, num_kv_heads, head_dim)
    grouped = query.view(pieces, num_kv_heads, -1, head_dim)
    spread.diagonal(dim1=1, dim2=3).copy_(grouped.permute(0, 2, 3, 1))
    wide = (pieces, num_keys, num_kv_heads * head_dim)
    keys, values = keys.transpose(1, 2).reshape(wide), values.transpose(1, 2).reshape(wide)
    assert bucket.bias is not None
    scores = torch.baddbmm(bucket.bias[:, 0], spread.flatten(1, 2).flatten(2), keys.mT, alpha=scale)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(values.dtype)
    out = torch.bmm(weights, values).view_as(spread)
    return out.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(query.shape)


def _capped(query: Tensor, keys: Tensor, values: Tensor, bucket: Bucket, shape: AttentionShape) -> Tensor:
    # Torch's fused attention knows no soft-cap.
    assert shape.softcap is not None
    folded = _fold(query, bucket, keys.shape[1])
    scores = torch.matmul(folded, keys.transpose(-1, -2)).float().mul_(shape.scale / shape.softcap)
    scores = scores.tanh_().mul_(shape.softcap)
    grouped = scores.view(*scores.shape[:2], -1, bucket.query_len, bucket.num_keys)
    if bucket.bias is not None:
        grouped += bucket.bias.unsqueeze(1)
    else:
        grouped += torch.full(grouped.shape[-2:], float("-inf")).triu_(1)
    weights = torch.softmax(scores, dim=-1).to(values.dtype)
    return _unfold(torch.matmul(weights, values), bucket)


def _attend(
    query: Tensor, slab: KvSlab, bucket: Bucket, *, shape: AttentionShape, workspace: Workspace
) -> Tensor:
    num_blocks = bucket.block_ids.shape[0]
    out_keys = workspace.take("keys", like=slab.keys, num_blocks=num_blocks)
    out_values = workspace.take("values", like=slab.values, num_blocks=num_blocks)
    keys, values = _gather(slab.keys, bucket, out=out_keys), _gather(slab.values, bucket, out=out_values)
    query = query.index_select(0, bucket.rows)
    if shape.softcap is not None:
        out = _capped(query, keys, values, bucket, shape)
    elif _is_wide(bucket, keys):
        out = _decode_bfloat16(query, keys, values, bucket, shape.scale)
    else:
        out = _fused(query, keys, values, bucket, shape.scale)
    return out if bucket.keep is None else out.index_select(0, bucket.keep)


def paged_attention(
    query: Tensor, slab: KvSlab, batch: AttentionBatch, *, shape: AttentionShape, workspace: Workspace
) -> Tensor:
    """As `ops.paged_attention`."""
    out = torch.empty_like(query)
    for bucket in _plan(batch, slab, shape.window):
        part = _attend(query, slab, bucket, shape=shape, workspace=workspace)
        out.index_copy_(0, bucket.targets, part)
    return out
