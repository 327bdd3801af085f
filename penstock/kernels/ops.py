"""The contract of every operation: shapes, dtypes, meaning, and the dispatch to the chosen home.

A home (`kernels/cpu`, `kernels/eager`, `kernels/reference`) is a plain object that fits `KernelSet`;
`registry` picks it, and the model's layers hold it. Layers call the functions here, which check what they are
given and pass it on. Nothing here computes. Every home passes the one test in `tests/unit/kernels`.

Letters: T tokens of the step, S sequences, H query heads, N key/value heads, D head size, R rotated part
of a head, I input features, O output features, E experts, P blocks of the pool, B slots of a block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvBlock, KvShape, KvSlab
from penstock.kernels.quantization import NO_QUANTIZATION, Method, Quantization
from penstock.kernels.rounded import RoundedWeight


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """The constants of one layer's attention."""

    scale: float
    """Factor on the scores, mostly `head_dim ** -0.5`."""
    window: int | None = None
    """A token attends to itself and the `window - 1` before it; None for all before it."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)`; None for no cap."""


class LinearWeight(Protocol):
    """The weight and bias of a product, in the form that the home which made it multiplies by."""

    @property
    def out_features(self) -> int:
        """O."""
        ...

    @property
    def in_features(self) -> int:
        """I."""
        ...

    @property
    def num_bytes(self) -> int:
        """Bytes that it keeps resident, a mapped file's pages included."""
        ...


Release = Callable[[Tensor], None]
"""Told which rows of a weight a home has taken over and will not read again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertWeights:
    """One expert's gated MLP, SiLU on the gate."""

    gate: LinearWeight
    """[moe_intermediate_size, hidden_size]"""
    up: LinearWeight
    """[moe_intermediate_size, hidden_size]"""
    down: LinearWeight
    """[hidden_size, moe_intermediate_size]"""


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeShape:
    """How tokens choose experts."""

    top_k: int
    """Experts per token, 1 to the number of experts."""
    renormalize: bool
    """Divide the chosen probabilities by their sum."""


