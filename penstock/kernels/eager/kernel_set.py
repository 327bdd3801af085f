"""The eager home as the object that layers hold."""

from collections.abc import Sequence
from typing import Final

from torch import Tensor
from torch.nn import functional

from penstock.kernels.batch import AttentionBatch, KvSlab
from penstock.kernels.eager import attention, dense
from penstock.kernels.ops import AttentionShape, ExpertWeights, MoeShape


class EagerKernels:
    """Fast plain torch; every method is as the function of its name in `ops`."""

    name: Final = "eager"

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

    def rope(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """As `ops.rope`."""
        return dense.rope(x, cos, sin)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return functional.silu(gate).mul_(up)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return self.gelu(gate, tanh=tanh).mul_(up)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        return functional.gelu(x, approximate="tanh" if tanh else "none")

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """As `ops.linear`."""
        return functional.linear(x, weight, bias)

    def embedding(self, token_ids: Tensor, weight: Tensor) -> Tensor:
        """As `ops.embedding`."""
        return weight.index_select(0, token_ids)

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

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        pool.index_copy_(0, dst, pool.index_select(0, src))

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        pool.index_fill_(0, block_ids, 0)
