"""A GGUF file as a source of tensors, under the names that the architecture files use.

What the converter changed is undone while reading: rows that it interleaved, norms that it raised by one,
experts that it joined. Rows are whole blocks, so all of that works on the packed bytes.
"""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.kernels.quantization import Method
from penstock.kernels.rounded import RoundedWeight
from penstock.models.checkpoint import DTYPES, Checkpoint, TensorEntry
from penstock.models.config import ConfigReader
from penstock.models.gguf.blocks import dequantize, q4_0_grid
from penstock.models.gguf.config import ROPE_FACTORS, find_family, read_gguf_config
from penstock.models.gguf.families import Family
from penstock.models.stored import StoredTensor
from penstock.text.gguf.header import GgufFile, TensorPlace, read_header

BLOCK_NAME: Final = re.compile(r"blk\.(\d{1,4})\.([a-z0-9_]+)\.(weight|bias)")
OUTER_NAME: Final = re.compile(r"([a-z0-9_]+)\.(weight|bias)")
PIECE_VALUES: Final = 8 << 20
"""Values that are dequantized at a time in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a tensor of the model is in the file, and what to undo."""

    name: str
    """In the file."""
    tensor: TensorPlace
    expert: int | None = None
    """Which of the outermost dimension."""
    interleaved_heads: int = 0
    """Rows of so many heads are interleaved; 0 where they are not."""
    offset: float = 0.0
    """What was added to the values."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the model's tensor."""
        return self.tensor.shape if self.expert is None else self.tensor.shape[1:]

    @property
    def num_bytes(self) -> int:
        """Its share of the file."""
        return self.tensor.num_bytes // (1 if self.expert is None else self.tensor.shape[0])

    @property
    def is_changed(self) -> bool:
        """True if the file's values are not the model's."""
        return self.expert is not None or self.interleaved_heads > 0 or self.offset != 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor:
    """A tensor of plain numbers that the converter changed; a `stored.StoredTensor`."""

    files: Checkpoint
    entry: TensorEntry
    place: Place

    @property
    def num_bytes(self) -> int:
        """As `StoredTensor.num_bytes`."""
        return self.place.num_bytes

    def rows(self) -> tuple[Tensor, Tensor]:
        """What is mapped, and the rows of it in the model's order: [O, ...], packed."""
        mapped = self.files.read(self.entry)
        rows = mapped if self.place.expert is None else mapped[self.place.expert]
        heads = self.place.interleaved_heads
        if heads:  # rows of a head: first, middle, second, the one after the middle, ...
            order = torch.arange(rows.shape[0]).view(heads, -1, 2).transpose(1, 2).flatten()
            rows = rows[order]
        return mapped, rows

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`."""
        del fill
        mapped, rows = self.rows()
        values = rows.float() - self.place.offset if self.place.offset else rows
        copied = torch.empty(values.shape, dtype=dtype).copy_(values)
        self.files.release(mapped if self.place.expert is None else mapped[self.place.expert])
        return copied


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufBlocks:
    """A tensor in blocks; a `stored.StoredMatrix`."""

    packed: GgufTensor

    @property
    def num_bytes(self) -> int:
        """As `StoredTensor.num_bytes`."""
        return self.packed.num_bytes

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`, some rows at a time."""
        del fill
        place, kind = self.packed.place, self.packed.place.tensor.kind
        _, rows = self.packed.rows()
        rows = rows.reshape(-1, rows.shape[-1])
        out = torch.empty(rows.shape[0], place.shape[-1], dtype=dtype)
        step = max(1, PIECE_VALUES // place.shape[-1])
        for start in range(0, rows.shape[0], step):
            part = dequantize(kind.name, rows[start : start + step], block_bytes=kind.num_bytes)
            if not torch.isfinite(part).all():
                raise self._not_finite()
            out[start : start + step] = part - place.offset if place.offset else part
        self._release()
        return out.view(place.shape)

    def kept(self, dtype: torch.dtype, *, methods: Collection[Method]) -> RoundedWeight | Tensor:
        """As `StoredMatrix.kept`: Q4_0 is a grid of the kernels."""
        if self.packed.place.tensor.kind.name != "Q4_0" or len(self.packed.place.shape) != 2:
            return self.read(dtype, fill=True)
        grid = q4_0_grid(self.packed.rows()[1])
        if not torch.isfinite(grid.scales).all():
            raise self._not_finite()
        self._release()
        return grid.kept(dtype, activations="bf16", methods=methods)

    def _release(self) -> None:
        # An expert shares its tensor with others that are still to be read.
        if self.packed.place.expert is None:
            self.packed.files.release(self.packed.files.read(self.packed.entry, fill=False))

    def _not_finite(self) -> CheckpointError:
        entry, name = self.packed.entry, self.packed.place.name
        return CheckpointError(f"{entry.file.name}: tensor {name!r}: holds infinity or NaN")


def _entry(file: GgufFile, place: TensorPlace) -> TensorEntry:
    # Plain numbers as they are, blocks as bytes whose last dimension is a row.
    if place.kind.name in DTYPES:
        dtype, shape = place.kind.name, place.shape
    else:
        row_bytes = place.shape[-1] // place.kind.values * place.kind.num_bytes
        dtype, shape = "U8", (*place.shape[:-1], row_bytes)
    return TensorEntry(file=file.path, dtype=dtype, shape=shape, start=place.start, num_bytes=place.num_bytes)


def _places(file: GgufFile, family: Family, config: ConfigReader) -> Iterator[tuple[str, Place]]:
    """The model's name for each tensor of the file; those that no name is known for keep their own."""
    heads = {"attn_q": config.integer("num_attention_heads"), "attn_k": config.integer("num_key_value_heads")}
    for name, tensor in file.tensors.items():
        if name in ROPE_FACTORS:
            continue
        block = BLOCK_NAME.fullmatch(name)
        outer = OUTER_NAME.fullmatch(name)
        leaf, suffix = (block[2], block[3]) if block else (outer[1], outer[2]) if outer else ("", "")
        offset = family.norm_offset if leaf.endswith("norm") else 0.0
        if block and leaf in family.experts:
            prefix = family.block.format(int(block[1])) + family.experts[leaf]
            for expert in range(tensor.shape[0] if len(tensor.shape) == 3 else 0):
                yield f"{prefix.format(expert)}.{suffix}", Place(name=name, tensor=tensor, expert=expert)
        elif block and leaf in family.inner:
            num_heads = heads[leaf] if leaf in family.interleaved else 0
            yield (
                f"{family.block.format(int(block[1]))}{family.inner[leaf]}.{suffix}",
                Place(name=name, tensor=tensor, interleaved_heads=num_heads, offset=offset),
            )
        elif outer and leaf in family.outer:
            yield f"{family.outer[leaf]}.{suffix}", Place(name=name, tensor=tensor, offset=offset)
        else:
            yield name, Place(name=name, tensor=tensor)


