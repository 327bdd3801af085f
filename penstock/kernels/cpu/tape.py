"""A recorded pass: operations over buffers whose rows are the tokens of a step.

```
buffer    [rows, cols] of one dtype; rows is known only when the pass runs
Slice     some columns of a buffer: what a view of a tensor names
Tape      buffers by number, operations in their order
```

As the recorder writes it, each operation writes buffers that no other writes. The passes may break that: an
operation then adds to a buffer in place. Nothing here computes or knows the extension module.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import ClassVar, Literal, Self, TypeAlias

import torch
from torch import Tensor

from penstock.kernels.batch import KvShape
from penstock.kernels.cpu.weights import ExpertMatrices, PackedLinear

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh"]


class Role(Enum):
    """Where a buffer's memory comes from."""

    OWN = "own"
    EXTERNAL = "external"
    """Given at each run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """Rows of `cols` values."""

    dtype: torch.dtype
    cols: int
    role: Role = Role.OWN


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """Columns [col, col + cols) of a buffer."""

    buffer: int
    col: int
    cols: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """int8 rows: values [rows, K], a scale a row, sums of every 32 values."""

    values: Slice
    scales: Slice
    sums: Slice


Place: TypeAlias = Slice | Quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant:
    """A tensor that stays where it is; equal to another with the same bytes at the same place."""

    tensor: Tensor = field(compare=False, repr=False)
    address: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> "Constant":
        """The tensor, which must be contiguous in its last dimension."""
        assert tensor.stride(-1) == 1, tensor.stride()
        return cls(tensor=tensor, address=tensor.data_ptr(), shape=tuple(tensor.shape))


def slices(value: object) -> Iterator[Slice]:
    """Every slice in a field of an operation."""
    if isinstance(value, Slice):
        yield value
    elif isinstance(value, Quantized):
        yield from (value.values, value.scales, value.sums)
    elif isinstance(value, tuple):
        for item in value:
            yield from slices(item)


def _mapped(value: object, move: Callable[[Slice], Slice]) -> object:
    if isinstance(value, Slice):
        return move(value)
    if isinstance(value, Quantized):
        return Quantized(values=move(value.values), scales=move(value.scales), sums=move(value.sums))
    if isinstance(value, tuple):
        return tuple(_mapped(item, move) for item in value)
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One operation; subclasses name the fields that are read and written. In-place fields stand in both."""

    READS: ClassVar[tuple[str, ...]] = ()
    WRITES: ClassVar[tuple[str, ...]] = ()

    def read(self) -> Iterator[Slice]:
        """What it reads."""
        for name in self.READS:
            yield from slices(getattr(self, name))

    def written(self) -> Iterator[Slice]:
        """What it writes."""
        for name in self.WRITES:
            yield from slices(getattr(self, name))

    def moved(self, move: Callable[[Slice], Slice]) -> Self:
        """The same over other places."""
        names = dict.fromkeys(self.READS + self.WRITES)
        return replace(self, **{name: _mapped(getattr(self, name), move) for name in names})


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedding(Operation):
    """Rows of a table, times `scale`."""

    READS = ("ids",)
    WRITES = ("out",)
    ids: Slice
    table: Constant
    scale: float
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class RmsNorm(Operation):
    """Over each `group` values; `residual` is added to x first, `total` keeps that sum."""

    READS = ("x", "residual")
    WRITES = ("out", "total")
    x: Slice
    weight: Constant
    eps: float
    weight_offset: float
    group: int
    out: Place
    residual: Slice | None = None
    total: Slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerNorm(Operation):
    """Over a whole row; `residual` and `total` as in `RmsNorm`."""

    READS = ("x", "residual")
    WRITES = ("out", "total")
    x: Slice
    weight: Constant
    bias: Constant
    eps: float
    out: Place
    residual: Slice | None = None
    total: Slice | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeAngles(Operation):
    """Cosines, then sines, of every position."""

    READS = ("positions",)
    WRITES = ("out",)
    positions: Slice
    frequencies: Constant
    factor: float
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Rope(Operation):
    """Rotate every head."""

    READS = ("x", "angles")
    WRITES = ("out",)
    x: Slice
    head_dim: int
    angles: Slice
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Linear(Operation):
    """One product per weight, all of the same x; `add`: onto what stands in `outs`."""

    READS = ("x",)
    WRITES = ("outs",)
    x: Place
    weights: tuple[PackedLinear, ...]
    outs: tuple[Slice, ...]
    add: bool = False
    sites: tuple[int, ...] = ()
    """For each weight the number of the site where adapters act on its product; empty where none does."""

    def read(self) -> Iterator[Slice]:
        """What it reads; `outs` too if it adds to them."""
        yield from slices(self.x)
        if self.add:
            yield from self.outs


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora(Operation):
    """Add the adapters' part to products of the same x, in place; each row has its own adapter, or none."""

    READS = ("x", "outs")
    WRITES = ("outs",)
    x: Slice
    sites: tuple[int, ...]
    outs: tuple[Slice, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedLinear(Operation):
    """`activation(gate(x)) * up(x)`."""

    READS = ("x",)
    WRITES = ("out",)
    x: Place
    gate: PackedLinear
    up: PackedLinear
    activation: Activation
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Moe(Operation):
    """The chosen experts' outputs, summed; `add` as in `Linear`."""

    READS = ("x",)
    WRITES = ("out",)
    x: Slice
    router: Constant
    experts: tuple[ExpertMatrices, ...]
    top_k: int
    renormalize: bool
    out: Slice
    add: bool = False

    def read(self) -> Iterator[Slice]:
        """What it reads; `out` too if it adds to it."""
        yield self.x
        if self.add:
            yield self.out


@dataclass(frozen=True, slots=True, kw_only=True)
class Activate(Operation):
    """`activation(x)`."""

    READS = ("x",)
    WRITES = ("out",)
    x: Slice
    activation: Activation
    out: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation(Operation):
    """`activation(gate) * up`."""

    READS = ("gate", "up")
    WRITES = ("out",)
    gate: Slice
    up: Slice
    activation: Activation
    out: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Sum(Operation):
    """`a + b`."""

    READS = ("a", "b")
    WRITES = ("out",)
    a: Slice
    b: Slice
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale(Operation):
    """`x * factor`."""

    READS = ("x",)
    WRITES = ("out",)
    x: Slice
    factor: float
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Convert(Operation):
    """A copy in the dtype of `out`."""

    READS = ("x",)
    WRITES = ("out",)
    x: Slice
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Softcap(Operation):
    """In place: `cap * tanh(x / cap)`."""

    READS = ("x",)
    WRITES = ("x",)
    x: Slice
    cap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantize(Operation):
    """Rows to int8 with a scale each."""

    READS = ("x",)
    WRITES = ("out",)
    x: Slice
    out: Quantized


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteKv(Operation):
    """Store keys and values in the layer's blocks."""

    READS = ("keys", "values")
    keys: Slice
    values: Slice
    layer: int
    kv: KvShape


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeWriteKv(Operation):
    """Rotate the query in place, rotate and store the keys, store the values."""

    READS = ("query", "keys", "values", "angles")
    WRITES = ("query",)
    query: Slice
    keys: Slice
    values: Slice
    angles: Slice
    layer: int
    kv: KvShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention(Operation):
    """Paged attention of one layer. window: 0 for none; softcap: 0.0 for none."""

    READS = ("query",)
    WRITES = ("out",)
    query: Slice
    layer: int
    num_heads: int
    kv: KvShape
    scale: float
    window: int
    softcap: float
    out: Slice


@dataclass(frozen=True, slots=True, kw_only=True)
class Tape:
    """A recorded pass."""

    buffers: tuple[Buffer, ...]
    operations: tuple[Operation, ...]
    inputs: tuple[int, ...]
    """External buffers that are read, in the order in which a run gives them."""
    outputs: tuple[int, ...]
    """External buffers with the results; a run gives them after the inputs."""

    def whole(self, buffer: int) -> Slice:
        """All columns of a buffer."""
        return Slice(buffer=buffer, col=0, cols=self.buffers[buffer].cols)

    def is_whole(self, place: Slice) -> bool:
        """True if the slice is all of its buffer."""
        return place == self.whole(place.buffer)
