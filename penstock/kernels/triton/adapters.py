"""Low-rank adapters, run of rows by run of rows."""

from torch import Tensor
from torch.nn import functional

from penstock.kernels.adapters import LoraSite
from penstock.kernels.reference.adapters import plain_pair


def lora(x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
    """As `ops.lora`, in place."""
    for run in site.active.rows:
        pair = plain_pair(run.weights, site)
        if pair is not None:
            rows = slice(run.first_row, run.first_row + run.num_rows)
            shrunk = functional.linear(x[rows], pair.a)
            y[rows] += functional.linear(shrunk, pair.b).mul_(pair.scale)
    return y
