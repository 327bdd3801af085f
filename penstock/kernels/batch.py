"""The flat, padding-free inputs of one step, as layers and kernels read them.

Built by `engine/runner/input_batch`, read by `models`, `layers` and `kernels`. Nothing here is padded:
the tokens of all sequences lie one after the other.

Worked example, block_size 4: sequence A computes tokens 4..6 of 7 (a prefill chunk), sequence B token 9
of 10 (a decode):

```
token_ids        [A4 A5 A6 B9]       num_tokens = 4
positions        [ 4  5  6  9]
query_start_loc  [ 0  3  4]          A owns rows 0..3, B row 3
seq_lens         [ 7 10]             keys each sequence attends to after this step
block_tables     [[5, 2, -1], [7, 1, 3]]
slot_mapping     [8 9 10 13]         block 2 * 4 + 0..2; block 3 * 4 + 1
```
"""

import math
from dataclasses import dataclass, field

import torch

from penstock.kernels.adapters import AdapterRows, AdapterTables


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """What attention needs for the layers of one cache group."""

    query_start_loc: torch.Tensor
    """[num_seqs + 1] int32: first row of each sequence, and the number of rows."""
    seq_lens: torch.Tensor
    """[num_seqs] int32: tokens of each sequence after this step, its new ones included."""
    block_tables: torch.Tensor
    """[num_seqs, max_num_blocks] int32: -1 beyond the end and behind a window."""
    slot_mapping: torch.Tensor
    """[num_tokens] int64: block_id * block_size + offset, where each new token's K and V go."""
    query_lens_host: tuple[int, ...]
    """`query_start_loc` as lengths, on the host: shapes are decided without a device read."""
    seq_lens_host: tuple[int, ...]
    """`seq_lens` on the host."""
    plans: dict[tuple[object, ...], object] = field(default_factory=dict, compare=False, repr=False)
    """What a kernel home worked out for this batch (gather indices, masks), so that it does so once a step
    and not once a layer; written by `kernels` alone, dies with the batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KvShape:
    """What one block of one layer holds: `block_size` keys (and as many values) of every head."""

    block_size: int
    """Token slots."""
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    """Of what is kept: the model's, or int8 or float8_e4m3fn with a scale a token and head."""

    @property
    def is_int8(self) -> bool:
        """True if keys and values are rounded to int8."""
        return self.dtype == torch.int8

    @property
    def is_quantized(self) -> bool:
        """True if there is a scale for each token and head."""
        return self.dtype in (torch.int8, torch.float8_e4m3fn)


@dataclass(frozen=True, slots=True, kw_only=True)
class KvBlock:
    """How a kernel home keeps the keys (or the values) of one block of one layer."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the keys; the values take as many."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True, kw_only=True)
class KvSlab:
    """Keys and values of one layer; a view into the pool, shared by the groups' layers with this slab.

    The kernel home alone knows what stands where in a block (`ops.kv_block`); everybody else copies and
    clears whole blocks.
    """

    keys: torch.Tensor
    """[num_blocks, *block]"""
    values: torch.Tensor
    """[num_blocks, *block]"""
    shape: KvShape


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """One step's inputs for a model."""

    token_ids: torch.Tensor
    """[num_tokens] int64"""
    positions: torch.Tensor
    """[num_tokens] int64"""
    groups: tuple[AttentionBatch, ...]
    """One per cache group."""
    layer_groups: tuple[int, ...]
    """For each model layer the index of its cache group."""
    layer_slabs: tuple[KvSlab, ...]
    """For each model layer its keys and values."""
    adapters: tuple[AdapterRows, ...] = ()
    """Runs of rows that use an adapter, rising and apart."""
    adapter_tables: AdapterTables | None = None
    """Where they are read instead, if the step is recorded with adapters."""

    def attention(self, layer_idx: int) -> tuple[AttentionBatch, KvSlab]:
        """What the attention of `layer_idx` reads and writes."""
        return self.groups[self.layer_groups[layer_idx]], self.layer_slabs[layer_idx]
