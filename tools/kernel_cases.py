"""What `compile_kernels` compiles: each operation of the triton home, called as the engine calls it.

Parts have names; a part is a list of cases, each a name and a call. Numbers do not matter, as nothing is
computed: only shapes, dtypes and options do, for they choose the kernels and their constants.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch
from torch import Tensor

from penstock.kernels import ops
from penstock.kernels.adapters import AdapterRows, LoraSites, LowRankPair
from penstock.kernels.batch import AttentionBatch, KvShape
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Method, Quantization
from penstock.kernels.triton import linear
from penstock.kernels.triton.kernel_set import TritonKernels
from penstock.kernels.triton.sampling import DrawRequest, Edits, draw_tokens
from penstock.kernels.triton.weights import FORMATS, Format, TritonLinear

BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32

Case = tuple[str, Callable[[], None]]


def _batch(lengths: Sequence[tuple[int, int]], *, block_size: int) -> AttentionBatch:
    new = [each for each, _ in lengths]
    most = max(length for _, length in lengths)
    return AttentionBatch(
        query_start_loc=torch.tensor([0, *new]).cumsum(0).int(),
        seq_lens=torch.tensor([length for _, length in lengths], dtype=torch.int32),
        block_tables=torch.zeros(len(lengths), -(-most // block_size), dtype=torch.int32),
        slot_mapping=torch.zeros(sum(new), dtype=torch.int64),
        query_lens_host=tuple(new),
        seq_lens_host=tuple(length for _, length in lengths),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionCase:
    """One call of attention, and the write before it."""

    name: str
    head_dim: int = 128
    group: int = 4
    kept: torch.dtype = BFLOAT16
    dtype: torch.dtype = BFLOAT16
    window: int | None = None
    softcap: float | None = None
    is_deterministic: bool = False
    lengths: tuple[tuple[int, int], ...] = ((1, 32768), (300, 300))
    """New tokens and tokens in all of the sequences, each a step: a decode far into a text, a prompt."""

    def run(self) -> None:
        """Each step writes and attends."""
        kernels = TritonKernels(KernelOptions(is_deterministic=self.is_deterministic))
        kv = KvShape(block_size=16, num_kv_heads=2, head_dim=self.head_dim, dtype=self.kept)
        slab = ops.make_slab(kernels, kv, num_blocks=2)
        shape = ops.AttentionShape(scale=self.head_dim**-0.5, window=self.window, softcap=self.softcap)
        for lengths in self.lengths:
            batch = _batch([lengths], block_size=16)
            num_rows = sum(batch.query_lens_host)
            query = torch.zeros(num_rows, 2 * self.group, self.head_dim, dtype=self.dtype)
            new = torch.zeros(num_rows, 2, self.head_dim, dtype=self.dtype)
            ops.write_kv(kernels, new, new, slab, batch.slot_mapping)
            ops.paged_attention(kernels, query, slab, batch, shape)


ATTENTION: Final = (
    AttentionCase(name="attention, Llama"),
    AttentionCase(name="attention, guesses", lengths=((3, 3000), (16, 3000))),
    AttentionCase(name="attention, head size 64, 7 to 1", head_dim=64, group=7),
    AttentionCase(name="attention, head size 96", head_dim=96, group=1),
    AttentionCase(name="attention, head size 256, window, cap", head_dim=256, window=4096, softcap=50.0),
    AttentionCase(name="attention, int8", kept=torch.int8),
    AttentionCase(name="attention, fp8", kept=torch.float8_e4m3fn),
    AttentionCase(name="attention, deterministic", is_deterministic=True),
    AttentionCase(name="attention, float32", kept=FLOAT32, dtype=FLOAT32),
)


def _rows(dtype: torch.dtype) -> None:
    """What is computed row by row."""
    kernels = TritonKernels()
    x, weight = _empty(64, 4096, dtype=dtype), _empty(4096, dtype=dtype)
    ops.rms_norm(kernels, x.view(64, 32, 128), weight[:128], eps=1e-5)
    ops.add_rms_norm(kernels, x, x, weight, eps=1e-5)
    ops.layer_norm(kernels, x, weight, weight, eps=1e-5)
    positions = torch.zeros(64, dtype=torch.int64)
    angles = ops.rope_angles(kernels, positions, torch.zeros(64), factor=1.5)
    ops.rope(kernels, x.view(64, 32, 128), x[:, :1024].view(64, 8, 128), angles)
    gate, up = torch.split(_empty(64, 2 * 4096, dtype=dtype), 4096, dim=1)
    ops.silu_and_mul(kernels, gate, up)
    for tanh in (False, True):
        ops.gelu_and_mul(kernels, x, x, tanh=tanh)
        ops.gelu(kernels, x, tanh=tanh)
    ops.embedding(kernels, positions, x, scale=2.0)
    ops.softcap(kernels, x.float(), cap=30.0)
    ops.not_finite(kernels, x)


def _empty(*shape: int, dtype: torch.dtype = BFLOAT16) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _weight(rule: Quantization, outputs: int, inputs: int) -> TritonLinear:
    """A weight of nothing in the right form."""
    kept = FORMATS[rule.method]
    values = {
        Format.DENSE: ((outputs, inputs), BFLOAT16),
        Format.INT8: ((outputs, inputs), torch.int8),
        Format.INT4: ((outputs, inputs // 2), torch.uint8),
        Format.FP8: ((outputs, inputs), torch.float8_e4m3fn),
    }[kept]
    scales = _empty(outputs, dtype=FLOAT32)
    if kept is Format.INT4:
        scales = _empty(outputs, inputs // rule.group_size, dtype=torch.float16)
    return TritonLinear(
        values=_empty(*values[0], dtype=values[1]),
        scales=None if kept is Format.DENSE else scales,
        bias=None,
        in_features=inputs,
        quantization=rule,
    )


def _rules() -> Iterator[Quantization]:
    yield Quantization()
    kinds: tuple[tuple[Method, int], ...] = (("int8", 128), ("int4", 32), ("int4", 128), ("fp8", 128))
    for method, size in kinds:
        yield Quantization(method=method, group_size=size)
        yield Quantization(method=method, group_size=size, activations="bf16")


def _products(rule: Quantization) -> None:
    """One row, few and many, in both modes."""
    weight = _weight(rule, 4096, 4096)
    for num_rows, is_deterministic in ((1, False), (16, False), (256, False), (4, True), (256, True)):
        x = _empty(num_rows, 4096)
        linear.multiply(x, weight, is_deterministic=is_deterministic, dtype=BFLOAT16)


def _experts(rule: Quantization) -> None:
    """Few pairs and many, in both modes."""
    layer = [
        ops.ExpertWeights(
            gate=_weight(rule, 768, 2048), up=_weight(rule, 768, 2048), down=_weight(rule, 2048, 768)
        )
        for _ in range(4)
    ]
    shape = ops.MoeShape(top_k=2, renormalize=True)
    for is_deterministic in (False, True):
        kernels = TritonKernels(KernelOptions(is_deterministic=is_deterministic))
        for num_rows in (2, 1024):
            ops.moe(kernels, _empty(num_rows, 2048), _empty(4, 2048), layer, shape)


def _adapters(rank: int) -> None:
    """Some rows of a batch."""
    kernels = TritonKernels()
    site = LoraSites().add("module", in_features=4096, out_features=4096)
    pair = LowRankPair(a=_empty(rank, 4096), b=_empty(4096, rank), scale=1.0)
    prepared = ops.prepare_adapter(kernels, {0: pair}, num_sites=1, dtype=BFLOAT16)
    site.active.rows = (AdapterRows(first_row=0, num_rows=3, weights=prepared),)
    ops.lora(kernels, _empty(4, 4096), _empty(4, 4096), site)


def _sampling(dtype: torch.dtype) -> None:
    """Every launch, at the largest vocabulary of a family."""
    vocab, num_draws = 151_936, 4
    longs, words = torch.zeros(num_draws, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    edits = Edits(
        rows=longs,
        mask_of=longs,
        masks=torch.zeros(1, vocab // 32, dtype=torch.int32),
        offsets=torch.zeros(num_draws + 1, dtype=torch.int64),
        ids=longs,
        kinds=words,
        biases=torch.zeros(1),
        counts=torch.zeros(1),
        penalties=torch.zeros(num_draws, 3),
        most_tokens=1,
    )
    for num_top in (None, 0, 20):
        request = DrawRequest(
            rows=longs,
            places=longs,
            numbers=torch.zeros(6, num_draws, dtype=torch.float64),
            edits=edits,
            is_random=True,
            has_top_k=True,
            has_top_p=True,
            has_min_p=True,
            num_top=num_top,
        )
        draw_tokens(torch.zeros(num_draws, vocab, dtype=dtype), request)


PARTS: Final[dict[str, tuple[Case, ...]]] = {
    "attention": tuple((each.name, each.run) for each in ATTENTION),
    "rows": tuple((f"rows, {dtype}", partial(_rows, dtype)) for dtype in (BFLOAT16, FLOAT32)),
    "products": tuple((f"products, {rule}", partial(_products, rule)) for rule in _rules()),
    "experts": tuple((f"experts, {rule}", partial(_experts, rule)) for rule in _rules()),
    "adapters": tuple((f"adapters, rank {rank}", partial(_adapters, rank)) for rank in (16, 130)),
    "sampling": tuple((f"sampling, {dtype}", partial(_sampling, dtype)) for dtype in (FLOAT32, BFLOAT16)),
}
"""The cases of each part."""
