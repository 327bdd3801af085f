"""bitsandbytes: 4-bit values out of a table of 16 (NF4, FP4), and int8 with a scale for each output.

```
4 bits   weight [ceil(O I / 2), 1] uint8    two values a byte, the first in the high bits, row after row
         weight.quant_map [16]              what a value stands for, at most 1 in magnitude
         weight.absmax [blocks]             a factor for each `blocksize` values
         weight.quant_state.bitsandbytes__nf4   JSON: shape, blocksize, dtype, and where absmax is nested:
         weight.absmax uint8, weight.nested_quant_map [256], weight.nested_absmax [blocks / nested_blocksize]
         absmax[b] = nested_quant_map[absmax[b]] * nested_absmax[b // nested_blocksize] + nested_offset
int8     weight [O, I] int8, SCB [O] float32            w[o, i] = weight[o, i] * SCB[o] / 127
```

int8 is a grid of the kernels; inputs are not rounded (bitsandbytes rounds all but outliers). A table is none.

**Source:** Dettmers et al., LLM.int8(), 2022, and QLoRA, 2023, sections 2 and 3; `functional.QuantState` of
bitsandbytes 0.50.
"""

import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.kernels.quantization import Method
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader
from penstock.models.quantized.grid import Grid, GridMatrix
from penstock.models.quantized.packing import read_scales, stored_bytes, wrong_data
from penstock.models.stored import StoredMatrix

