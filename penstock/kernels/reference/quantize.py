"""The quantization rule in plain torch, the oracle of the native packing (`csrc/include/penstock/matrix.h`).

Symmetric, to the nearest even number. Letters: O outputs, I inputs, G groups of inputs.
"""

import torch
from torch import Tensor

from penstock.kernels.quantization import Quantization

INT8_MAX = 127
INT4_MIN, INT4_MAX = -8, 7


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale an output, `max|w| / 127`.

    Args:
        weight: [O, I].

    Returns:
        Values [O, I] int8 and scales [O] float32.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / INT8_MAX
    inverse = torch.where(scales > 0, 1 / scales, 0.0)
    values = (wide * inverse[:, None]).round().clamp(-INT8_MAX, INT8_MAX)
    return values.to(torch.int8), scales


def dequantize_int8(values: Tensor, scales: Tensor) -> Tensor:
    """[O, I] float32."""
    return values.float() * scales[:, None]


def quantize_int4(weight: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """One scale an output and group, such that the value largest in magnitude becomes -8.

    Args:
        weight: [O, I]; the last group may be shorter.
        group_size: inputs in a group.

    Returns:
        Values [O, G * group_size] int8 in [-8, 7] and scales [O, G] float16.
    """
    num_groups = -(-weight.shape[1] // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, num_groups * group_size - weight.shape[1]))
    grouped = padded.view(weight.shape[0], num_groups, group_size)
    largest = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    scales = (largest / INT4_MIN).to(torch.float16)
    inverse = torch.where(scales != 0, 1 / scales.float(), 0.0)
    values = (grouped * inverse[:, :, None]).round().clamp(INT4_MIN, INT4_MAX)
    return values.flatten(1).to(torch.int8), scales


def dequantize_int4(values: Tensor, scales: Tensor, *, in_features: int) -> Tensor:
    """[O, in_features] float32."""
    grouped = values.float().view(*scales.shape, -1) * scales.float()[:, :, None]
    return grouped.flatten(1)[:, :in_features]


def quantize_dequantize(weight: Tensor, quantization: Quantization) -> Tensor:
    """What a quantized weight stands for.

    Args:
        weight: [O, I].
        quantization: int8 or int4.

    Returns:
        [O, I] float32.
    """
    if quantization.method == "int8":
        return dequantize_int8(*quantize_int8(weight))
    assert quantization.method == "int4", quantization
    values, scales = quantize_int4(weight, group_size=quantization.group_size)
    return dequantize_int4(values, scales, in_features=weight.shape[1])


def round_rows(x: Tensor) -> Tensor:
    """Rows rounded to int8 with a scale each, `max|x| / 127`, and back.

    Args:
        x: [T, I].

    Returns:
        [T, I] float32.
    """
    values, scales = quantize_int8(x)
    return dequantize_int8(values, scales)
