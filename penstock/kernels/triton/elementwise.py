"""Norms, rotation, activations, embedding: one read and one write of each value, computed in float32.

Every row is computed by itself and in one order, so that all of these serve the deterministic mode too.
Letters: T tokens, H heads, D head size, R rotated part of a head, I features.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv, next_power_of_2

from penstock.kernels.triton.launch import inlined, narrow

FEATURES_PER_WARP = 256
"""Eight values a thread: one load of 16 bytes of bfloat16."""
MAX_WARPS = 16
TILE = 1024
"""Values that one program of an activation computes; also the least that one program of a norm does."""
NO_ACTIVATION, SILU, GELU_ERF, GELU_TANH = (tl.constexpr(i) for i in range(4))


def _num_warps(num_values: int) -> int:
    return max(1, min(MAX_WARPS, num_values // FEATURES_PER_WARP))


def _tile(num_rows: int, width: int, *, size: int) -> tuple[int, int]:
    """Columns and rows of about `size` values: whole rows where they are narrow. Powers of two.

    The rows follow from the width alone, as long as there are so many: fewer variants to compile.
    """
    block = min(size, next_power_of_2(width))
    return block, 1 if num_rows == 1 else max(1, size // block)


def _rows(x: Tensor) -> Tensor:
    """[..., I] as [T, I] with features side by side."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.stride(1) == 1 else flat.contiguous()


def _heads(x: Tensor) -> Tensor:
    """[..., I] as [T, H, I] with features side by side: heads as they lie in a joined product, or H is 1."""
    return x if x.dim() == 3 and x.stride(2) == 1 else _rows(x)[:, None]


@inlined
def sigmoid(x: tl.tensor) -> tl.tensor:
    """Of float32; by the exponential of a negative number, which cannot overflow."""
    small = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@inlined
def tanh(x: tl.tensor) -> tl.tensor:
    """Of float32, good to a few roundings: a series near 0, where the quotient would lose digits."""
    small = tl.exp(-2.0 * tl.abs(x))
    quotient = (1.0 - small) / (1.0 + small)
    far = tl.where(x >= 0, quotient, -quotient)
    near = tl.where(tl.abs(x) < 0.25, x, 0.0)
    square = near * near
    series = 62.0 / 2835 * square - 17.0 / 315
    series = (series * square + 2.0 / 15) * square - 1.0 / 3
    return tl.where(tl.abs(x) < 0.25, near + near * square * series, far)


