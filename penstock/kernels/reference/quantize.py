"""The quantization rule in plain torch, the oracle of the native packing (`csrc/include/penstock/matrix.h`).

Symmetric, to the nearest even number. Letters: O outputs, I inputs, G groups of inputs.
"""

import torch
from torch import Tensor

from penstock.kernels.quantization import Quantization

INT8_MAX = 127
FP8_MAX = 448
"""The largest number of e4m3 without infinities."""
INT4_MIN, INT4_MAX = -8, 7
KV_LIMITS = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest number of a key or value becomes."""
INT4_DIVISORS = (-7.0, -7.5, -8.0, -8.5, -9.0)
"""What the value of greatest magnitude may become: rounding it off lets the others be finer."""


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale an output, `max|w| / 127`.

    Args:
        weight: [O, I].

    Returns:
        Values [O, I] int8 and scales [O] float32.
    """
    wide = weight.float()
    scales = wide.abs().amax(dim=1) / INT8_MAX
    values = torch.where(scales[:, None] > 0, wide / scales[:, None], 0.0).round()
    return values.to(torch.int8), scales


def dequantize_int8(values: Tensor, scales: Tensor) -> Tensor:
    """[O, I] float32."""
    return values.float() * scales[:, None]


def _halved_sum(errors: Tensor) -> Tensor:
    # [..., n] -> [...]: e[j] + e[j + n/2] until one is left, which fixes the order of the roundings.
    while errors.shape[-1] > 1:
        first, second = errors.chunk(2, dim=-1)
        errors = first + second
    return errors.squeeze(-1)


def _try_scale(grouped: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    # Values of [O, G, size] under float16 scales [O, G], and the squared error of each group.
    step = scales.float()
    inverse = torch.where(step != 0, 1 / step, 0.0)
    values = (grouped * inverse[..., None]).round().clamp(INT4_MIN, INT4_MAX)
    return values, _halved_sum((grouped - values * step[..., None]).square())


def quantize_int4(weight: Tensor, *, group_size: int) -> tuple[Tensor, Tensor]:
    """One scale an output and group: of five the one with the least squared error, the first of equals.

    Args:
        weight: [O, I]; the last group may be shorter, as if zeros followed.
        group_size: inputs in a group, a power of two.

    Returns:
        Values [O, G * group_size] int8 in [-8, 7] and scales [O, G] float16.
    """
    num_groups = -(-weight.shape[1] // group_size)
    padded = torch.nn.functional.pad(weight.float(), (0, num_groups * group_size - weight.shape[1]))
    grouped = padded.view(weight.shape[0], num_groups, group_size)
    extreme = grouped.gather(2, grouped.abs().argmax(dim=2, keepdim=True)).squeeze(2)
    best_scales = (extreme / INT4_DIVISORS[0]).to(torch.float16)
    best_values, best_errors = _try_scale(grouped, best_scales)
    for divisor in INT4_DIVISORS[1:]:
        scales = (extreme / divisor).to(torch.float16)
        values, errors = _try_scale(grouped, scales)
        is_better = errors < best_errors
        best_values = torch.where(is_better[..., None], values, best_values)
        best_scales = torch.where(is_better, scales, best_scales)
        best_errors = torch.where(is_better, errors, best_errors)
    return best_values.flatten(1).to(torch.int8), best_scales


def dequantize_int4(values: Tensor, scales: Tensor, *, in_features: int) -> Tensor:
    """[O, in_features] float32."""
    grouped = values.float().view(*scales.shape, -1) * scales.float()[:, :, None]
    return grouped.flatten(1)[:, :in_features]


def quantize_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """One scale a row, `max|w| / 448`; weights and inputs alike.

    Args:
        weight: [O, I].

    Returns:
        Values [O, I] float8_e4m3fn, to the nearest even, and scales [O] float32.
    """
    wide = weight.float()
    largest = wide.abs().amax(dim=1)
    factors = torch.where(largest > 0, FP8_MAX / largest, 0.0)
    return (wide * factors[:, None]).to(torch.float8_e4m3fn), largest / FP8_MAX


def quantize_dequantize(weight: Tensor, quantization: Quantization) -> Tensor:
    """What a quantized weight stands for.

    Args:
        weight: [O, I].
        quantization: any but none.

    Returns:
        [O, I] float32.
    """
    if quantization.method == "int8":
        return dequantize_int8(*quantize_int8(weight))
    if quantization.method == "fp8":
        values, scales = quantize_fp8(weight)
        return values.float() * scales[:, None]
    assert quantization.method == "int4", quantization
    values, scales = quantize_int4(weight, group_size=quantization.group_size)
    return dequantize_int4(values, scales, in_features=weight.shape[1])


def round_heads(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys or values as a rounded KV cache keeps them, with a scale a token and head.

    Args:
        x: [T, N, D].
        dtype: int8, or float8_e4m3fn whose largest number is 448.

    Returns:
        Numbers [T, N, D] of `dtype` and scales [T, N] float32; a head of zeros has scale 0.
    """
    wide = x.float()
    scales = wide.abs().amax(dim=-1) / KV_LIMITS[dtype]
    numbers = wide / torch.where(scales > 0, scales, 1.0).unsqueeze(-1)
    return (numbers.round() if dtype == torch.int8 else numbers).to(dtype), scales


def round_rows(x: Tensor) -> Tensor:
    """Rows rounded to int8 with a scale each, `max|x| / 127`, and back.

    Args:
        x: [T, I].

    Returns:
        [T, I] float32.
    """
    wide = x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    factors = torch.where(largest > 0, INT8_MAX / largest, 0.0)
    return (wide * factors).round() * (largest / INT8_MAX)


def round_inputs(x: Tensor, quantization: Quantization) -> Tensor:
    """Inputs as a product with rounded inputs sees them.

    Args:
        x: [T, I].
        quantization: of the product's weight.

    Returns:
        [T, I] float32.
    """
    if quantization.method != "fp8":
        return round_rows(x)
    values, scales = quantize_fp8(x)
    return values.float() * scales[:, None]
