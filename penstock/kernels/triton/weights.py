"""Weights of products as they lie on the device.

```
dense  values [O, I] of the model's dtype
int8   values [O, I] int8                       scales [O] float32
int4   values [O, padded I / 2] uint8           scales [O, G] float16
fp8    values [O, I] float8_e4m3fn              scales [O] float32
```

Two inputs share a byte of int4, a `half` apart, so that a block of bytes is two blocks of neighbouring
inputs and no kernel needs to interleave. With groups of 32, half is 32; with larger ones it is 64:

```
byte j of block b     low nibble: input 2 half b + j      high nibble: input 2 half b + half + j      both + 8
```

The inputs are filled up to whole blocks with zeros. Letters: O outputs, I inputs, G groups of inputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

import torch
from torch import Tensor

from penstock.kernels.ops import LinearWeight
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.quantize import INT4_MIN, quantize_fp8, quantize_int4, quantize_int8
from penstock.kernels.rounded import RoundedWeight


class Format(IntEnum):
    """How values are kept; the kernels know the numbers."""

    DENSE = 0
    INT8 = 1
    INT4 = 2
    FP8 = 3


FORMATS: Final = {"none": Format.DENSE, "int8": Format.INT8, "int4": Format.INT4, "fp8": Format.FP8}
MAX_HALF: Final = 64
"""Inputs in one product of an int4 block: enough to keep the tensor cores busy."""


@dataclass(slots=True, kw_only=True, eq=False, weakref_slot=True)
class TritonLinear:
    """A weight and bias; see the drawing above."""

    values: Tensor
    scales: Tensor | None
    bias: Tensor | None
    """[O]"""
    in_features: int
    """I."""
    quantization: Quantization

    @property
    def format(self) -> Format:
        """How `values` are to be read."""
        return FORMATS[self.quantization.method]

    @property
    def out_features(self) -> int:
        """O."""
        return self.values.shape[0]

    @property
    def half(self) -> int:
        """Inputs from a low nibble to the high one of its byte; 0 if values are no nibbles."""
        return min(self.quantization.group_size, MAX_HALF) if self.format is Format.INT4 else 0

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(each.nbytes for each in (self.values, self.scales, self.bias) if each is not None)


def triton_weight(weight: LinearWeight) -> TritonLinear:
    """A weight that `prepare` or `prepare_rounded` made."""
    assert isinstance(weight, TritonLinear), type(weight)
    return weight


def pack_int4(values: Tensor, *, half: int) -> Tensor:
    """Two integers a byte, as drawn at the top.

    Example, half 2, one output: [1 2 3 4 5] is filled up to [1 2 3 4 5 0 0 0] and packed as
    [1|3 2|4 5|0 0|0], each plus 8.

    Args:
        values: [O, I] int8 in [-8, 7].
        half: inputs between the two of a byte.

    Returns:
        [O, padded I / 2] uint8.
    """
    missing = -values.shape[1] % (2 * half)
    stored = torch.nn.functional.pad(values, (0, missing)).sub(INT4_MIN).to(torch.uint8)
    low, high = stored.view(values.shape[0], -1, 2, half).unbind(2)
    return (low | high << 4).flatten(1)


def prepare(weight: Tensor, bias: Tensor | None, *, quantization: Quantization) -> TritonLinear:
    """As `ops.prepare_linear`; a dense weight is kept as it is, unless its inputs do not lie side by side."""
    if quantization.method == "none":
        values = weight if weight.stride(1) == 1 else weight.contiguous()
        return TritonLinear(
            values=values, scales=None, bias=bias, in_features=weight.shape[1], quantization=quantization
        )
    if quantization.method == "fp8":
        values, scales = quantize_fp8(weight)
    elif quantization.method == "int8":
        values, scales = quantize_int8(weight)
    else:
        values, scales = quantize_int4(weight, group_size=quantization.group_size)
    rounded = RoundedWeight(
        values=values[:, : weight.shape[1]].contiguous(), scales=scales, quantization=quantization
    )
    return prepare_rounded(rounded, bias)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Rows of one below those of the other; as bytes, since fp8 cannot be joined everywhere."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.cat(list(tensors))
    return torch.cat([each.view(torch.uint8) for each in tensors]).view(dtype)


def _stacked_bias(weights: Sequence[TritonLinear]) -> Tensor | None:
    """[sum of O], zeros for those without; None if all are."""
    given = next((each.bias for each in weights if each.bias is not None), None)
    if given is None:
        return None
    return torch.cat(
        [given.new_zeros(each.out_features) if each.bias is None else each.bias for each in weights]
    )


def join(weights: Sequence[TritonLinear]) -> TritonLinear | None:
    """As `ops.join_linears`: every format keeps an output by itself, so they are put together as they are."""
    first = weights[0]
    if any(
        (each.quantization, each.values.dtype) != (first.quantization, first.values.dtype) for each in weights
    ):
        return None
    scales = [each.scales for each in weights if each.scales is not None]
    return TritonLinear(
        values=_stacked([each.values for each in weights]),
        scales=_stacked(scales) if scales else None,
        bias=_stacked_bias(weights),
        in_features=first.in_features,
        quantization=first.quantization,
    )


def prepare_rounded(weight: RoundedWeight, bias: Tensor | None) -> TritonLinear:
    """As `ops.prepare_rounded`: the very same numbers and scales."""
    prepared = TritonLinear(
        values=weight.values,
        scales=weight.scales,
        bias=bias,
        in_features=weight.values.shape[1],
        quantization=weight.quantization,
    )
    if prepared.format is Format.INT4:
        prepared.values = pack_int4(weight.values, half=prepared.half)
    return prepared
