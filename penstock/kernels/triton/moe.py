"""Mixtures of experts on the device, without a word to the host: no count of tokens decides a launch.

A *pair* is a token and one of its experts, number `token * top_k + rank`. Pairs are put in the order of
their experts, each expert's filled up to whole blocks of rows; every block is multiplied with its expert's
weights, and a token's `top_k` results are added in the order of their rank. Blocks are as many as there
could be; those that are not needed end at once.

Example, 3 tokens, top_k 2, blocks of 2 rows, chosen [[1, 0], [1, 2], [0, 1]]:

```
pair            0 1 2 3 4 5        its expert  1 0 1 2 0 1
order           [1 4] [0 2] [5 -] [3 -] [- -]
block_experts    0     1     1     2     -1
```

Letters: T tokens, E experts, P pairs, I features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from penstock.core.errors import UnsupportedModelError
from penstock.kernels.ops import ExpertWeights, MoeShape
from penstock.kernels.quantization import NO_QUANTIZATION
from penstock.kernels.triton.elementwise import sigmoid
from penstock.kernels.triton.launch import inlined, narrow
from penstock.kernels.triton.linear import FIXED_ROWS, choose_step, multiply, round_rows
from penstock.kernels.triton.products import finish, sum_chunk
from penstock.kernels.triton.weights import TritonLinear, triton_weight

SCANNED_PAIRS: Final = 1024
"""Pairs that a program looks at in one turn when it seeks those of its expert."""
SUMMED_FEATURES: Final = 1024
"""Features of one program that adds a token's results."""
ALIGNMENT: Final = 16
"""Elements: tables of offsets that are multiples of it let the kernels load 16 bytes at once."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ExpertTable:
    """Where one of the matrices of each expert lies, as a distance from that of the first."""

    first: TritonLinear
    last: TritonLinear
    value_offsets: Tensor
    """[E] int64, elements."""
    scale_offsets: Tensor
    """[E] int64, elements; zeros where there are no scales."""
    is_aligned: bool
    addresses: tuple[int, int]
    """Of the first and last values when the table was made: weights may be moved while the engine sleeps."""

    def is_current(self) -> bool:
        """False if weights were moved since."""
        return self.addresses == (self.first.values.data_ptr(), self.last.values.data_ptr())


def _offsets(tensors: Sequence[Tensor | None]) -> list[int]:
    first = tensors[0]
    if first is None:
        return [0] * len(tensors)
    found = []
    for each in tensors:
        assert each is not None
        distance, rest = divmod(each.data_ptr() - first.data_ptr(), first.element_size())
        assert rest == 0, (each.data_ptr(), first.data_ptr())
        found.append(distance)
    return found


def _make_table(matrices: Sequence[TritonLinear]) -> ExpertTable:
    first, last = matrices[0], matrices[-1]
    if any(each.quantization != first.quantization for each in matrices):
        raise UnsupportedModelError(
            "the experts of one layer are quantized in different ways, which kernels triton cannot multiply"
        )
    values = _offsets([each.values for each in matrices])
    device = first.values.device
    return ExpertTable(
        first=first,
        last=last,
        value_offsets=torch.tensor(values, dtype=torch.int64, device=device),
        scale_offsets=torch.tensor(
            _offsets([each.scales for each in matrices]), dtype=torch.int64, device=device
        ),
        is_aligned=all(each % ALIGNMENT == 0 for each in values),
        addresses=(first.values.data_ptr(), last.values.data_ptr()),
    )


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LayerTables:
    """The tables of one layer of experts."""

    gate: ExpertTable
    up: ExpertTable
    down: ExpertTable

    def is_current(self) -> bool:
        """False if weights were moved since."""
        return self.gate.is_current() and self.up.is_current() and self.down.is_current()


class ExpertTables:
    """Tables by layer, made when the layer first computes: in the warm-up, before any graph is captured."""

    def __init__(self) -> None:
        self._tables: WeakKeyDictionary[TritonLinear, LayerTables] = WeakKeyDictionary()

    def of(self, experts: Sequence[ExpertWeights]) -> LayerTables:
        """The tables of a layer, made anew if its weights were moved.

        Raises:
            UnsupportedModelError: its experts are not quantized alike.
        """
        key = triton_weight(experts[0].gate)
        tables = self._tables.get(key)
        if tables is None or not tables.is_current():
            tables = LayerTables(
                gate=_make_table([triton_weight(each.gate) for each in experts]),
                up=_make_table([triton_weight(each.up) for each in experts]),
                down=_make_table([triton_weight(each.down) for each in experts]),
            )
            self._tables[key] = tables
        return tables


@triton.jit
def _choose_kernel(
    logits: tl.tensor,
    weights: tl.tensor,
    chosen: tl.tensor,
    num_experts: tl.tensor,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    """Softmax over all experts, then the best one by one; of equals the first."""
    token = tl.program_id(0).to(tl.int64)
    experts, ranks = tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_K)
    is_expert = experts < num_experts
    logit = tl.load(logits + token * num_experts + experts, mask=is_expert, other=float("-inf"))
    rest = tl.exp(logit - tl.max(logit, axis=0))
    rest = tl.where(is_expert, rest / tl.sum(rest, axis=0), -1.0)
    best_weights, best_experts = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.int32)
    for rank in range(TOP_K):
        best = tl.max(rest, axis=0)
        # Without a best one, in a row of NaN, any expert will do: the result is NaN.
        expert = tl.min(tl.where(rest == best, experts, num_experts - 1), axis=0)
        best_weights = tl.where(ranks == rank, best, best_weights)
        best_experts = tl.where(ranks == rank, expert, best_experts)
        rest = tl.where(experts == expert, -1.0, rest)
    if RENORMALIZE:
        best_weights = best_weights / tl.sum(best_weights, axis=0)
    tl.store(weights + token * TOP_K + ranks, best_weights, mask=ranks < TOP_K)
    tl.store(chosen + token * TOP_K + ranks, best_experts, mask=ranks < TOP_K)


@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(chosen: tl.tensor, counts: tl.tensor, num_pairs: tl.tensor, BLOCK: tl.constexpr) -> None:
    expert = tl.program_id(0)
    found = tl.zeros((BLOCK,), tl.int32)
    start = 0
    while start < num_pairs:
        pairs = start + tl.arange(0, BLOCK)
        found += (tl.load(chosen + pairs, mask=pairs < num_pairs, other=-1) == expert).to(tl.int32)
        start += BLOCK
    tl.store(counts + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_blocks"])
def _order_kernel(
    chosen: tl.tensor,
    counts: tl.tensor,
    order: tl.tensor,
    block_experts: tl.tensor,
    num_pairs: tl.tensor,
    num_blocks: tl.tensor,
    num_experts: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_E: tl.constexpr,
) -> None:
    """One expert's pairs, in their own order, into its blocks; the last expert ends the list of blocks."""
    expert, experts = tl.program_id(0), tl.arange(0, BLOCK_E)
    count = tl.load(counts + experts, mask=experts < num_experts, other=0)
    blocks = (count + ROWS - 1) // ROWS
    first = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    end = first + tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    block = first
    last = tl.where(expert == num_experts - 1, num_blocks, end)
    while block < last:
        at = block + tl.arange(0, BLOCK)
        tl.store(block_experts + at, tl.where(at < end, expert, -1), mask=at < last)
        block += BLOCK
    position, start = first * ROWS, 0
    while start < num_pairs:
        pairs = start + tl.arange(0, BLOCK)
        is_mine = tl.load(chosen + pairs, mask=pairs < num_pairs, other=-1) == expert
        rank = tl.cumsum(is_mine.to(tl.int32), axis=0) - 1
        tl.store(order + position + rank, pairs, mask=is_mine)
        position += tl.sum(is_mine.to(tl.int32), axis=0)
        start += BLOCK
    filling = position + tl.arange(0, ROWS)
    tl.store(order + filling, -1, mask=filling < end * ROWS)


