"""The Triton home as the object that layers hold."""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterLimits, AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.ops import AttentionShape, ExpertWeights, LinearWeight, MoeShape, Release
from penstock.kernels.options import DEFAULT_OPTIONS, KernelOptions
from penstock.kernels.quantization import ROUNDED_METHODS, Quantization
from penstock.kernels.rounded import RoundedWeight
from penstock.kernels.triton import (
    adapter_tables,
    adapters,
    attention,
    blocks,
    elementwise,
    kv_write,
    linear,
    moe,
    weights,
)
from penstock.kernels.triton.launch import INTERPRETED, compute_device


class TritonKernels:
    """Triton and cuBLAS; every method is as the function of its name in `ops`."""

    name: Final = "triton"
    has_own_threads: Final = False
    rounded_methods: Final = ROUNDED_METHODS

    def __init__(self, options: KernelOptions = DEFAULT_OPTIONS) -> None:
        """Compile nothing yet: each kernel is compiled at its first launch, or read from Triton's cache.

        Args:
            options: whether results must not depend on the batch.
        """
        self._is_deterministic = options.is_deterministic
        self._experts = moe.ExpertTables()
        self._adapters = adapter_tables.Adapters(compute_device())
        self._is_rounding = options.quantization.method != "none"

    @property
    def detail(self) -> str:
        """See `KernelSet.detail`."""
        return "triton, interpreted" if INTERPRETED.value else "triton"

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
        """As `ops.rms_norm`."""
        return elementwise.rms_norm(x, weight, eps=eps, weight_offset=weight_offset)

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """As `ops.add_rms_norm`."""
        return elementwise.add_rms_norm(x, residual, weight, eps=eps, weight_offset=weight_offset)

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        """As `ops.layer_norm`."""
        return elementwise.layer_norm(x, weight, bias, eps=eps)

    def rope_angles(self, positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
        """As `ops.rope_angles`."""
        return elementwise.rope_angles(positions, frequencies, factor=factor)

    def rope(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """As `ops.rope`."""
        return elementwise.rope(query, key, angles)

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """As `ops.silu_and_mul`."""
        return elementwise.silu_and_mul(gate, up)

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu_and_mul`."""
        return elementwise.gelu_and_mul(gate, up, tanh=tanh)

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """As `ops.gelu`."""
        return elementwise.gelu(x, tanh=tanh)

    @property
    def copies_weights(self) -> bool:
        """True where they are rounded at start; dense ones are used as they lie."""
        return self._is_rounding

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        quantization: Quantization,
        parts: Sequence[int],
        release: Release | None,
    ) -> LinearWeight:
        """As `ops.prepare_linear`."""
        del parts, release
        return weights.prepare(weight, bias, quantization=quantization)

    def prepare_rounded(
        self, weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype, parts: Sequence[int]
    ) -> LinearWeight:
        """As `ops.prepare_rounded`."""
        del parts, dtype
        return weights.prepare_rounded(weight, bias)

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        """As `ops.join_linears`: one launch, large enough to use the whole bandwidth at few rows."""
        return weights.join([weights.triton_weight(each) for each in apart])

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """As `ops.linear`."""
        known = weights.triton_weight(weight)
        return linear.linear(x, known, is_deterministic=self._is_deterministic)

    def prepare_adapter(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> AdapterWeights:
        """As `ops.prepare_adapter`."""
        return self._adapters.prepare(pairs, num_sites=num_sites, dtype=dtype)

    def adapter_tables(
        self, limits: AdapterLimits, *, num_sites: int, dtype: torch.dtype
    ) -> adapter_tables.FixedTables:
        """As `adapters.RecordsAdapters.adapter_tables`."""
        return self._adapters.fixed_tables(limits, num_sites=num_sites, dtype=dtype)

    def lora(self, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
        """As `ops.lora`."""
        return adapters.lora(x, y, site, adapters=self._adapters)

    def embedding(self, token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """As `ops.embedding`."""
        return elementwise.embedding(token_ids, weight, scale=scale)

    def softcap(self, x: Tensor, *, cap: float) -> Tensor:
        """As `ops.softcap`, in place."""
        return elementwise.softcap(x, cap=cap)

    def kv_block(self, shape: KvShape) -> KvBlock:
        """As `ops.kv_block`."""
        return kv_write.kv_block(shape)

    def write_kv(self, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
        """As `ops.write_kv`."""
        kv_write.write_kv(keys, values, slab, slot_mapping)

    def paged_attention(
        self, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
    ) -> Tensor:
        """As `ops.paged_attention`."""
        return attention.paged_attention(
            query, slab, batch, shape=shape, is_deterministic=self._is_deterministic
        )

    def moe(self, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
        """As `ops.moe`."""
        tables = self._experts.of(experts)
        return moe.moe(x, router, tables, shape, is_deterministic=self._is_deterministic)

    def not_finite(self, x: Tensor) -> Tensor:
        """As `ops.not_finite`."""
        return elementwise.not_finite(x)

    def rows_not_finite(self, x: Tensor) -> list[int]:
        """As `ops.rows_not_finite`; reads the answer back from the device."""
        found: list[int] = elementwise.not_finite(x).nonzero().flatten().tolist()
        return found

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """As `ops.copy_blocks`."""
        blocks.copy_blocks(pool, src, dst)

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """As `ops.zero_blocks`."""
        blocks.zero_blocks(pool, block_ids)
