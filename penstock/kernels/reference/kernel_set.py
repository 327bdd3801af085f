"""The reference home as the object that layers hold."""

from collections.abc import Sequence
from typing import Final

from torch import Tensor

from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.ops import AttentionShape, ExpertWeights, MoeShape
from penstock.kernels.reference import attention, dense


class ReferenceKernels:
    """Exact and slow; every method is as the function of its name in `ops`."""

    name: Final = "reference"

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
        return dense.layer_norm(x, weight, bias, eps=eps)

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `ops.rope`."""
        return dense.rope(x, cos, sin)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return (dense.silu(gate.double()) * up.double()).to(gate.dtype)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return (dense.gelu(gate.double(), tanh=tanh) * up.double()).to(gate.dtype)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        return dense.gelu(x.double(), tanh=tanh).to(x.dtype)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.linear`."""
        return dense.linear(x, weight, bias)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """As `ops.embedding`."""
        return weight[token_ids]

    def write_kv(self, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
        """As `ops.write_kv`."""
        attention.write_kv(keys, values, slab, slot_mapping)

    def paged_attention(
        self, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
    ) -> Tensor:
        """As `ops.paged_attention`."""
        return attention.paged_attention(query, slab, batch, shape)

    def moe(self, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
        """As `ops.moe`."""
        return dense.moe(x, router, experts, shape)

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        pool[dst] = pool[src]

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        pool[block_ids] = 0