@inlined
def _expert_sum(
    x_rows: tl.tensor,
    row_mask: tl.tensor,
    w: tl.tensor,
    w_offsets: tl.tensor,
    w_scales: tl.tensor,
    scale_offsets: tl.tensor,
    x_scales: tl.tensor,
    scale_rows: tl.tensor,
    expert: tl.tensor,
    cols: tl.tensor,
    col_mask: tl.tensor,
    w_stride: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> tl.tensor:
    """[ROWS, BLOCK_N] products with one expert's matrix, scales included."""
    offset = tl.load(w_offsets + expert)
    if IS_ALIGNED:
        offset = tl.multiple_of(offset, 16)
    scales = w_scales + tl.load(scale_offsets + expert)
    CHUNK: tl.constexpr = (IN + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    total = sum_chunk(
        x_rows, row_mask, w + offset + cols * w_stride, scales + cols * ((IN + GROUP - 1) // GROUP),
        col_mask, 0,
        FORMAT, IS_ROUNDED, IN, GROUP, CHUNK, ROWS, BLOCK_N, BLOCK_K, IN % BLOCK_K == 0,
    )  # fmt: skip
    return finish(
        total, x_scales, scales, scales, scale_rows, row_mask, cols, col_mask, FORMAT, IS_ROUNDED, False
    )


@inlined
def _places(order: tl.tensor, ROWS: tl.constexpr, BLOCK_N: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """[ROWS, 1] pairs of this program's block, -1 where there is none, and [1, BLOCK_N] its features."""
    pairs = tl.load(order + tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]).to(tl.int64)
    return pairs, (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]).to(tl.int64)


@triton.jit
def _gated_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    order: tl.tensor,
    block_experts: tl.tensor,
    gate: tl.tensor,
    gate_offsets: tl.tensor,
    gate_scales: tl.tensor,
    gate_scale_offsets: tl.tensor,
    up: tl.tensor,
    up_offsets: tl.tensor,
    up_scales: tl.tensor,
    up_scale_offsets: tl.tensor,
    out: tl.tensor,
    num_cols: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    TOP_K: tl.constexpr,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """`silu(gate(x)) * up(x)` of one block's pairs and some features of the expert: out is [P, features]."""
    expert = tl.load(block_experts + tl.program_id(0))
    if expert >= 0:
        pairs, cols = _places(order, ROWS, BLOCK_N)
        row_mask, col_mask, tokens = pairs >= 0, cols < num_cols, pairs // TOP_K
        x_rows = x + tokens * x_stride
        gated = _expert_sum(
            x_rows, row_mask, gate, gate_offsets, gate_scales, gate_scale_offsets, x_scales, tokens,
            expert, cols, col_mask, w_stride,
            FORMAT, IS_ROUNDED, IN, GROUP, ROWS, BLOCK_N, BLOCK_K, IS_ALIGNED,
        )  # fmt: skip
        raised = _expert_sum(
            x_rows, row_mask, up, up_offsets, up_scales, up_scale_offsets, x_scales, tokens,
            expert, cols, col_mask, w_stride,
            FORMAT, IS_ROUNDED, IN, GROUP, ROWS, BLOCK_N, BLOCK_K, IS_ALIGNED,
        )  # fmt: skip
        hidden = narrow(gated * sigmoid(gated) * raised, out.dtype.element_ty)
        tl.store(out + pairs * num_cols + cols, hidden, mask=row_mask & col_mask)


@triton.jit
def _down_kernel(
    x: tl.tensor,
    x_scales: tl.tensor,
    order: tl.tensor,
    block_experts: tl.tensor,
    down: tl.tensor,
    down_offsets: tl.tensor,
    down_scales: tl.tensor,
    down_scale_offsets: tl.tensor,
    weights: tl.tensor,
    out: tl.tensor,
    num_cols: tl.tensor,
    x_stride: tl.tensor,
    w_stride: tl.tensor,
    FORMAT: tl.constexpr,
    IS_ROUNDED: tl.constexpr,
    IN: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
) -> None:
    """`weight * down(hidden)` of one block's pairs: out is [P, num_cols] float32."""
    expert = tl.load(block_experts + tl.program_id(0))
    if expert >= 0:
        pairs, cols = _places(order, ROWS, BLOCK_N)
        row_mask, col_mask = pairs >= 0, cols < num_cols
        total = _expert_sum(
            x + pairs * x_stride, row_mask, down, down_offsets, down_scales, down_scale_offsets,
            x_scales, pairs, expert, cols, col_mask, w_stride,
            FORMAT, IS_ROUNDED, IN, GROUP, ROWS, BLOCK_N, BLOCK_K, IS_ALIGNED,
        )  # fmt: skip
        total *= tl.load(weights + pairs, mask=row_mask, other=0.0)
        tl.store(out + pairs * num_cols + cols, total, mask=row_mask & col_mask)


@triton.jit
def _combine_kernel(
    parts: tl.tensor, out: tl.tensor, width: tl.tensor, TOP_K: tl.constexpr, BLOCK: tl.constexpr
) -> None:
    """A token's results added in the order of their rank."""
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for rank in range(TOP_K):
        total += tl.load(parts + (token * TOP_K + rank) * width + cols, mask=cols < width, other=0.0)
    tl.store(out + token * width + cols, narrow(total, out.dtype.element_ty), mask=cols < width)


def choose_experts(logits: Tensor, shape: MoeShape) -> tuple[Tensor, Tensor]:
    """Each token's experts and their weights.

    Args:
        logits: [T, E] float32 of the router.
        shape: how many, and whether their weights add up to 1.

    Returns:
        Weights [T, top_k] float32 and experts [T, top_k] int32, the best first.
    """
    num_tokens, num_experts = logits.shape
    weights = torch.empty(num_tokens, shape.top_k, dtype=torch.float32, device=logits.device)
    chosen = torch.empty(num_tokens, shape.top_k, dtype=torch.int32, device=logits.device)
    _choose_kernel[(num_tokens,)](
        logits, weights, chosen, num_experts, TOP_K=shape.top_k, RENORMALIZE=shape.renormalize,
        BLOCK_E=next_power_of_2(num_experts), BLOCK_K=next_power_of_2(shape.top_k), num_warps=1,
    )  # fmt: skip
    return weights, chosen


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairOrder:
    """Pairs by expert, in blocks; as drawn at the top."""

    order: Tensor
    """[num_blocks * rows] int32, -1 where a block is filled up."""
    block_experts: Tensor
    """[num_blocks] int32, -1 for blocks that are not needed."""
    rows: int
    """Of a block."""


def order_pairs(chosen: Tensor, *, num_experts: int, rows: int) -> PairOrder:
    """Sort pairs by expert.

    Args:
        chosen: [T, top_k] int32.
        num_experts: E.
        rows: of a block.
    """
    num_pairs = chosen.numel()
    num_blocks = min(num_pairs, num_pairs // rows + num_experts)
    counts = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    order = torch.empty(num_blocks * rows, dtype=torch.int32, device=chosen.device)
    block_experts = torch.empty(num_blocks, dtype=torch.int32, device=chosen.device)
    _count_kernel[(num_experts,)](chosen, counts, num_pairs, BLOCK=SCANNED_PAIRS)
    _order_kernel[(num_experts,)](
        chosen, counts, order, block_experts, num_pairs, num_blocks, num_experts,
        ROWS=rows, BLOCK=SCANNED_PAIRS, BLOCK_E=next_power_of_2(num_experts),
    )  # fmt: skip
    return PairOrder(order=order, block_experts=block_experts, rows=rows)


def _block_rows(num_pairs: int, num_experts: int, *, is_deterministic: bool) -> int:
    """Rows of a block: about what an expert gets, if the choice may depend on the batch."""
    if is_deterministic:
        return FIXED_ROWS
    return min(128, max(16, 1 << (num_pairs // num_experts).bit_length()))


def _form(table: ExpertTable, rows: int, outputs: int) -> dict[str, int | bool]:
    weight = table.first
    return {
        "FORMAT": int(weight.format),
        "IS_ROUNDED": weight.quantization.quantizes_activations,
        "IN": weight.in_features,
        "GROUP": weight.quantization.group_size,
        "ROWS": rows,
        "BLOCK_N": outputs,
        "BLOCK_K": choose_step(weight),
        "IS_ALIGNED": table.is_aligned,
        "num_warps": 8 if rows == 128 else 4,
        "num_stages": 3,
        "enable_fp_fusion": False,
    }


def _pointers(table: ExpertTable) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = table.first
    scales = table.value_offsets if weight.scales is None else weight.scales
    return weight.values, table.value_offsets, scales, table.scale_offsets


def _run_gated(x: Tensor, pairs: PairOrder, tables: LayerTables, *, num_pairs: int, top_k: int) -> Tensor:
    gate = tables.gate.first
    if gate.quantization != tables.up.first.quantization:
        raise UnsupportedModelError(
            "gate and up of an expert are quantized in different ways, which kernels triton cannot multiply"
        )
    hidden = torch.empty(num_pairs, gate.out_features, dtype=x.dtype, device=x.device)
    x, scales = round_rows(x, gate.quantization.method) if gate.quantization.quantizes_activations else (x, x)
    _gated_kernel[(pairs.block_experts.shape[0], cdiv(gate.out_features, 64))](
        x, scales, pairs.order, pairs.block_experts, *_pointers(tables.gate), *_pointers(tables.up),
        hidden, gate.out_features, x.stride(0), gate.values.stride(0),
        TOP_K=top_k, **_form(tables.gate, pairs.rows, 64),
    )  # fmt: skip
    return hidden


def _run_down(hidden: Tensor, pairs: PairOrder, weights: Tensor, table: ExpertTable) -> Tensor:
    down = table.first
    parts = torch.empty(hidden.shape[0], down.out_features, dtype=torch.float32, device=hidden.device)
    scales = hidden
    if down.quantization.quantizes_activations:
        hidden, scales = round_rows(hidden, down.quantization.method)
    outputs = 128 if pairs.rows == 128 else 64
    _down_kernel[(pairs.block_experts.shape[0], cdiv(down.out_features, outputs))](
        hidden, scales, pairs.order, pairs.block_experts, *_pointers(table), weights, parts,
        down.out_features, hidden.stride(0), down.values.stride(0), **_form(table, pairs.rows, outputs),
    )  # fmt: skip
    return parts


def moe(x: Tensor, router: Tensor, tables: LayerTables, shape: MoeShape, *, is_deterministic: bool) -> Tensor:
    """As `ops.moe`.

    Args:
        x: [T, I].
        router: [E, I].
        tables: of the layer's experts.
        shape: how many experts a token has.
        is_deterministic: blocks have a fixed number of rows.
    """
    num_tokens, num_experts = x.shape[0], router.shape[0]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not num_tokens:
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    routing = TritonLinear(
        values=router.contiguous(),
        scales=None,
        bias=None,
        in_features=x.shape[1],
        quantization=NO_QUANTIZATION,
    )
    logits = multiply(x, routing, is_deterministic=is_deterministic, dtype=torch.float32)
    weights, chosen = choose_experts(logits, shape)
    rows = _block_rows(chosen.numel(), num_experts, is_deterministic=is_deterministic)
    pairs = order_pairs(chosen, num_experts=num_experts, rows=rows)
    hidden = _run_gated(x, pairs, tables, num_pairs=chosen.numel(), top_k=shape.top_k)
    parts = _run_down(hidden, pairs, weights, tables.down)
    _combine_kernel[(num_tokens, cdiv(x.shape[1], SUMMED_FEATURES))](
        parts, out, x.shape[1], TOP_K=shape.top_k, BLOCK=SUMMED_FEATURES
    )
    return out
