"""Products of activations with prepared weights: which kernel, which tiles.

Dense weights are multiplied by cuBLAS through torch, a single row and rounded weights by the kernels of
`products`. In the deterministic mode cuBLAS is left out, since it picks its algorithm by the number of
rows, and tiles and chunks follow from the weight's shape alone.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional
from triton import cdiv, next_power_of_2

from penstock.kernels.quantization import Method
from penstock.kernels.reference.quantize import FP8_MAX, INT8_MAX
from penstock.kernels.triton import products
from penstock.kernels.triton.launch import INTERPRETED, num_processors
from penstock.kernels.triton.weights import Format, TritonLinear

TARGET_PROGRAMS: Final = 264
"""Programs that a product is cut into if its tiles are fewer: two for each multiprocessor of an H200. A
constant, so that no device's results depend on how many it has."""
MIN_CHUNK: Final = 512
"""Inputs of the shortest chunk: below, starting a program costs more than it does."""
FIXED_ROWS: Final = 64
"""Rows of a tile in the deterministic mode, whatever the step has: the fewest that Hopper's matrix
instructions take, so that a decode wastes least."""
ROW_PROGRAMS: Final = 1 if INTERPRETED.value else 4
"""Programs a multiprocessor that a single row is cut into, so that enough loads are under way."""
MAX_ROW_OUTPUTS: Final = 256 if INTERPRETED.value else 8
"""Outputs of one program for a single row; the interpreter, which pays for each program, takes more."""
ROW_TILE: Final = 512 * MAX_ROW_OUTPUTS
"""Weights that such a program reads at once: 32 a thread."""
SCALED_STEP: Final = 16
"""Whole multiples of it are the sizes that torch's product of fp8 matrices takes."""
HOPPER: Final = (9, 0)
"""Compute capability from which that product has a scale for each row and output."""
FINISH_OUTPUTS: Final = 512
"""Outputs of one program that adds chunks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How one product is cut."""

    rows: int
    outputs: int
    inputs: int
    """Of a step of the inner loop."""
    chunk: int
    """Inputs that are summed before chunks are added."""
    splits: int
    """Chunks."""
    is_parallel: bool
    """Chunks are computed side by side."""
    num_warps: int
    num_stages: int


