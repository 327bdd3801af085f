"""Writes tapes by hand, for tests of the passes."""

import torch

from penstock.kernels.batch import KvShape
from penstock.kernels.cpu import tape as t
from penstock.kernels.cpu.weights import PackedLinear
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization

COLS = 64
KV = KvShape(block_size=16, num_kv_heads=1, head_dim=32, dtype=torch.bfloat16)
WEIGHT = t.Constant.of(torch.ones(COLS, dtype=torch.bfloat16))
INT8 = Quantization(method="int8")


def weight(
    out_features: int = COLS, *, in_features: int = COLS, quantization: Quantization = NO_QUANTIZATION
) -> PackedLinear:
    """A weight without data: the passes look at its sizes only."""
    return PackedLinear(
        out_features=out_features,
        in_features=in_features,
        pieces=(),
        bias=None,
        quantization=quantization,
    )


class TapeBuilder:
    """Buffers and operations as a recorder would write them."""

    def __init__(self) -> None:
        self.buffers: list[t.Buffer] = []
        self.operations: list[t.Operation] = []
        self.inputs: list[int] = []

    def buffer(self, cols: int = COLS, *, dtype: torch.dtype = torch.bfloat16) -> t.Slice:
        self.buffers.append(t.Buffer(dtype=dtype, cols=cols))
        return t.Slice(buffer=len(self.buffers) - 1, col=0, cols=cols)

    def given(self, cols: int = COLS, *, dtype: torch.dtype = torch.bfloat16) -> t.Slice:
        self.buffers.append(t.Buffer(dtype=dtype, cols=cols, role=t.Role.EXTERNAL))
        self.inputs.append(len(self.buffers) - 1)
        return t.Slice(buffer=len(self.buffers) - 1, col=0, cols=cols)

    def add(self, operation: t.Operation) -> None:
        self.operations.append(operation)

    def linear(
        self, x: t.Slice, out_features: int = COLS, *, quantization: Quantization = NO_QUANTIZATION
    ) -> t.Slice:
        out = self.buffer(out_features)
        made = weight(out_features, in_features=x.cols, quantization=quantization)
        self.add(t.Linear(x=x, weights=(made,), outs=(out,)))
        return out

    def norm(self, x: t.Slice) -> t.Slice:
        out = self.buffer(x.cols)
        self.add(t.RmsNorm(x=x, weight=WEIGHT, eps=1e-6, weight_offset=0.0, group=x.cols, out=out))
        return out

    def sum(self, a: t.Slice, b: t.Slice) -> t.Slice:
        out = self.buffer(a.cols)
        self.add(t.Sum(a=a, b=b, out=out))
        return out

    def scale(self, x: t.Slice) -> t.Slice:
        """An operation that the passes leave alone, to start from or to read with."""
        out = self.buffer(x.cols)
        self.add(t.Scale(x=x, factor=2.0, out=out))
        return out

    def activate(self, x: t.Slice) -> t.Slice:
        out = self.buffer(x.cols)
        self.add(t.Activate(x=x, activation="gelu", out=out))
        return out

    def tape(self, result: t.Slice, *, dtype: torch.dtype = torch.bfloat16) -> t.Tape:
        self.buffers.append(t.Buffer(dtype=dtype, cols=result.cols, role=t.Role.EXTERNAL))
        output = len(self.buffers) - 1
        self.add(t.Convert(x=result, out=t.Slice(buffer=output, col=0, cols=result.cols)))
        return t.Tape(
            buffers=tuple(self.buffers),
            operations=tuple(self.operations),
            inputs=tuple(self.inputs),
            outputs=(output,),
        )


def kinds(tape: t.Tape) -> list[str]:
    return [type(operation).__name__ for operation in tape.operations]
