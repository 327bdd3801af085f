"""The eager home as the object that layers hold."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from penstock.kernels.adapters import AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.eager import attention, dense
from penstock.kernels.ops import AttentionShape, ExpertWeights, LinearWeight, MoeShape, Release
from penstock.kernels.quantization import ROUNDED_METHODS, Quantization
from penstock.kernels.reference.adapters import plain_pair, prepare_plain_adapter
from penstock.kernels.reference.dense import not_finite
from penstock.kernels.reference.weights import plain, prepare_plain, prepare_plain_rounded
from penstock.kernels.rounded import RoundedWeight


class EagerKernels:
    """Fast plain torch; every method is as the function of its name in `ops`."""

    name: Final = "eager"
    detail: Final = "torch"
    copies_weights: Final = False
    rounded_methods: Final = ROUNDED_METHODS
    has_own_threads: Final = False

    def __init__(self) -> None:
        self._workspace = attention.Workspace()

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
        """As `ops.rms_norm`."""
        return dense.rms_norm(x, weight, eps=eps, weight_offset=weight_offset)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """As `ops.add_rms_norm`."""
        summed = x + residual
        return dense.rms_norm(summed, weight, eps=eps, weight_offset=weight_offset), summed

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        """As `ops.layer_norm`."""
        return functional.layer_norm(x, weight.shape, weight, bias, eps)

    def rope_angles(self, positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
        """As `ops.rope_angles`."""
        return dense.rope_angles(positions, frequencies, factor=factor)

    def rope(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """As `ops.rope`."""
        return dense.rope(query, angles), dense.rope(key, angles)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return functional.silu(gate).mul_(up)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return self.gelu(gate, tanh=tanh).mul_(up)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        return functional.gelu(x, approximate="tanh" if tanh else "none")

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        quantization: Quantization,
        parts: Sequence[int],
        release: Release | None,
    ) -> LinearWeight:
        """As `ops.prepare_linear`; a quantized weight becomes one of the model's dtype again."""
        del parts, release
        return prepare_plain(weight, bias, quantization=quantization, dtype=weight.dtype)

    def prepare_rounded(
        self, weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype, parts: Sequence[int]
    ) -> LinearWeight:
        """As `ops.prepare_rounded`; it becomes one of the model's dtype."""
        del parts
        return prepare_plain_rounded(weight, bias, dtype=dtype)

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        """As `ops.join_linears`: they stay apart, mapped from the files; a join would be a copy."""
        del apart
        return None

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """As `ops.linear`."""
        known = plain(weight)
        return functional.linear(known.rounded(x).to(x.dtype), known.weight, known.bias)

    def prepare_adapter(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> AdapterWeights:
        """As `ops.prepare_adapter`."""
        del num_sites
        return prepare_plain_adapter(pairs, dtype=dtype)

    def lora(self, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
        """As `ops.lora`."""
        return _lora(x, y, site)

    def embedding(self, token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """As `ops.embedding`."""
        rows = weight.index_select(0, token_ids)
        return rows if scale == 1.0 else rows.mul_(scale)

    def softcap(self, x: Tensor, *, cap: float) -> Tensor:
        """As `ops.softcap`, in place."""
        return x.div_(cap).tanh_().mul_(cap)

    def kv_block(self, shape: KvShape) -> KvBlock:
        """As `ops.kv_block`: token by token."""
        return KvBlock(shape=(shape.block_size, shape.num_kv_heads, shape.head_dim), dtype=shape.dtype)

    def write_kv(self, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
        """As `ops.write_kv`."""
        attention.write_kv(keys, values, slab, slot_mapping)

    def paged_attention(
        self, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
    ) -> Tensor:
        """As `ops.paged_attention`."""
        return attention.paged_attention(query, slab, batch, shape=shape, workspace=self._workspace)

    def moe(self, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
        """As `ops.moe`."""
        return dense.moe(x, router, experts, shape)

    def not_finite(self, x: Tensor) -> Tensor:
        """As `ops.not_finite`."""
        return not_finite(x)

    def rows_not_finite(self, x: Tensor) -> list[int]:
        """As `ops.rows_not_finite`."""
        found: list[int] = not_finite(x).nonzero().flatten().tolist()
        return found

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        pool.index_copy_(0, dst, pool.index_select(0, src))

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        pool.index_fill_(0, block_ids, 0)


def _lora(x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
    """As `ops.lora`, in place."""
    for run in site.active.rows:
        pair = plain_pair(run.weights, site)
        if pair is not None:
            rows = slice(run.first_row, run.first_row + run.num_rows)
            shrunk = functional.linear(x[rows], pair.a)
            y[rows] += functional.linear(shrunk, pair.b).mul_(pair.scale)
    return y