class KernelSet(Protocol):
    """What a home implements; meaning and shapes stand at the functions of the same names below."""

    @property
    def name(self) -> str:
        """The word that `--kernels` takes."""
        ...

    @property
    def detail(self) -> str:
        """What it computes with, in some words."""
        ...

    @property
    def has_own_threads(self) -> bool:
        """True if it computes with threads of its own and not with torch's."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
        """See `rms_norm`."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
    ) -> tuple[Tensor, Tensor]:
        """See `add_rms_norm`."""
        ...

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
        """See `layer_norm`."""
        ...

    def rope_angles(self, positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
        """See `rope_angles`."""
        ...

    def rope(self, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
        """See `rope`."""
        ...

    def silu_and_mul(self, gate: Tensor, up: Tensor) -> Tensor:
        """See `silu_and_mul`."""
        ...

    def gelu_and_mul(self, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
        """See `gelu_and_mul`."""
        ...

    def gelu(self, x: Tensor, *, tanh: bool) -> Tensor:
        """See `gelu`."""
        ...

    @property
    def copies_weights(self) -> bool:
        """True if `prepare_linear` makes a copy, so that the original need not stay in memory."""
        ...

    def prepare_linear(
        self,
        weight: Tensor,
        bias: Tensor | None,
        *,
        quantization: Quantization,
        parts: Sequence[int],
        release: Release | None,
    ) -> LinearWeight:
        """See `prepare_linear`."""
        ...

    @property
    def rounded_methods(self) -> frozenset[Method]:
        """Of the weights that `prepare_rounded` takes; a checkpoint's others are dequantized."""
        ...

    def prepare_rounded(
        self, weight: RoundedWeight, bias: Tensor | None, *, dtype: torch.dtype, parts: Sequence[int]
    ) -> LinearWeight:
        """See `prepare_rounded`."""
        ...

    def join_linears(self, apart: Sequence[LinearWeight]) -> LinearWeight | None:
        """See `join_linears`."""
        ...

    def linear(self, x: Tensor, weight: LinearWeight) -> Tensor:
        """See `linear`."""
        ...

    def prepare_adapter(
        self, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
    ) -> AdapterWeights:
        """See `prepare_adapter`."""
        ...

    def lora(self, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
        """See `lora`."""
        ...

    def embedding(self, token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
        """See `embedding`."""
        ...

    def softcap(self, x: Tensor, *, cap: float) -> Tensor:
        """See `softcap`."""
        ...

    def kv_block(self, shape: KvShape) -> KvBlock:
        """See `kv_block`."""
        ...

    def write_kv(self, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
        """See `write_kv`."""
        ...

    def paged_attention(
        self, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
    ) -> Tensor:
        """See `paged_attention`."""
        ...

    def moe(self, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape) -> Tensor:
        """See `moe`."""
        ...

    def not_finite(self, x: Tensor) -> Tensor:
        """See `not_finite`."""
        ...

    def rows_not_finite(self, x: Tensor) -> list[int]:
        """See `rows_not_finite`."""
        ...

    def copy_blocks(self, pool: Tensor, src: Tensor, dst: Tensor) -> None:
        """See `copy_blocks`."""
        ...

    def zero_blocks(self, pool: Tensor, block_ids: Tensor) -> None:
        """See `zero_blocks`."""
        ...


def rms_norm(
    kernels: KernelSet, x: Tensor, weight: Tensor, *, eps: float, weight_offset: float = 0.0
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + weight_offset)` over the last dimension.

    Args:
        kernels: the home that computes it.
        x: [..., I].
        weight: [I], of x's dtype.
        eps: added to the mean square, above 0.
        weight_offset: 1.0 for Gemma, whose checkpoints store the weight minus one.

    Returns:
        [..., I] of x's dtype; the sum runs in at least float32.

    **Source:** Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, equation 4.
    """
    assert weight.shape == x.shape[-1:], (x.shape, weight.shape)
    return kernels.rms_norm(x, weight, eps=eps, weight_offset=weight_offset)


def add_rms_norm(
    kernels: KernelSet,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    *,
    eps: float,
    weight_offset: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The residual form: `h = x + residual`, then `rms_norm(h)`.

    Args:
        kernels: the home that computes it.
        x: [T, I], what the block before added.
        residual: [T, I]; not changed.
        weight: [I].
        eps: as in `rms_norm`.
        weight_offset: as in `rms_norm`.

    Returns:
        The norm of h and h itself, both [T, I] of x's dtype.
    """
    assert x.shape == residual.shape, (x.shape, residual.shape)
    assert weight.shape == x.shape[-1:], (x.shape, weight.shape)
    return kernels.add_rms_norm(x, residual, weight, eps=eps, weight_offset=weight_offset)


def layer_norm(kernels: KernelSet, x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """`(x - mean) / sqrt(var + eps) * weight + bias` over the last dimension.

    Args:
        kernels: the home that computes it.
        x: [T, I].
        weight: [I].
        bias: [I].
        eps: added to the variance, above 0.

    Returns:
        [T, I] of x's dtype.

    **Source:** Ba, Kiros, Hinton, Layer Normalization, 2016, equation 4.
    """
    assert weight.shape == bias.shape == x.shape[-1:], (x.shape, weight.shape, bias.shape)
    return kernels.layer_norm(x, weight, bias, eps=eps)


def rope_angles(kernels: KernelSet, positions: Tensor, frequencies: Tensor, *, factor: float = 1.0) -> Tensor:
    """Cosines and sines of `position * frequency`, times `factor`.

    Args:
        kernels: the home that computes it.
        positions: [T] int64, 0 or more.
        frequencies: [R / 2] float32.
        factor: on cosines and sines.

    Returns:
        [T, R] float32, cosines then sines. The angle is a float32 product, as in training, its cosine exact
        to a rounding, so that a row does not depend on where it lies in the step.
    """
    assert positions.dtype == torch.int64, positions.dtype
    assert frequencies.dtype == torch.float32, frequencies.dtype
    return kernels.rope_angles(positions, frequencies, factor=factor)


def rope(kernels: KernelSet, query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of every head by its token's angles; the rest passes.

    Dimension i is paired with i + R / 2: `(a, b) -> (a cos - b sin, b cos + a sin)`.

    Args:
        kernels: the home that computes it.
        query: [T, H, D]; not changed.
        key: [T, N, D] of query's dtype; not changed.
        angles: [T, R] float32, as `rope_angles` returns them, with R even and at most D.

    Returns:
        Both rotated, of their shapes and dtype, computed in float32.

    **Source:** Su et al., RoFormer, 2021, section 3.4.2, in the half-split layout of GPT-NeoX.
    """
    assert angles.shape[0] == query.shape[0] == key.shape[0], (query.shape, key.shape, angles.shape)
    assert angles.shape[1] <= query.shape[2] == key.shape[2], (query.shape, key.shape, angles.shape)
    assert angles.dtype == torch.float32, angles.dtype
    return kernels.rope(query, key, angles)


def silu_and_mul(kernels: KernelSet, gate: Tensor, up: Tensor) -> Tensor:
    """`gate * sigmoid(gate) * up`, element by element.

    Args:
        kernels: the home that computes it.
        gate: [T, I].
        up: [T, I].

    Returns:
        [T, I].

    **Source:** Shazeer, GLU Variants Improve Transformer, 2020, equation 6.
    """
    assert gate.shape == up.shape, (gate.shape, up.shape)
    return kernels.silu_and_mul(gate, up)


def gelu_and_mul(kernels: KernelSet, gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """`gelu(gate) * up`, element by element.

    Args:
        kernels: the home that computes it.
        gate: [T, I].
        up: [T, I].
        tanh: the tanh approximation (`gelu_pytorch_tanh`, `gelu_new`), else the exact erf form.

    Returns:
        [T, I].

    **Source:** Shazeer, GLU Variants Improve Transformer, 2020, equation 6.
    """
    assert gate.shape == up.shape, (gate.shape, up.shape)
    return kernels.gelu_and_mul(gate, up, tanh=tanh)


def gelu(kernels: KernelSet, x: Tensor, *, tanh: bool) -> Tensor:
    """`x * Phi(x)`, element by element.

    Args:
        kernels: the home that computes it.
        x: [T, I].
        tanh: as in `gelu_and_mul`.

    Returns:
        [T, I].

    **Source:** Hendrycks and Gimpel, Gaussian Error Linear Units, 2016, section 2.
    """
    return kernels.gelu(x, tanh=tanh)


def prepare_linear(
    kernels: KernelSet,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    quantization: Quantization = NO_QUANTIZATION,
    parts: Sequence[int] = (),
    release: Release | None = None,
) -> LinearWeight:
    """Bring a weight into the form that the home multiplies by; once, while loading.

    Args:
        kernels: the home that will use it.
        weight: [O, I] float32 or bfloat16; may be a transposed view, and mapped from a file.
        bias: [O] or None.
        quantization: the rule is that of `csrc/include/penstock/matrix.h`, in every home.
        parts: outputs of the pieces in which it is used, adding up to O; none leaves them to the home.
        release: told of rows that the home has copied.

    Returns:
        What `linear` takes.
    """
    assert weight.dim() == 2, weight.shape
    assert bias is None or bias.shape == weight.shape[:1], (weight.shape, bias)
    return kernels.prepare_linear(weight, bias, quantization=quantization, parts=parts, release=release)


def prepare_rounded(
    kernels: KernelSet,
    weight: RoundedWeight,
    bias: Tensor | None = None,
    *,
    dtype: torch.dtype,
    parts: Sequence[int] = (),
) -> LinearWeight:
    """The same for a weight that is rounded already: its numbers and scales are kept as they are.

    Args:
        kernels: the home that will use it.
        weight: [O, I], of one of the home's `rounded_methods`.
        bias: [O] or None.
        dtype: of the model, for homes that keep what the weight stands for.
        parts: as in `prepare_linear`.

    Returns:
        What `linear` takes.
    """
    assert bias is None or bias.shape == weight.values.shape[:1], (weight.values.shape, bias)
    assert weight.quantization.method in kernels.rounded_methods, (weight.quantization, kernels.name)
    return kernels.prepare_rounded(weight, bias, dtype=dtype, parts=parts)


def join_linears(kernels: KernelSet, apart: Sequence[LinearWeight]) -> LinearWeight | None:
    """One weight whose product is those of several side by side, for products of one input; while loading.

    Args:
        kernels: the home that prepared them and will use the result.
        apart: at least two, [O, I] each; not needed any more by the result.

    Returns:
        [sum of O, I], the same values; None where the home gains nothing by it or their formats differ.
    """
    assert len({each.in_features for each in apart}) == 1, [each.in_features for each in apart]
    return kernels.join_linears(apart)


def linear(kernels: KernelSet, x: Tensor, weight: LinearWeight) -> Tensor:
    """`x @ weight.T + bias`.

    Args:
        kernels: the home that computes it.
        x: [T, I] of the dtype of the weight that was prepared.
        weight: [O, I] and its bias, from `prepare_linear` of the same home.

    Returns:
        [T, O] of x's dtype; sums run in at least float32.
    """
    assert x.shape[1] == weight.in_features, (x.shape, weight.in_features)
    return kernels.linear(x, weight)


def prepare_adapter(
    kernels: KernelSet, pairs: Mapping[int, LowRankPair], *, num_sites: int, dtype: torch.dtype
) -> AdapterWeights:
    """Bring an adapter into the form that the home multiplies by; once, while it is loaded.

    Args:
        kernels: the home that will use it.
        pairs: by the number of their site; float32 or bfloat16, not needed any more by the result.
        num_sites: of the model.
        dtype: of the model's activations.

    Returns:
        What `AdapterRows` takes.
    """
    for site, pair in pairs.items():
        assert 0 <= site < num_sites, (site, num_sites)
        assert pair.a.shape[0] == pair.b.shape[1], (pair.a.shape, pair.b.shape)
    return kernels.prepare_adapter(pairs, num_sites=num_sites, dtype=dtype)


def lora(kernels: KernelSet, x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
    """`y + scale * B (A x)`, for each row with the adapter that the step says (`site.active`).

    Rows without an adapter, and those whose adapter brings nothing for this site, stay as they are.

    Args:
        kernels: the home that computes it.
        x: [T, I], what the product was made of.
        y: [T, O], its result; not used any more by the caller.
        site: the product.

    Returns:
        [T, O] of y's dtype, possibly y itself; sums run in at least float32.

    **Source:** Hu et al., LoRA, 2021, section 4.1.
    """
    assert x.shape[1] == site.in_features, (x.shape, site.in_features)
    assert y.shape == (x.shape[0], site.out_features), (y.shape, x.shape, site.out_features)
    return kernels.lora(x, y, site)


def embedding(kernels: KernelSet, token_ids: Tensor, weight: Tensor, *, scale: float = 1.0) -> Tensor:
    """The rows of `weight` that `token_ids` name, times `scale`.

    Args:
        kernels: the home that computes it.
        token_ids: [T] int64, each in [0, vocab_size).
        weight: [vocab_size, I].
        scale: rounded to the weight's dtype first, as in training (Gemma).

    Returns:
        [T, I], a new tensor.
    """
    assert token_ids.dtype == torch.int64, token_ids.dtype
    assert token_ids.dim() == 1, token_ids.shape
    return kernels.embedding(token_ids, weight, scale=torch.tensor(scale, dtype=weight.dtype).item())


def softcap(kernels: KernelSet, x: Tensor, *, cap: float) -> Tensor:
    """`cap * tanh(x / cap)`.

    Args:
        kernels: the home that computes it.
        x: [T, I] float32; not used any more by the caller.
        cap: above 0.

    Returns:
        [T, I] float32, possibly x itself.

    **Source:** Gemma Team, Gemma 2, 2024, section 2.
    """
    assert x.dtype == torch.float32, x.dtype
    return kernels.softcap(x, cap=cap)


def kv_block(kernels: KernelSet, shape: KvShape) -> KvBlock:
    """How the home keeps the keys of one block of one layer; the values lie as the keys.

    Args:
        kernels: the home.
        shape: what a block holds.
    """
    return kernels.kv_block(shape)


def make_slab(kernels: KernelSet, shape: KvShape, *, num_blocks: int) -> KvSlab:
    """Blocks of zeros for one layer, as the home keeps them; for tests and measurements.

    Args:
        kernels: the home.
        shape: what a block holds.
        num_blocks: P.
    """
    block = kernels.kv_block(shape)
    keys, values = (torch.zeros(num_blocks, *block.shape, dtype=block.dtype) for _ in range(2))
    return KvSlab(keys=keys, values=values, shape=shape)


def write_kv(kernels: KernelSet, keys: Tensor, values: Tensor, slab: KvSlab, slot_mapping: Tensor) -> None:
    """Store each token's key and value in its slot. Mutates `slab`.

    Example, B = 4: slot 13 is offset 1 of block 3.

    Args:
        kernels: the home that does it.
        keys: [T, N, D].
        values: [T, N, D].
        slab: P blocks of B slots, as the home keeps them; may be strided over blocks.
        slot_mapping: [T] int64, block_id * B + offset, no slot twice.
    """
    assert keys.shape == values.shape, (keys.shape, values.shape)
    assert keys.shape[1:] == (slab.shape.num_kv_heads, slab.shape.head_dim), (keys.shape, slab.shape)
    assert slot_mapping.shape == keys.shape[:1], (slot_mapping.shape, keys.shape)
    kernels.write_kv(keys, values, slab, slot_mapping)


def paged_attention(
    kernels: KernelSet, query: Tensor, slab: KvSlab, batch: AttentionBatch, shape: AttentionShape
) -> Tensor:
    """Causal attention of every new token over its own sequence's blocks; prefill and decode alike.

    The query in row r of a sequence with n rows and length L stands at position `L - n + r` and sees the
    positions `max(0, p - window + 1) .. p`. Query head h reads key/value head `h // (H / N)`. Slots that
    a token may not see never change its result, NaN in other sequences' blocks included.

    Args:
        kernels: the home that computes it.
        query: [T, H, D], the rows in the order of `batch`.
        slab: P blocks, this step's keys and values already written.
        batch: lengths and block tables of the layer's cache group.
        shape: scale, window, soft-cap.

    Returns:
        [T, H, D] of the query's dtype; softmax runs in at least float32.

    **Source:** Kwon et al., Efficient Memory Management for LLM Serving with PagedAttention, 2023, section 4;
    soft-cap: Gemma Team, Gemma 2, 2024, section 2.
    """
    assert query.shape[2] == slab.shape.head_dim, (query.shape, slab.shape)
    assert query.shape[1] % slab.shape.num_kv_heads == 0, (query.shape, slab.shape)
    assert query.shape[0] == batch.slot_mapping.shape[0], (query.shape, batch.slot_mapping.shape)
    return kernels.paged_attention(query, slab, batch, shape)


def moe(
    kernels: KernelSet, x: Tensor, router: Tensor, experts: Sequence[ExpertWeights], shape: MoeShape
) -> Tensor:
    """Each token's `top_k` experts by router probability, their outputs summed with those weights.

    Args:
        kernels: the home that computes it.
        x: [T, I].
        router: [E, I].
        experts: E gated MLPs.
        shape: how many experts, and whether their probabilities are made to sum to 1.

    Returns:
        [T, I] of x's dtype; the router's softmax (over all E) runs in at least float32.

    **Source:** Jiang et al., Mixtral of Experts, 2024, section 2.1.
    """
    assert router.shape == (len(experts), x.shape[1]), (router.shape, len(experts), x.shape)
    assert 1 <= shape.top_k <= len(experts), (shape.top_k, len(experts))
    return kernels.moe(x, router, experts, shape)


def not_finite(kernels: KernelSet, x: Tensor) -> Tensor:
    """Which rows hold NaN or infinity; waits for nothing.

    Args:
        kernels: the home that looks.
        x: [T, I].

    Returns:
        [T] bool where x lies, True for a row that does.
    """
    return kernels.not_finite(x)


def rows_not_finite(kernels: KernelSet, x: Tensor) -> list[int]:
    """Rows that hold NaN or infinity; waits for a device.

    Args:
        kernels: the home that looks.
        x: [T, I].

    Returns:
        Their indices, rising; mostly none.
    """
    return kernels.rows_not_finite(x)


def copy_blocks(kernels: KernelSet, pool: Tensor, src: Tensor, dst: Tensor) -> None:
    """Copy whole blocks: `pool[dst] = pool[src]`, all read before any is written. Mutates `pool`.

    Args:
        kernels: the home that does it.
        pool: [P, ...], the block dimension first.
        src: [n] int64 block ids.
        dst: [n] int64 block ids, none twice.
    """
    assert src.shape == dst.shape, (src.shape, dst.shape)
    kernels.copy_blocks(pool, src, dst)


def zero_blocks(kernels: KernelSet, pool: Tensor, block_ids: Tensor) -> None:
    """Fill whole blocks with zeros, NaN included. Mutates `pool`.

    Args:
        kernels: the home that does it.
        pool: [P, ...], the block dimension first.
        block_ids: [n] int64.
    """
    assert block_ids.dim() == 1, block_ids.shape
    kernels.zero_blocks(pool, block_ids)