STATE: Final = ".weight.quant_state.bitsandbytes__"
KINDS: Final = ("nf4", "fp4")
MAX_STATE_BYTES: Final = 4096
MAX_BLOCK: Final = 1 << 16
PIECE_VALUES: Final = 16 << 20
"""Values that are dequantized at a time in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Nested:
    """How the factors of blocks are rounded themselves."""

    block_size: int
    offset: float


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What a weight's `quant_state` says."""

    block_size: int
    nested: Nested | None


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBits:
    """A stored matrix of 4-bit values; a `stored.StoredMatrix`."""

    files: Checkpoint
    module: str
    shape: tuple[int, int]
    state: State
    num_bytes: int

    @property
    def num_blocks(self) -> int:
        """Runs of values that share a factor."""
        return -(-self.shape[0] * self.shape[1] // self.state.block_size)

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`."""
        del fill
        name, count = f"{self.module}.weight", self.shape[0] * self.shape[1]
        packed = self.files.read(self.files.entry(name, shape=(-(-count // 2), 1), dtypes=("U8",))).flatten()
        table = read_scales(self.files, f"{name}.quant_map", shape=(16,))
        factors = self._factors()
        out = torch.empty(count, dtype=dtype)
        size = self.state.block_size
        step = max(2 * size, PIECE_VALUES // (2 * size) * (2 * size))
        for start in range(0, count, step):
            part = packed[start // 2 : -(-(start + step) // 2)]
            values = table[torch.stack((part >> 4, part & 15), dim=1).flatten().int()][: count - start]
            blocks = factors[start // size : -(-(start + step) // size)].repeat_interleave(size)
            out[start : start + step] = values * blocks[: len(values)]
        self.files.release(packed)
        return out.view(self.shape)

    def kept(self, dtype: torch.dtype, *, methods: Collection[Method]) -> Tensor:
        """As `StoredMatrix.kept`: always dequantized."""
        del methods
        return self.read(dtype, fill=True)

    def _factors(self) -> Tensor:
        # [blocks] float32
        name, nested = f"{self.module}.weight", self.state.nested
        if nested is None:
            return read_scales(self.files, f"{name}.absmax", shape=(self.num_blocks,))
        entry = self.files.entry(f"{name}.absmax", shape=(self.num_blocks,), dtypes=("U8",))
        table = read_scales(self.files, f"{name}.nested_quant_map", shape=(256,))
        num_outer = -(-self.num_blocks // nested.block_size)
        outer = read_scales(self.files, f"{name}.nested_absmax", shape=(num_outer,))
        spread = outer.repeat_interleave(nested.block_size)[: self.num_blocks]
        return table[self.files.read(entry).int()] * spread + nested.offset


def _read_state(files: Checkpoint, module: str, *, shape: tuple[int, int]) -> State:
    names = [f"{module}{STATE}{kind}" for kind in KINDS]
    found = [name for name in names if files.look_up(name) is not None]
    if len(found) != 1:
        raise CheckpointError(f"tensor {names[0]!r} is missing from the checkpoint")
    entry = files.look_up(found[0])
    assert entry is not None
    if entry.num_bytes > MAX_STATE_BYTES:
        raise wrong_data(files, found[0], f"has {entry.num_bytes} bytes, at most {MAX_STATE_BYTES} are read")
    raw = files.read(files.entry(found[0], shape=(entry.num_bytes,), dtypes=("U8",)))
    try:
        fields = json.loads(bytes(raw.tolist()))
    except (ValueError, RecursionError) as error:
        raise wrong_data(files, found[0], f"is no JSON: {error}") from None
    if not isinstance(fields, dict):
        raise wrong_data(files, found[0], "is no JSON object")
    reader = ConfigReader(fields, source=f"{entry.file.name}: {found[0][:200]}")
    reader.supported("quant_type", (found[0].removeprefix(module + STATE),))
    if list(reader.integers("shape")) != list(shape):
        raise reader.wrong("shape", f"{list(shape)}")
    nested = None
    if files.look_up(f"{module}.weight.nested_absmax") is not None:
        nested = Nested(
            block_size=reader.integer("nested_blocksize", high=MAX_BLOCK),
            offset=reader.number("nested_offset", low=-1e30, high=1e30),
        )
    return State(block_size=reader.integer("blocksize", low=2, high=MAX_BLOCK), nested=nested)


@dataclass(frozen=True, slots=True, kw_only=True)
class FourBitScheme:
    """A `scheme.Scheme`."""

    kind: str

    markers: ClassVar[tuple[str, ...]] = (".weight.absmax",)
    suffixes: ClassVar[tuple[str, ...]] = (
        ".weight", ".weight.absmax", ".weight.quant_map", ".weight.nested_absmax", ".weight.nested_quant_map",
        *(STATE + kind for kind in KINDS),
    )  # fmt: skip

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return f"bitsandbytes {self.kind}"

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> StoredMatrix:
        """As `Scheme.open`."""
        count = shape[0] * shape[1]
        files.entry(f"{module}.weight", shape=(-(-count // 2), 1), dtypes=("U8",))
        matrix = FourBits(
            files=files,
            module=module,
            shape=shape,
            state=_read_state(files, module, shape=shape),
            num_bytes=stored_bytes(files, module, self.suffixes),
        )
        dtypes = ("F32",) if matrix.state.nested is None else ("U8",)
        files.entry(f"{module}.weight.absmax", shape=(matrix.num_blocks,), dtypes=dtypes)
        return matrix


@dataclass(frozen=True, slots=True, kw_only=True)
class Int8Scheme:
    """A `scheme.Scheme`."""

    markers: ClassVar[tuple[str, ...]] = (".SCB",)
    suffixes: ClassVar[tuple[str, ...]] = (".weight", ".SCB", ".weight_format")

    @property
    def label(self) -> str:
        """As `Scheme.label`."""
        return "bitsandbytes int8"

    def open(self, files: Checkpoint, module: str, *, shape: tuple[int, int]) -> GridMatrix:
        """As `Scheme.open`."""
        files.entry(f"{module}.weight", shape=shape, dtypes=("I8",))
        files.entry(f"{module}.SCB", shape=(shape[0],), dtypes=("F32", "F16"))
        layout = files.look_up(f"{module}.weight_format")
        if layout is not None:
            found = files.read(files.entry(f"{module}.weight_format", shape=(), dtypes=("U8",)))
            if int(found) != 0:
                raise wrong_data(files, f"{module}.weight_format", f"is {int(found)}, only 0 (row) is read")
        return GridMatrix(
            load=partial(_read_int8, files, module, shape=shape),
            num_bytes=stored_bytes(files, module, self.suffixes),
        )


def _read_int8(files: Checkpoint, module: str, *, shape: tuple[int, int]) -> Grid:
    values = files.read(files.entry(f"{module}.weight", shape=shape, dtypes=("I8",)))
    scales = read_scales(files, f"{module}.SCB", shape=(shape[0],)) / 127
    return Grid(values=values, scales=scales[:, None], group_size=shape[1])


def read_bitsandbytes(reader: ConfigReader) -> FourBitScheme | Int8Scheme:
    """Read `quantization_config`.

    Raises:
        UnsupportedModelError: neither 4 nor 8 bits, or another kind of table.
        CheckpointError: a field is out of range.
    """
    if reader.boolean("load_in_8bit", False):
        return Int8Scheme()
    reader.supported("load_in_4bit", (True,), False)
    reader.supported("bnb_4bit_quant_storage", ("uint8",), "uint8")
    return FourBitScheme(kind=reader.supported("bnb_4bit_quant_type", KINDS, "fp4"))
