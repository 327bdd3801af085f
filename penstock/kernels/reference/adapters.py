"""Adapters as plain tensors, for the homes in torch; `reference` and `eager` share it."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from penstock.kernels.adapters import AdapterWeights, LoraSite, LowRankPair
from penstock.kernels.reference.dense import linear_wide


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlainAdapter:
    """Pairs by the number of their site."""

    pairs: Mapping[int, LowRankPair]

    @property
    def num_bytes(self) -> int:
        """Of all matrices."""
        return sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs.values())


def prepare_plain_adapter(pairs: Mapping[int, LowRankPair], *, dtype: torch.dtype) -> PlainAdapter:
    """Keep an adapter's matrices in `dtype`, as copies of their own."""
    kept = {
        site: LowRankPair(
            a=pair.a.to(dtype, copy=True), b=pair.b.to(dtype, copy=True).contiguous(), scale=pair.scale
        )
        for site, pair in pairs.items()
    }
    return PlainAdapter(pairs=kept)


def plain_pair(weights: AdapterWeights, site: LoraSite) -> LowRankPair | None:
    """What an adapter that `prepare_plain_adapter` made adds at `site`; None if nothing."""
    assert isinstance(weights, PlainAdapter), type(weights)
    return weights.pairs.get(site.index)


def lora(x: Tensor, y: Tensor, site: LoraSite) -> Tensor:
    """As `ops.lora`, in float64."""
    out = y.clone()
    for run in site.active.rows:
        pair = plain_pair(run.weights, site)
        if pair is not None:
            rows = slice(run.first_row, run.first_row + run.num_rows)
            added = linear_wide(linear_wide(x[rows], pair.a), pair.b) * pair.scale
            out[rows] = (y[rows].double() + added).to(y.dtype)
    return out