class GgufCheckpoint:
    """A `stored.TensorSource` over one file."""

    def __init__(self, file: GgufFile, family: Family, config: ConfigReader) -> None:
        self._file = file
        self._files = Checkpoint({name: _entry(file, place) for name, place in file.tensors.items()})
        self._places = dict(_places(file, family, config))
        kinds = [place.kind.name for place in file.tensors.values()]
        counts = [f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))]
        self.label = f"gguf ({', '.join(counts)})"

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def find(self, name: str, *, shape: tuple[int, ...]) -> StoredTensor:
        """As `TensorSource.find`."""
        place = self._places.get(name)
        if place is None:
            raise CheckpointError(
                f"{self._file.path.name}: tensor {name!r} of shape {list(shape)} is missing from the file"
            )
        if place.shape != shape:
            raise CheckpointError(
                f"{self._file.path.name}: tensor {place.name!r}: expected shape {list(shape)}, "
                f"found {list(place.shape)}"
            )
        heads = place.interleaved_heads
        if heads and shape[0] % (2 * heads):
            raise CheckpointError(
                f"{self._file.path.name}: tensor {place.name!r}: {shape[0]} rows are not {heads} even heads"
            )
        return self._stored(place)

    def _stored(self, place: Place) -> StoredTensor:
        entry = self._files.look_up(place.name)
        assert entry is not None, place
        if entry.dtype in DTYPES and not place.is_changed:
            return self._files.find(place.name, shape=entry.shape)
        packed = GgufTensor(files=self._files, entry=entry, place=place)
        return packed if entry.dtype in DTYPES else GgufBlocks(packed=packed)

    def is_quantized(self, name: str) -> bool:
        """True for all matrices: the converter keeps each as [out, in]."""
        place = self._places.get(name)
        return place is not None and len(place.shape) == 2

    def dtypes(self) -> set[str]:
        """As `TensorSource.dtypes`."""
        return {place.kind.name for place in self._file.tensors.values()}

    def release(self, tensor: Tensor) -> None:
        """As `TensorSource.release`."""
        self._files.release(tensor)

    def is_mapped(self, tensor: Tensor) -> bool:
        """As `TensorSource.is_mapped`."""
        return self._files.is_mapped(tensor)

    def factors(self, name: str, *, length: int) -> list[float]:
        """The divisors of frequencies that a tensor holds.

        Raises:
            CheckpointError: missing, or not `length` numbers above 0.
        """
        entry = self._files.entry(name, shape=(length,), dtypes=("F32",))
        values = self._files.read(entry)
        if not (torch.isfinite(values).all() and (values > 0).all()):
            raise CheckpointError(f"{entry.file.name}: tensor {name!r}: holds a number that is not above 0")
        found: list[float] = values.tolist()
        return found


def _with_factors(file: GgufFile, source: GgufCheckpoint, config: ConfigReader) -> ConfigReader:
    """The config with the frequencies' divisors, if the file has any."""
    found = [name for name in ROPE_FACTORS if name in file.tensors]
    if not found:
        return config
    share = config.number("partial_rotary_factor")
    length = round(config.integer("head_dim") * share) // 2
    short = "rope_factors_short.weight" if "rope_freqs.weight" not in found else "rope_freqs.weight"
    long = "rope_factors_long.weight" if "rope_freqs.weight" not in found else "rope_freqs.weight"
    scaling: dict[str, object] = {
        "rope_type": "longrope",
        "short_factor": source.factors(short, length=length),
        "long_factor": source.factors(long, length=length),
    }
    key = f"{file.metadata.text('general.architecture')}.rope.scaling.attn_factor"
    if short == "rope_freqs.weight":
        scaling["attention_factor"] = 1.0
    elif key in file.metadata:
        scaling["attention_factor"] = file.metadata.number(key, low=1e-6)
    return config.having({"rope_scaling": scaling})


def open_gguf(path: Path) -> tuple[ConfigReader, GgufCheckpoint]:
    """The config and the tensors of a GGUF file.

    Raises:
        CheckpointError: it is damaged or incomplete; names file, field, value and limit.
        UnsupportedModelError: an architecture, a type of tensor or an option that is not built here.
    """
    file = read_header(path)
    _, family = find_family(file.metadata)
    config = read_gguf_config(file)
    source = GgufCheckpoint(file, family, config)
    return _with_factors(file, source, config), source
