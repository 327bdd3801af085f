"""Low-rank adapters as layers and kernels see them: where they act, what they weigh, which rows use which.

A site is a product of the model that adapters may change: `y += scale * B (A x)`. Sites are numbered while
the model is built; an adapter brings matrices for some of them. Rows of a step that use one adapter lie
together (a sequence's tokens do), so a step's adapters are a few runs of rows; rows in none are the base
model's.

**Source:** Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021, section 4.1; one batch
of many adapters without padding: Sheng et al., S-LoRA, 2023, section 5, and Chen et al., Punica,
2023, section 4.
"""

from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LowRankPair:
    """What an adapter adds to one product."""

    a: Tensor
    """[rank, I]"""
    b: Tensor
    """[O, rank]"""
    scale: float
    """On `B (A x)`: alpha / rank, or alpha / sqrt(rank)."""

    @property
    def rank(self) -> int:
        """Rows of A."""
        return self.a.shape[0]

    def to(self, device: torch.device) -> "LowRankPair":
        """The same on a device; itself if it is there."""
        if self.a.device == self.b.device == device:
            return self
        return replace(self, a=self.a.to(device), b=self.b.to(device))


class AdapterWeights(Protocol):
    """All pairs of one adapter, in the form that the home which made it multiplies by."""

    @property
    def num_bytes(self) -> int:
        """Bytes that it keeps resident."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRows:
    """Rows [first_row, first_row + num_rows) of a step use one adapter."""

    first_row: int
    num_rows: int
    weights: AdapterWeights


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLimits:
    """The largest step that adapters may act in."""

    max_rows: int
    max_adapters: int
    """Different ones."""
    max_rank: int


class AdapterTables(Protocol):
    """What the launches of a recorded step of decodes read of its adapters, at fixed addresses."""

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables."""
        ...

    def fill(self, rows: tuple[AdapterRows, ...], *, num_rows: int) -> None:
        """Queue what the next replay is to read.

        Args:
            rows: its runs, within the limits that the tables were made for.
            num_rows: of the recording.
        """
        ...


@runtime_checkable
class RecordsAdapters(Protocol):
    """A home whose launches with adapters can be recorded."""

    def adapter_tables(self, limits: AdapterLimits, *, num_sites: int, dtype: torch.dtype) -> AdapterTables:
        """Tables for steps up to some limits; without adapters at first.

        Args:
            limits: of the steps.
            num_sites: products on which adapters may act.
            dtype: of their matrices.
        """
        ...


@dataclass(slots=True, eq=False)
class ActiveAdapters:
    """The adapters of the step that is being computed; set anew for every pass."""

    rows: tuple[AdapterRows, ...] = ()
    """Runs of rows, rising and apart."""
    tables: AdapterTables | None = None
    """Read instead of `rows` in a step that is recorded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoraSite:
    """A product that adapters may change."""

    index: int
    name: str
    """Of the module in the checkpoint, such as `model.layers.0.self_attn.q_proj`."""
    in_features: int
    out_features: int
    active: ActiveAdapters


@dataclass(slots=True, kw_only=True, eq=False)
class LoraSites:
    """All sites of one model, in the order in which it was built."""

    active: ActiveAdapters = field(default_factory=ActiveAdapters)
    sites: list[LoraSite] = field(default_factory=list)

    def add(self, name: str, *, in_features: int, out_features: int) -> LoraSite:
        """Number one more site."""
        site = LoraSite(
            index=len(self.sites),
            name=name,
            in_features=in_features,
            out_features=out_features,
            active=self.active,
        )
        self.sites.append(site)
        return site
