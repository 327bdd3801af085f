"""Products, by cuBLAS through torch on a device; rounded weights are kept as what they stand for."""

from torch import Tensor
from torch.nn import functional

from penstock.kernels.ops import LinearWeight
from penstock.kernels.reference.weights import plain


def linear(x: Tensor, weight: LinearWeight) -> Tensor:
    """As `ops.linear`."""
    known = plain(weight)
    return functional.linear(known.rounded(x).to(x.dtype), known.weight, known.bias)
