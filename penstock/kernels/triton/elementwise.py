"""Norms, rotations, activations and embeddings."""

from torch import Tensor
from torch.nn import functional

from penstock.kernels.eager import dense


def rms_norm(x: Tensor, weight: Tensor, *, eps: float, weight_offset: float) -> Tensor:
    """As `ops.rms_norm`."""
    return dense.rms_norm(x, weight, eps=eps, weight_offset=weight_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, *, eps: float, weight_offset: float
) -> tuple[Tensor, Tensor]:
    """As `ops.add_rms_norm`."""
    summed = x + residual
    return rms_norm(summed, weight, eps=eps, weight_offset=weight_offset), summed


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """As `ops.layer_norm`."""
    return functional.layer_norm(x, weight.shape, weight, bias, eps)


def rope_angles(positions: Tensor, frequencies: Tensor, *, factor: float) -> Tensor:
    """As `ops.rope_angles`."""
    return dense.rope_angles(positions, frequencies, factor=factor)


def rope(x: Tensor, angles: Tensor) -> Tensor:
    """As `ops.rope`."""
    return dense.rope(x, angles)


def silu_and_mul(gate: Tensor, up: Tensor) -> Tensor:
    """As `ops.silu_and_mul`."""
    return functional.silu(gate).mul_(up)


def gelu(x: Tensor, *, tanh: bool) -> Tensor:
    """As `ops.gelu`."""
    return functional.gelu(x, approximate="tanh" if tanh else "none")


def gelu_and_mul(gate: Tensor, up: Tensor, *, tanh: bool) -> Tensor:
    """As `ops.gelu_and_mul`."""
    return gelu(gate, tanh=tanh).mul_(up)


def embedding(token_ids: Tensor, weight: Tensor, *, scale: float) -> Tensor:
    """As `ops.embedding`."""
    rows = weight.index_select(0, token_ids)
    return rows if scale == 1.0 else rows.mul_(scale)


def softcap(x: Tensor, *, cap: float) -> Tensor:
    """As `ops.softcap`, in place."""
    return x.div_(cap).tanh_().mul_(cap)


def rows_not_finite(x: Tensor) -> list[int]:
    """As `ops.rows_not_finite`, by a row's largest and smallest number, both NaN if any is."""
    # A sum would overflow for large numbers that are finite.
    are_finite = x.amax(dim=-1).isfinite() & x.amin(dim=-1).isfinite()
    found: list[int] = (~are_finite).nonzero().flatten().tolist()
    return found