def _cut(num_inputs: int, *, step: int, splits: int) -> tuple[int, int]:
    """Chunks of whole steps: their length and number, of at least `MIN_CHUNK` inputs.

    Example: 1,100 inputs in steps of 64 by up to 4 are 2 chunks of 576.
    """
    splits = max(1, min(splits, num_inputs // MIN_CHUNK))
    chunk = cdiv(cdiv(num_inputs, step), splits) * step
    return chunk, cdiv(num_inputs, chunk)


def choose_step(weight: TritonLinear) -> int:
    """Inputs of a step of the inner loop: 64 to 128 bytes of a row."""
    return 2 * weight.half or (128 if weight.format is Format.INT8 else 64)


def choose_tiling(num_rows: int, weight: TritonLinear, *, is_deterministic: bool) -> Tiling:
    """Tiles for a product.

    Args:
        num_rows: of the input, 1 or more.
        weight: what it is multiplied with.
        is_deterministic: nothing that a row's result depends on may follow from `num_rows`.
    """
    step = choose_step(weight)
    rows = FIXED_ROWS if is_deterministic else min(128, max(16, next_power_of_2(num_rows)))
    outputs = 128 if is_deterministic or rows == 128 else 64
    columns = cdiv(weight.out_features, outputs)
    tiles = columns if is_deterministic else columns * cdiv(num_rows, rows)
    chunk, splits = _cut(weight.in_features, step=step, splits=cdiv(TARGET_PROGRAMS, tiles))
    return Tiling(
        rows=rows,
        outputs=outputs,
        inputs=step,
        chunk=chunk,
        splits=splits,
        is_parallel=splits > 1 and (num_rows <= FIXED_ROWS or not is_deterministic),
        num_warps=8 if rows == 128 else 4,
        num_stages=3 if rows == 128 else 4,
    )


def round_rows(x: Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """Rows with a scale each, by the rule of `reference.quantize.round_inputs`.

    Args:
        x: [T, I].
        method: of the weight that they are multiplied with.

    Returns:
        [T, I] int8 or, for fp8, float8_e4m3fn, and [T] float32.
    """
    num_rows, width = x.shape
    dtype, limit = (torch.float8_e4m3fn, FP8_MAX) if method == "fp8" else (torch.int8, INT8_MAX)
    out = torch.empty(num_rows, width, dtype=dtype, device=x.device)
    scales = torch.empty(num_rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(width)
    if num_rows:
        products.round_rows_kernel[(num_rows,)](
            x, out, scales, x.stride(0), width,
            LIMIT=float(limit), BLOCK=block, num_warps=max(1, min(16, block // 512)),
        )  # fmt: skip
    return out, scales


def _multiply_tiles(x: Tensor, x_scales: Tensor, weight: TritonLinear, out: Tensor, tiling: Tiling) -> None:
    num_rows, num_cols = out.shape
    scales = out if weight.scales is None else weight.scales
    bias = out if weight.bias is None else weight.bias
    form = {
        "FORMAT": int(weight.format),
        "IS_ROUNDED": weight.quantization.quantizes_activations,
        "HAS_BIAS": weight.bias is not None,
    }
    target = out
    if tiling.is_parallel:
        target = torch.empty(tiling.splits, *out.shape, dtype=torch.float32, device=out.device)
    num_tiles = cdiv(num_rows, tiling.rows) * cdiv(num_cols, tiling.outputs)
    products.product_kernel[(num_tiles, tiling.splits if tiling.is_parallel else 1)](
        x, x_scales, weight.values, scales, bias, target,
        num_rows, num_cols, x.stride(0), weight.values.stride(0),
        **form,
        IN=weight.in_features, GROUP=weight.quantization.group_size, CHUNK=tiling.chunk, SPLITS=tiling.splits,
        IS_PARALLEL=tiling.is_parallel, BLOCK_M=tiling.rows, BLOCK_N=tiling.outputs, BLOCK_K=tiling.inputs,
        IS_EVEN=tiling.chunk * tiling.splits == weight.in_features,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, enable_fp_fusion=False,
    )  # fmt: skip
    if tiling.is_parallel:
        products.finish_kernel[(num_rows, cdiv(num_cols, FINISH_OUTPUTS))](
            target, x_scales, scales, bias, out, num_rows, num_cols,
            **form, SPLITS=tiling.splits, BLOCK_N=FINISH_OUTPUTS, enable_fp_fusion=False,
        )  # fmt: skip


def _multiply_row(x: Tensor, x_scales: Tensor, weight: TritonLinear, out: Tensor) -> None:
    num_cols = out.shape[1]
    share = num_cols // (ROW_PROGRAMS * num_processors(x.device))
    outputs = min(MAX_ROW_OUTPUTS, next_power_of_2(max(1, share // 2 + 1)))
    inputs = max(2 * weight.half, min(ROW_TILE // outputs, next_power_of_2(weight.in_features)))
    products.row_kernel[(cdiv(num_cols, outputs),)](
        x, x_scales, weight.values,
        out if weight.scales is None else weight.scales, out if weight.bias is None else weight.bias,
        out, num_cols, weight.values.stride(0),
        FORMAT=int(weight.format), IS_ROUNDED=weight.quantization.quantizes_activations,
        HAS_BIAS=weight.bias is not None, IN=weight.in_features, GROUP=weight.quantization.group_size,
        BLOCK_N=outputs, BLOCK_K=inputs, HALF=weight.half,
    )  # fmt: skip


def multiply(x: Tensor, weight: TritonLinear, *, is_deterministic: bool, dtype: torch.dtype) -> Tensor:
    """`x @ weight.T + bias` by the kernels of `products`.

    Args:
        x: [T, I].
        weight: [O, I].
        is_deterministic: a row's result may not depend on the other rows.
        dtype: of the result.

    Returns:
        [T, O] of `dtype`.
    """
    out = torch.empty(x.shape[0], weight.out_features, dtype=dtype, device=x.device)
    if not out.numel():
        return out
    x = x if x.stride(1) == 1 else x.contiguous()
    x, x_scales = (
        round_rows(x, weight.quantization.method) if weight.quantization.quantizes_activations else (x, x)
    )
    if x.shape[0] == 1 and not is_deterministic:
        _multiply_row(x, x_scales, weight, out)
    else:
        tiling = choose_tiling(x.shape[0], weight, is_deterministic=is_deterministic)
        _multiply_tiles(x, x_scales, weight, out, tiling)
    return out


def _serves_scaled(x: Tensor, weight: TritonLinear) -> bool:
    """True if torch's own product of two fp8 matrices takes these: Hopper or later, sizes in whole 16s."""
    return (
        weight.format is Format.FP8
        and weight.quantization.quantizes_activations
        and x.device.type == "cuda"
        and x.dtype == torch.bfloat16
        and weight.in_features % SCALED_STEP == weight.out_features % SCALED_STEP == 0
        and torch.cuda.get_device_capability(x.device) >= HOPPER
    )


def _multiply_scaled(x: Tensor, weight: TritonLinear) -> Tensor:
    """By torch's product of two fp8 matrices with a scale a row and a scale an output."""
    assert weight.scales is not None
    rounded, scales = round_rows(x, "fp8")
    out: Tensor = torch._scaled_mm(  # noqa: SLF001  there is no public name for it
        rounded,
        weight.values.t(),
        scale_a=scales[:, None],
        scale_b=weight.scales[None, :],
        out_dtype=x.dtype,
    )
    return out if weight.bias is None else out.add_(weight.bias)


def linear(x: Tensor, weight: TritonLinear, *, is_deterministic: bool) -> Tensor:
    """As `ops.linear`."""
    if x.shape[0] > 1 and not is_deterministic:
        if weight.format is Format.DENSE:
            return functional.linear(x, weight.values, weight.bias)
        if _serves_scaled(x, weight):
            return _multiply_scaled(x if x.stride(1) == 1 else x.contiguous(), weight)
    return multiply(x, weight, is_deterministic=is_deterministic, dtype=x.dtype)
