"""The tensors of a checkpoint folder: headers checked first, data mapped and never read twice.

One safetensors file is

```
[0, 8)            length n of the header, little endian
[8, 8 + n)        JSON: tensor name -> dtype, shape, data_offsets [a, b) counted from 8 + n
[8 + n, end)      the data
```

`open_checkpoint` reads the headers of all files and checks them against the files' sizes; `loader` then
asks for tensors by name and expected shape. Nothing here knows architectures.
**Source:** https://github.com/huggingface/safetensors#format
"""

import json
import math
import mmap
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.models.config import read_json_config
from penstock.parallel.cut import Cut

MAX_HEADER_BYTES: Final = 100_000_000
"""The format's own limit."""
MAX_SHARDS: Final = 4096
DTYPES: Final = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""Dtypes of weights that can be read; other tensors may be in a file but not in a model."""
RAW_DTYPES: Final = {
    **DTYPES,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "F8_E4M3": torch.float8_e4m3fn,
}
"""Dtypes of what quantized weights are made of."""
ITEM_BYTES: Final = {
    "F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2,
    "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip
SHARD_NAME: Final = re.compile(r"[A-Za-z0-9._-]+\.safetensors")
POPULATE_READ: Final = 22
"""MADV_POPULATE_READ of Linux 5.14: fill the page table now, not at the first step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """Where one tensor lies."""

    file: Path
    dtype: str
    """The format's word, e.g. `BF16`."""
    shape: tuple[int, ...]
    start: int
    """Byte offset in the file."""
    num_bytes: int


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:  # parsed JSON, checked by the callers
    fields: dict[str, Any] = {}  # as the pairs
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"key {name[:80]!r} stands there twice")
        fields[name] = value
    return fields


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:  # parsed JSON, checked by `_entry`
    # The header, where the data starts, and how many bytes of data there are.
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
                limit = min(max(size - 8, 0), MAX_HEADER_BYTES)
                raise CheckpointError(
                    f"{path.name}: header length is {length}, at most {limit} bytes are possible"
                )
            header = json.loads(file.read(length), object_pairs_hook=_unique)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name}: bad header: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path.name}: bad header: expected a JSON object")
    return header, 8 + length, size - 8 - length


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 48