@inlined
def _gelu(x: tl.tensor, TANH: tl.constexpr) -> tl.tensor:
    """Of float32. Since 0.5 (1 + tanh(u)) is sigmoid(2 u), the tanh form needs no tanh."""
    if TANH:
        share = sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    return x * share


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x: tl.tensor,
    residual: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    summed: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    num_heads: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    residual_stride: tl.tensor,
    eps: tl.tensor,
    offset: tl.tensor,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # A row is a head of a token, or a token as if it had one head.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < width)
    source = x + rows // num_heads * token_stride + rows % num_heads * head_stride
    wide = tl.load(source + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        wide += tl.load(residual + rows * residual_stride + cols, mask=mask, other=0.0).to(tl.float32)
        # The norm is of the sum as the next layer sees it.
        rounded = narrow(wide, summed.dtype.element_ty)
        tl.store(summed + rows * width + cols, rounded, mask=mask)
        wide = rounded.to(tl.float32)
    mean_square = tl.sum(wide * wide, axis=1)[:, None] / width
    factor = tl.load(weight + cols, mask=cols < width, other=0.0).to(tl.float32) + offset
    normed = wide / tl.sqrt(mean_square + eps) * factor
    tl.store(out + rows * width + cols, narrow(normed, out.dtype.element_ty), mask=mask)


def _launch_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    heads, width = _heads(x), x.shape[-1]
    other = heads[:, 0] if residual is None else _rows(residual)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    summed = out if residual is None else torch.empty_like(out)
    num_rows, block = heads.shape[0] * heads.shape[1], next_power_of_2(width)
    rows = max(1, TILE // block)
    if num_rows:
        _rms_norm_kernel[(cdiv(num_rows, rows),)](
            heads,
            other,
            weight,
            out,
            summed,
            num_rows,
            width,
            heads.shape[1],
            heads.stride(0),
            heads.stride(1),
            other.stride(0),
            eps,
            weight_offset,
            HAS_RESIDUAL=residual is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=_num_warps(rows * block),
        )
    return out, summed


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    """As `ops.rms_norm`."""
    return _launch_rms_norm(x, None, weight, eps=eps, weight_offset=weight_offset)[0]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """As `ops.add_rms_norm`, in one pass over the rows."""
    return _launch_rms_norm(x, residual, weight, eps=eps, weight_offset=weight_offset)


@triton.jit
def _layer_norm_kernel(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    width: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    mask = cols < width
    wide = tl.load(x + row * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask, wide - tl.sum(wide, axis=0) / width, 0.0)
    variance = tl.sum(centred * centred, axis=0) / width
    factor = tl.load(weight + cols, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + cols, mask=mask, other=0.0).to(tl.float32)
    normed = centred / tl.sqrt(variance + eps) * factor + shift
    tl.store(out + row * width + cols, narrow(normed, out.dtype.element_ty), mask=mask)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As `ops.layer_norm`."""
    flat, width = _rows(x), x.shape[-1]
    out = torch.empty(flat.shape, dtype=x.dtype, device=x.device)
    block = next_power_of_2(width)
    if out.numel():
        _layer_norm_kernel[(flat.shape[0],)](
            flat, weight, bias, out, width, flat.stride(0), eps, BLOCK=block, num_warps=_num_warps(block)
        )
    return out.view(x.shape)


@triton.jit(do_not_specialize=["num_rows"])
def _angles_kernel(
    positions: tl.tensor,
    frequencies: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    half: tl.tensor,
    FACTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    # The angle is a float32 product; its cosine is taken in float64: float32's own cosine of 100,000 radians
    # is right to a rounding only where the argument is reduced with care.
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    dims = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (dims < half)
    position = tl.load(positions + rows, mask=rows < num_rows, other=0).to(tl.float32)
    angle = (position * tl.load(frequencies + dims, mask=dims < half, other=0.0)).to(tl.float64)
    at = out + rows * 2 * half + dims
    tl.store(at, (tl.cos(angle) * FACTOR).to(tl.float32), mask=mask)
    tl.store(at + half, (tl.sin(angle) * FACTOR).to(tl.float32), mask=mask)


def rope_angles(positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
    """As `ops.rope_angles`."""
    num_tokens, half = positions.shape[0], frequencies.shape[0]
    out = torch.empty(num_tokens, 2 * half, dtype=torch.float32, device=positions.device)
    block, rows = _tile(num_tokens, half, size=TILE // 4)
    if num_tokens:
        _angles_kernel[(cdiv(num_tokens, rows),)](
            positions,
            frequencies,
            out,
            num_tokens,
            half,
            FACTOR=factor,
            ROWS=rows,
            BLOCK=block,
        )
    return out


@inlined
def _rotate(
    x: tl.tensor,
    angles: tl.tensor,
    out: tl.tensor,
    rows: tl.tensor,
    num_tokens: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    passed: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HALF: tl.constexpr,
    PASSED: tl.constexpr,
) -> None:
    """Some rows of x; a row is a head of a token."""
    is_row = rows < num_tokens.to(tl.int64) * num_heads
    dims = tl.arange(0, HALF)[None, :]
    mask = is_row & (dims < half)
    token = rows // num_heads
    cos = tl.load(angles + token * 2 * half + dims, mask=mask, other=0.0)
    sin = tl.load(angles + token * 2 * half + half + dims, mask=mask, other=0.0)
    source = x + token * token_stride + rows % num_heads * head_stride
    target = out + rows * (2 * half + passed)
    first = tl.load(source + dims, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + half + dims, mask=mask, other=0.0).to(tl.float32)
    tl.store(target + dims, narrow(first * cos - second * sin, out.dtype.element_ty), mask=mask)
    tl.store(target + half + dims, narrow(second * cos + first * sin, out.dtype.element_ty), mask=mask)
    if PASSED:
        rest = tl.arange(0, PASSED)[None, :]
        mask = is_row & (rest < passed)
        kept = tl.load(source + 2 * half + rest, mask=mask, other=0.0)
        tl.store(target + 2 * half + rest, kept, mask=mask)


@triton.jit(do_not_specialize=["num_tokens"])
def _rope_kernel(
    query: tl.tensor,
    key: tl.tensor,
    angles: tl.tensor,
    query_out: tl.tensor,
    key_out: tl.tensor,
    num_tokens: tl.tensor,
    query_heads: tl.tensor,
    key_heads: tl.tensor,
    half: tl.tensor,
    passed: tl.tensor,
    query_stride_t: tl.tensor,
    query_stride_h: tl.tensor,
    key_stride_t: tl.tensor,
    key_stride_h: tl.tensor,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    PASSED: tl.constexpr,
) -> None:
    """The first programs rotate queries, the others keys."""
    first_of_keys = tl.cdiv(num_tokens * query_heads, ROWS)
    program, offsets = tl.program_id(0), tl.arange(0, ROWS)[:, None]
    if program < first_of_keys:
        rows = program.to(tl.int64) * ROWS + offsets
        _rotate(
            query, angles, query_out, rows, num_tokens, query_heads, half, passed,
            query_stride_t, query_stride_h, HALF, PASSED,
        )  # fmt: skip
    else:
        rows = (program - first_of_keys).to(tl.int64) * ROWS + offsets
        _rotate(
            key, angles, key_out, rows, num_tokens, key_heads, half, passed,
            key_stride_t, key_stride_h, HALF, PASSED,
        )  # fmt: skip


def rope(query: Tensor, key: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.rope` in one launch; one read and one write, as much as turning in place would take."""
    num_tokens, query_heads, head_dim = query.shape
    query, key = (x if x.stride(2) == 1 else x.contiguous() for x in (query, key))
    turned = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key)]
    half, key_heads = angles.shape[1] // 2, key.shape[1]
    passed = head_dim - 2 * half
    block, rows = _tile(num_tokens * (query_heads + key_heads), half, size=TILE)
    if num_tokens:
        _rope_kernel[(cdiv(num_tokens * query_heads, rows) + cdiv(num_tokens * key_heads, rows),)](
            query,
            key,
            angles,
            *turned,
            num_tokens,
            query_heads,
            key_heads,
            half,
            passed,
            query.stride(0),
            query.stride(1),
            key.stride(0),
            key.stride(1),
            ROWS=rows,
            HALF=block,
            PASSED=next_power_of_2(passed) if passed else 0,
        )
    return turned[0], turned[1]


@triton.jit(do_not_specialize=["num_rows"])
def _activation_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    width: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACTIVATION: tl.constexpr,
    HAS_UP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (cols < width)
    wide = tl.load(gate + rows * gate_stride + cols, mask=mask, other=0.0).to(tl.float32)
    wide = activate(wide, ACTIVATION)
    if HAS_UP:
        wide *= tl.load(up + rows * up_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * width + cols, narrow(wide, out.dtype.element_ty), mask=mask)


@inlined
def activate(x: tl.tensor, ACTIVATION: tl.constexpr) -> tl.tensor:
    """SILU, GELU_ERF or GELU_TANH of float32."""
    if ACTIVATION == SILU:
        activated = x * sigmoid(x)
    else:
        activated = _gelu(x, ACTIVATION == GELU_TANH)
    return activated


def _launch_activation(gate: Tensor, up: Tensor | None, activation: tl.constexpr) -> Tensor:
    flat, width = _rows(gate), gate.shape[-1]
    other = flat if up is None else _rows(up)
    out = torch.empty(flat.shape, dtype=gate.dtype, device=gate.device)
    block, rows = _tile(flat.shape[0], width, size=TILE)
    if out.numel():
        _activation_kernel[(cdiv(flat.shape[0], rows), cdiv(width, block))](
            flat,
            other,
            out,
            flat.shape[0],
            width,
            flat.stride(0),
            other.stride(0),
            ACTIVATION=activation,
            HAS_UP=up is not None,
            ROWS=rows,
            BLOCK=block,
        )
    return out.view(gate.shape)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `ops.silu_and_mul`."""
    return _launch_activation(gate, up, SILU)


def gelu_and_mul(gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """As `ops.gelu_and_mul`."""
    return _launch_activation(gate, up, GELU_TANH if tanh else GELU_ERF)


def gelu(x: Tensor, *, tanh: bool) -> Tensor:
    """As `ops.gelu`."""
    return _launch_activation(x, None, GELU_TANH if tanh else GELU_ERF)


@triton.jit(do_not_specialize=["num_rows"])
def _embedding_kernel(
    token_ids: tl.tensor,
    weight: tl.tensor,
    out: tl.tensor,
    num_rows: tl.tensor,
    num_known: tl.tensor,
    width: tl.tensor,
    stride: tl.tensor,
    scale: tl.tensor,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    token = tl.load(token_ids + rows, mask=rows < num_rows, other=-1)
    # An id out of range is a bug elsewhere; it must not read what is not the table's.
    mask = (token >= 0) & (token < num_known) & (cols < width)
    wide = tl.load(weight + token * stride + cols, mask=mask, other=0.0).to(tl.float32) * scale
    mask = (rows < num_rows) & (cols < width)
    tl.store(out + rows * width + cols, narrow(wide, out.dtype.element_ty), mask=mask)


def embedding(token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
    """As `ops.embedding`."""
    num_tokens, (num_known, width) = token_ids.shape[0], weight.shape
    out = torch.empty(num_tokens, width, dtype=weight.dtype, device=weight.device)
    block, rows = _tile(num_tokens, width, size=TILE)
    if out.numel():
        _embedding_kernel[(cdiv(num_tokens, rows), cdiv(width, block))](
            token_ids,
            weight,
            out,
            num_tokens,
            num_known,
            width,
            weight.stride(0),
            scale,
            ROWS=rows,
            BLOCK=block,
        )
    return out


@triton.jit
def _softcap_kernel(x: tl.tensor, num_values: tl.tensor, cap: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_values
    value = tl.load(x + at, mask=mask, other=0.0)
    tl.store(x + at, cap * tanh(value / cap), mask=mask)


def softcap(x: Tensor, *, cap: float) -> Tensor:
    """As `ops.softcap`, in place where x is contiguous."""
    x = x.contiguous()
    if x.numel():
        _softcap_kernel[(cdiv(x.numel(), TILE),)](x, x.numel(), cap, BLOCK=TILE)
    return x


@triton.jit(do_not_specialize=["num_rows"])
def _not_finite_kernel(
    x: tl.tensor,
    flags: tl.tensor,
    num_rows: tl.tensor,
    stride: tl.tensor,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    found = tl.zeros((ROWS, BLOCK), tl.int32)
    for start in range(0, WIDTH, BLOCK):
        cols = start + tl.arange(0, BLOCK)[None, :]
        mask = (rows < num_rows)[:, None] & (cols < WIDTH)
        value = tl.load(x + rows[:, None] * stride + cols, mask=mask, other=0.0).to(tl.float32)
        # NaN compares false, so that it is found like infinity.
        found |= tl.where(tl.abs(value) < float("inf"), 0, 1)
    tl.store(flags + rows, tl.max(found, axis=1).to(tl.int8), mask=rows < num_rows)


def not_finite(x: Tensor) -> Tensor:
    """As `ops.not_finite`."""
    flat = _rows(x)
    flags = torch.empty(flat.shape[0], dtype=torch.int8, device=x.device)
    num_rows, width = flat.shape
    block, rows = _tile(num_rows, width, size=4 * TILE)
    if num_rows:
        _not_finite_kernel[(cdiv(num_rows, rows),)](
            flat, flags, num_rows, flat.stride(0), WIDTH=width, ROWS=rows, BLOCK=block
        )
    return flags.view(torch.bool)
