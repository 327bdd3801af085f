"""Paged attention: which launches a step needs.

```
short sequences   short_kernel   grid (sequences, key/value heads, splits of the keys)
                  reduce_kernel  grid (their new tokens, heads), if there is more than one split
long sequences    long_kernel    grid (tiles of new tokens, key/value heads)
```

Short are those whose new tokens fit one tile, decodes above all; `tiles` says where the border is. All three
grids run over all sequences: a program sees on the device whether its sequence is of its kind and has work
for it, and leaves at once if not. So a grid depends on the number of sequences and rows and on the longest
sequence alone, nothing is copied to the device or read back, and a decode step can be captured with the
longest length that the graph shall serve.

Slots past the end or behind a window are never loaded, and scores that a row may not see are masked before
they are used, so NaN in them reaches no row.

In fast mode the splits of a sequence depend on how many sequences the step has, and the tile on how many new
tokens. In deterministic mode every launch has the same tile, every split the same 1,024 positions, and splits
are joined one by one in rising order, within a program (long) or in the reduction (short), without fused
multiply-add: a row's bits are then its own in any step. That costs registers in prefill, and in decode
programs that have no work when the longest sequence of the step is much longer than the others.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.ops import AttentionShape
from penstock.kernels.triton import attention_kernels, tiles
from penstock.kernels.triton.kv_write import planes
from penstock.kernels.triton.launch import num_processors
from penstock.kernels.triton.tiles import FIXED_SPLIT, MIN_SPLIT, Heads, StepMix, Tile

LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True, kw_only=True)
class _Call:
    """One call: what its launches have in common."""

    query: Tensor
    out: Tensor
    slab: KvSlab
    batch: AttentionBatch
    shape: AttentionShape
    heads: Heads
    mix: StepMix
    is_deterministic: bool

    @property
    def fixed_split(self) -> int:
        """Keys of a split; 0 where they depend on the step."""
        return FIXED_SPLIT if self.is_deterministic else 0

    def inputs(self) -> dict[str, Tensor | int | float]:
        """What both attention kernels read, by the names of their parameters."""
        kv, slab = self.slab.shape, self.slab
        keys, values = planes(slab.keys, kv), planes(slab.values, kv)
        assert keys.block_stride == values.block_stride, (slab.keys.stride(), slab.values.stride())
        scale, softcap = _scoring(self.shape)
        return {
            "query": self.query,
            "out": self.out,
            "key_numbers": keys.numbers,
            "value_numbers": values.numbers,
            "key_scales": keys.scales,
            "value_scales": values.scales,
            "block_tables": self.batch.block_tables,
            "query_start": self.batch.query_start_loc,
            "seq_lens": self.batch.seq_lens,
            "stride_t": self.query.stride(0),
            "stride_h": self.query.stride(1),
            "block_stride": keys.block_stride,
            "scale_stride": keys.scale_stride,
            "table_stride": self.batch.block_tables.stride(0),
            "scale": scale,
            "softcap": softcap,
            "short_limit": tiles.short_limit(self.heads),
        }

    def constants(self, tile: Tile) -> dict[str, int | bool]:
        """Compile-time arguments of both attention kernels, and how to compile them."""
        heads, kv = self.heads, self.slab.shape
        constants: dict[str, int | bool] = {
            "NUM_HEADS": heads.num_kv_heads * heads.group,
            "GROUP": heads.group,
            "HEAD_DIM": heads.head_dim,
            "BLOCK_SIZE": kv.block_size,
            "WINDOW": self.shape.window or 0,
            "HAS_SOFTCAP": self.shape.softcap is not None,
            "HAS_SCALES": kv.is_quantized,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_D": heads.block_d,
            "FIXED_SPLIT": self.fixed_split,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
        return constants | self.fusion()

    def fusion(self) -> dict[str, int | bool]:
        """Two kernels join splits: a multiply-add fused in one of them only would part their bits."""
        return {"enable_fp_fusion": False} if self.is_deterministic else {}


def _scoring(shape: AttentionShape) -> tuple[float, float]:
    """Factors of `_exponents`: `scale` on the product of query and key, `softcap` on the capped score."""
    if shape.softcap is None:
        return shape.scale * LOG2_E, 0.0
    return shape.scale * 2 * LOG2_E / shape.softcap, shape.softcap * LOG2_E


def _run_short(call: _Call) -> None:
    heads, mix = call.heads, call.mix
    if call.is_deterministic:
        tile, num_splits = tiles.fixed_tile(heads), tiles.num_fixed_splits(mix)
    else:
        tile = tiles.short_tile(heads, max_new=mix.max_short)
        num_splits = tiles.num_splits(mix, heads, num_processors=num_processors(call.query.device))
    num_heads = heads.num_kv_heads * heads.group
    parts = (mix.num_seqs * mix.max_short * num_heads * num_splits) if num_splits > 1 else 0
    partial = {
        "partial_acc": call.query.new_empty(parts, heads.head_dim, dtype=torch.float32),
        "partial_peak": call.query.new_empty(parts, dtype=torch.float32),
        "partial_total": call.query.new_empty(parts, dtype=torch.float32),
    }
    attention_kernels.short_kernel[mix.num_seqs, heads.num_kv_heads, num_splits](
        **call.inputs(),
        **partial,
        num_splits=num_splits,
        ROWS=mix.max_short,
        MIN_SPLIT=MIN_SPLIT,
        **call.constants(tile),
    )
    if num_splits > 1:
        _reduce(call, partial, tile=tile, num_splits=num_splits)


def _reduce(call: _Call, partial: dict[str, Tensor], *, tile: Tile, num_splits: int) -> None:
    heads, mix = call.heads, call.mix
    num_heads = heads.num_kv_heads * heads.group
    attention_kernels.reduce_kernel[mix.num_seqs * mix.max_short, num_heads](
        **partial,
        out=call.out,
        query_start=call.batch.query_start_loc,
        seq_lens=call.batch.seq_lens,
        short_limit=tiles.short_limit(heads),
        num_splits=num_splits,
        NUM_HEADS=num_heads,
        HEAD_DIM=heads.head_dim,
        WINDOW=call.shape.window or 0,
        BLOCK_N=tile.block_n,
        BLOCK_D=heads.block_d,
        ROWS=mix.max_short,
        MIN_SPLIT=MIN_SPLIT,
        FIXED_SPLIT=call.fixed_split,
        CHUNK=1 if call.is_deterministic else tiles.chunk(num_splits),
        num_warps=4,
        **call.fusion(),
    )


def _run_long(call: _Call) -> None:
    heads, mix = call.heads, call.mix
    tile = tiles.fixed_tile(heads) if call.is_deterministic else tiles.long_tile(heads)
    rows = tile.block_m // heads.group
    attention_kernels.long_kernel[mix.num_rows // rows + mix.num_seqs, heads.num_kv_heads](
        **call.inputs(),
        num_seqs=mix.num_seqs,
        ROWS=rows,
        **call.constants(tile),
    )


def paged_attention(
    query: Tensor, slab: KvSlab, batch: AttentionBatch, *, shape: AttentionShape, is_deterministic: bool
) -> Tensor:
    """As `ops.paged_attention`."""
    query = query if query.stride(2) == 1 else query.contiguous()
    heads = Heads(
        group=query.shape[1] // slab.shape.num_kv_heads,
        num_kv_heads=slab.shape.num_kv_heads,
        head_dim=slab.shape.head_dim,
        itemsize=query.dtype.itemsize,
    )
    call = _Call(
        query=query,
        out=torch.empty(query.shape, dtype=query.dtype, device=query.device),
        slab=slab,
        batch=batch,
        shape=shape,
        heads=heads,
        mix=tiles.step_mix(batch, heads),
        is_deterministic=is_deterministic,
    )
    if call.mix.max_short:
        _run_short(call)
    if call.mix.has_long:
        _run_long(call)
    return call.out