def _entry(path: Path, name: str, fields: object, data_start: int, data_bytes: int) -> TensorEntry:
    def wrong(what: str) -> CheckpointError:
        return CheckpointError(f"{path.name}: tensor {name[:200]!r}: {what}")

    if not isinstance(fields, dict):
        raise wrong("bad header: expected an object")
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_BYTES:
        raise wrong(f"dtype {str(dtype)[:40]!r} is not known; known: {', '.join(ITEM_BYTES)}")
    if not isinstance(shape, list) or not all(_is_size(item) for item in shape) or len(shape) > 8:
        raise wrong(f"bad shape {str(shape)[:80]}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(item) for item in offsets):
        raise wrong(f"bad data_offsets {str(offsets)[:80]}")
    start, end = offsets
    expected = math.prod(shape) * ITEM_BYTES[dtype]
    if end - start != expected:
        raise wrong(f"expected {expected} bytes for {dtype} {shape}, data_offsets hold {end - start}")
    if end > data_bytes:
        raise wrong(f"ends at byte {end} of the data, the file has {data_bytes}: it is truncated")
    return TensorEntry(
        file=path, dtype=dtype, shape=tuple(shape), start=data_start + start, num_bytes=end - start
    )


def read_entries(path: Path) -> dict[str, TensorEntry]:
    """Read and check the header of one safetensors file.

    Args:
        path: the file.

    Returns:
        Each tensor by name; all lie inside the file and none overlaps another.

    Raises:
        CheckpointError: the header is damaged or promises more than the file holds; names file and tensor.
    """
    header, data_start, data_bytes = _read_header(path)
    header.pop("__metadata__", None)
    entries = {name: _entry(path, name, fields, data_start, data_bytes) for name, fields in header.items()}
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    for (_, before), (name, after) in pairwise(ordered):
        if before.start + before.num_bytes > after.start:
            raise CheckpointError(f"{path.name}: tensor {name[:200]!r}: overlaps the one before it")
    return entries


def _indexed_shards(index: Path) -> tuple[dict[str, str], list[Path]]:
    weight_map = read_json_config(index).mapping("weight_map")
    names = sorted(set(weight_map.values()))
    if not 1 <= len(names) <= MAX_SHARDS:
        raise CheckpointError(f"{index.name}: {len(names)} shards, between 1 and {MAX_SHARDS} are possible")
    for name in names:
        if not SHARD_NAME.fullmatch(name):
            raise CheckpointError(f"{index.name}: shard {name[:80]!r} is not a plain *.safetensors file name")
        if not (index.parent / name).is_file():
            raise CheckpointError(f"{index.name}: shard {name} is missing from the folder")
    return weight_map, [index.parent / name for name in names]


def _shards(folder: Path) -> tuple[dict[str, str], list[Path]]:
    # The index's map (empty without an index) and the files.
    if (folder / "model.safetensors").is_file():
        return {}, [folder / "model.safetensors"]
    if (folder / "model.safetensors.index.json").is_file():
        return _indexed_shards(folder / "model.safetensors.index.json")
    others = sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt"))
    hint = f"; {others[0].name} is there, but only safetensors are read" if others else ""
    for name in sorted(path.name for path in folder.glob("*.gguf"))[:1]:
        hint = f"; {name} is there: give the path of the file itself"
    raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json{hint}")


def _merge(folder: Path) -> dict[str, TensorEntry]:
    weight_map, shards = _shards(folder)
    merged: dict[str, TensorEntry] = {}
    for path in shards:
        for name, entry in read_entries(path).items():
            if name in merged:
                first = merged[name].file.name
                raise CheckpointError(f"{path.name}: tensor {name!r} is in {first} too")
            merged[name] = entry
    for name, shard in weight_map.items():
        if name not in merged or merged[name].file.name != shard:
            raise CheckpointError(
                f"{shard}: tensor {name[:200]!r}: the index says it is here, the file has it not"
            )
    return merged


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainTensor:
    """A tensor that is stored as it is; a `stored.StoredTensor`."""

    files: "Checkpoint"
    entry: TensorEntry

    @property
    def num_bytes(self) -> int:
        """Its size in the file."""
        return self.entry.num_bytes

    def read(self, dtype: torch.dtype, *, fill: bool) -> Tensor:
        """As `StoredTensor.read`; the file's pages of a converted tensor are forgotten."""
        stored = self.files.read(self.entry, fill=fill)
        tensor = stored.to(dtype)
        if tensor is not stored:
            self.files.release(stored)
        return tensor

    def read_part(self, dtype: torch.dtype, *, cut: Cut) -> Tensor:
        """As `StoredParts.read_part`; mapped where the part lies in one piece and has this dtype."""
        stored = self.files.read(self.entry, fill=False)
        part = cut.of(stored)
        tensor = part.to(dtype)
        if not self.files.is_mapped(tensor):
            self.files.release(stored)
        return tensor


class Checkpoint:
    """The open files of a checkpoint. The maps live as long as any tensor taken from them.

    A `stored.TensorSource` of plain tensors.
    """

    label: Final = ""

    def __init__(self, entries: dict[str, TensorEntry]) -> None:
        self._entries = entries
        self._maps: dict[Path, mmap.mmap] = {}
        self._starts: dict[int, mmap.mmap] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def entry(
        self, name: str, *, shape: tuple[int, ...], dtypes: Collection[str] | None = None
    ) -> TensorEntry:
        """Look a tensor up and check it against what the architecture needs.

        Args:
            name: of the tensor.
            shape: that it must have.
            dtypes: that it may have, out of `RAW_DTYPES`; None for those of plain weights.

        Raises:
            CheckpointError: missing, or of another shape or an unreadable dtype; names file and tensor.
        """
        entry = self._entries.get(name)
        if entry is None:
            raise CheckpointError(f"tensor {name!r} of shape {list(shape)} is missing from the checkpoint")
        if entry.shape != shape:
            raise CheckpointError(
                f"{entry.file.name}: tensor {name!r}: expected shape {list(shape)}, found {list(entry.shape)}"
            )
        known = DTYPES if dtypes is None else dtypes
        if entry.dtype not in known:
            raise CheckpointError(
                f"{entry.file.name}: tensor {name!r}: expected dtype {', '.join(known)}, found {entry.dtype}"
            )
        return entry

    def look_up(self, name: str) -> TensorEntry | None:
        """Where a tensor lies, whatever it is; None if there is none of this name."""
        return self._entries.get(name)

    def find(self, name: str, *, shape: tuple[int, ...]) -> PlainTensor:
        """As `TensorSource.find`."""
        return PlainTensor(files=self, entry=self.entry(name, shape=shape))

    def is_quantized(self, name: str) -> bool:
        """Never."""
        del name
        return False

    def read(self, entry: TensorEntry, *, fill: bool = True) -> Tensor:
        """The tensor's data in its own dtype, mapped from the file: no copy.

        Args:
            entry: where it lies.
            fill: read its pages now, not at the first use.
        """
        mapped = self._maps.get(entry.file)
        if mapped is None:
            mapped = self._maps[entry.file] = _map(entry.file)
            self._starts[torch.frombuffer(mapped, dtype=torch.uint8).data_ptr()] = mapped
        if fill:
            _populate(mapped, entry)
        dtype = RAW_DTYPES[entry.dtype]
        if entry.start % dtype.itemsize:  # an unpadded header; aligned reads need a copy
            raw = torch.frombuffer(mapped, dtype=torch.uint8, count=entry.num_bytes, offset=entry.start)
            return raw.clone().view(dtype).view(entry.shape)
        count = entry.num_bytes // dtype.itemsize
        return torch.frombuffer(mapped, dtype=dtype, count=count, offset=entry.start).view(entry.shape)

    def release(self, tensor: Tensor) -> None:
        """Forget the pages of (part of) a tensor that was read; a later use reads them from the file again.

        A tensor that is not mapped, or does not lie in one piece, is left alone.
        """
        if not tensor.is_contiguous() and not tensor.t().is_contiguous():
            return
        place = self._place(tensor)
        if place is None:
            return
        mapped, first = place
        begin = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (first + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if end > begin:
            mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)

    def is_mapped(self, tensor: Tensor) -> bool:
        """True if the tensor's data is that of a file."""
        return self._place(tensor) is not None

    def _place(self, tensor: Tensor) -> tuple[mmap.mmap, int] | None:
        for start, mapped in self._starts.items():
            if start <= tensor.data_ptr() < start + len(mapped):
                return mapped, tensor.data_ptr() - start
        return None

    def dtypes(self) -> set[str]:
        """The format's words for all dtypes in the files."""
        return {entry.dtype for entry in self._entries.values()}


def _map(path: Path) -> mmap.mmap:
    # Private and copy-on-write: torch wants writable memory, the file is never written.
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)


def _populate(mapped: mmap.mmap, entry: TensorEntry) -> None:
    start = entry.start // mmap.PAGESIZE * mmap.PAGESIZE
    length = entry.start + entry.num_bytes - start
    try:
        mapped.madvise(POPULATE_READ, start, length)
    except OSError:  # an older kernel; the pages come with the first step instead
        mapped.madvise(mmap.MADV_WILLNEED, start, length)


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read and check all headers of a checkpoint.

    Args:
        folder: with `model.safetensors`, or `model.safetensors.index.json` and its shards.

    Raises:
        CheckpointError: one line that names file, tensor, what was expected and what was found.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{os.fspath(folder)}: no such folder")
    return Checkpoint(_merge(folder))
