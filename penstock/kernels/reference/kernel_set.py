"""The reference home as the object that layers hold."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.ops import AttentionShape, ExpertWeights, LinearWeight, MoeShape, Release
from penstock.kernels.quantization import ROUNDED_METHODS, Quantization
from penstock.kernels.reference import adapters, attention, dense
from penstock.kernels.reference.adapters import prepare_plain_adapter
from penstock.kernels.reference.weights import plain, prepare_plain, prepare_plain_rounded
from penstock.kernels.rounded import RoundedWeight


class ReferenceKernels:
    """Exact and slow; every method is as the function of its name in `ops`."""

    name: Final = "reference"
    detail: Final = "torch"
    copies_weights: Final = False
    rounded_methods: Final = ROUNDED_METHODS
    has_own_threads: Final = False

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

    def rope_angles(self, positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
        """As `ops.rope_angles`."""
        return dense.rope_angles(positions, frequencies, factor=factor)

    def rope(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """As `ops.rope`."""
        return dense.rope(query, angles), dense.rope(key, angles)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return (dense.silu(gate.double()) * up.double()).to(gate.dtype)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return (dense.gelu(gate.double(), tanh=tanh) * up.double()).to(gate.dtype)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        return dense.gelu(x.double(), tanh=tanh).to(x.dtype)

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        quantization: Quantization,
        parts: Sequence[int],
        release: Release | None,
    ) -> LinearWeight:
        """As `ops.prepare_linear`; a quantized weight becomes float32, so that nothing else is rounded."""
        del parts, release
        return prepare_plain(weight, bias, quantization=quantization, dtype=None)

    def prepare_rounded(
        self, weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype, parts: Sequence[int]
    ) -> LinearWeight:
        """As `ops.prepare_rounded`; it becomes float32, which is exact."""
        del dtype, parts
        return prepare_plain_rounded(weight, bias, dtype=None)

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        """As `ops.join_linears`: the obvious version multiplies one by one."""
        del apart
        return None

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """As `ops.linear`."""
        known = plain(weight)
        return dense.linear(known.rounded(x), known.weight, known.bias).to(x.dtype)

    def prepare_adapter(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> AdapterWeights:
        """As `ops.prepare_adapter`; float32, so that nothing else is rounded."""
        del num_sites, dtype
        return prepare_plain_adapter(pairs, dtype=torch.float32)

    def lora(self, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
        """As `ops.lora`."""
        return adapters.lora(x, y, site)

    def embedding(self, token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """As `ops.embedding`."""
        return weight[token_ids] * scale

    def softcap(self, x: Tensor, *, cap: float) -> Tensor:
        """As `ops.softcap`."""
        return (torch.tanh(x.double() / cap) * cap).float()

    def kv_block(self, shape: KvShape) -> KvBlock:
        """As `ops.kv_block`: token by token."""
        return attention.kv_block(shape)

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

    def not_finite(self, x: Tensor) -> Tensor:
        """As `ops.not_finite`."""
        return dense.not_finite(x)

    def rows_not_finite(self, x: Tensor) -> list[int]:
        """As `ops.rows_not_finite`."""
        found: list[int] = dense.not_finite(x).nonzero().flatten().tolist()
        return found

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        pool[dst] = pool[src]

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        pool[block_ids] = 0
