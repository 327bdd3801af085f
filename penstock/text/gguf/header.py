"""The header of a GGUF file: metadata and where tensors lie, every number checked against the file's size.

```
[0, 24)    "GGUF", version (2 or 3), number of tensors, number of metadata entries; little endian
then       entries: key, type, value         strings are a length and bytes, arrays a type, a count and values
then       tensors: name, dimensions (the innermost first), type, offset counted from the data
then       padding to `general.alignment`, and the data
```

Nothing is read past the end, no count is believed before the bytes for it are known to be there, and numeric
arrays stay packed.

**Source:** ggml, docs/gguf.md, version 3.
"""

import math
import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

from penstock.core.errors import CheckpointError, UnsupportedModelError

MAGIC: Final = b"GGUF"
VERSIONS: Final = (2, 3)
MAX_KEY_BYTES: Final = 65_535
MAX_ENTRIES: Final = 65_536
MAX_TENSORS: Final = 1 << 20
MAX_STRING_BYTES: Final = 64 << 20
MAX_STRINGS: Final = 1 << 22
"""In all arrays of strings together; the largest vocabularies have some 500 thousand tokens and merges."""
MAX_ARRAY_BYTES: Final = 64 << 20
MAX_DIMS: Final = 4
MAX_DIM: Final = 1 << 40
MAX_ALIGNMENT: Final = 1 << 16
DEFAULT_ALIGNMENT: Final = 32

Scalar: TypeAlias = int | float | bool | str
Value: TypeAlias = Scalar | Sequence[int] | Sequence[float] | Sequence[str]

SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""Types of values by number, as `struct` spells them; 8 is a string, 9 an array."""
STRING: Final = 8
ARRAY: Final = 9


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """How values of a tensor are kept: in blocks of so many values and bytes."""

    name: str
    values: int
    num_bytes: int


TYPES: Final = {
    0: BlockType(name="F32", values=1, num_bytes=4),
    1: BlockType(name="F16", values=1, num_bytes=2),
    2: BlockType(name="Q4_0", values=32, num_bytes=18),
    3: BlockType(name="Q4_1", values=32, num_bytes=20),
    6: BlockType(name="Q5_0", values=32, num_bytes=22),
    7: BlockType(name="Q5_1", values=32, num_bytes=24),
    8: BlockType(name="Q8_0", values=32, num_bytes=34),
    12: BlockType(name="Q4_K", values=256, num_bytes=144),
    13: BlockType(name="Q5_K", values=256, num_bytes=176),
    14: BlockType(name="Q6_K", values=256, num_bytes=210),
    30: BlockType(name="BF16", values=1, num_bytes=2),
}
"""By the file's number; all others are refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """Where one tensor lies."""

    shape: tuple[int, ...]
    """The outermost dimension first, as torch counts; the file has them the other way round."""
    kind: BlockType
    start: int
    """Byte offset in the file."""
    num_bytes: int


class Metadata:
    """Typed entries; every method names file, key, value and expectation in its `CheckpointError`."""

    def __init__(self, values: dict[str, Value], *, source: str) -> None:
        self._values = values
        self.source = source
        """Name of the file."""

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def wrong(self, key: str, expected: str) -> CheckpointError:
        """The error that says that an entry is not what it must be."""
        found = f"is {repr(self._values[key])[:80]}" if key in self._values else "is missing"
        return CheckpointError(f"{self.source}: metadata {key!r} {found}, expected {expected}", param=key)

    def integer(self, key: str, default: int | None = None, *, low: int = 1, high: int = 1 << 24) -> int:
        """A whole number in [low, high]."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise self.wrong(key, f"a whole number from {low} to {high}")
        return value

    def number(
        self, key: str, default: float | None = None, *, low: float = 0.0, high: float = 1e12
    ) -> float:
        """A finite number in [low, high]."""
        value = self._values.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self._values.get(key, default)
        if not isinstance(value, bool):
            raise self.wrong(key, "true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string."""
        value = self._values.get(key, default)
        if not isinstance(value, str):
            raise self.wrong(key, "a string")
        return value

    def texts(self, key: str) -> list[str]:
        """An array of strings; empty if absent."""
        value = self._values.get(key, [])
        if not isinstance(value, list):
            raise self.wrong(key, "an array of strings")
        return value

    def numbers(self, key: str, *, length: int) -> list[float]:
        """An array of `length` numbers, each finite."""
        value = self._values.get(key)
        if isinstance(value, memoryview) and len(value) == length:
            found = [float(each) for each in value]
            if all(math.isfinite(each) for each in found):
                return found
        raise self.wrong(key, f"an array of {length} finite numbers")

    def supported(self, key: str, known: Sequence[str], default: str) -> str:
        """A string out of `known`.

        Raises:
            UnsupportedModelError: it asks for what is not built here; lists what is.
        """
        value = self.text(key, default)
        if value not in known:
            raise UnsupportedModelError(
                f"{self.source}: metadata {key!r} is {value[:80]!r}, which is not supported; "
                f"known: {', '.join(known)}",
                param=key,
            )
        return value

    def scalar(self, key: str) -> Value | None:
        """The value as it is; None if absent."""
        return self._values.get(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """A checked header."""

    path: Path
    metadata: Metadata
    tensors: dict[str, TensorPlace]


class _Cursor:
    """Reads forward through the header; each read is checked against the end of the file."""

    def __init__(self, data: memoryview, *, name: str) -> None:
        self._data = data
        self.name = name
        self.at = 0
        self.num_strings = 0

    def wrong(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.name}: {what}")

    def take(self, count: int, *, what: str) -> memoryview:
        left = len(self._data) - self.at
        if count > left:
            raise self.wrong(
                f"{what} takes {count} bytes at byte {self.at}, the file has {left} left: truncated"
            )
        self.at += count
        return self._data[self.at - count : self.at]

    def number(self, code: str, *, what: str) -> int | float | bool:
        raw = self.take(struct.calcsize(f"<{code}"), what=what)
        if code == "?":
            if raw[0] > 1:
                raise self.wrong(f"{what} is {raw[0]}, a boolean is 0 or 1")
            return bool(raw[0])
        value: int | float = struct.unpack(f"<{code}", raw)[0]
        return value

    def count(self, code: str, *, what: str, most: int) -> int:
        value = int(self.number(code, what=what))
        if value > most:
            raise self.wrong(f"{what} is {value}, at most {most} are read")
        return value

    def string(self, *, what: str, most: int = MAX_STRING_BYTES) -> str:
        length = self.count("Q", what=f"the length of {what}", most=most)
        raw = self.take(length, what=what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError as error:
            raise self.wrong(f"{what} is not UTF-8: {error.reason} at its byte {error.start}") from None

    def value(self, *, what: str) -> Value:
        kind = self.count("I", what=f"the type of {what}", most=12)
        if kind == STRING:
            return self.string(what=what)
        return self._array(what=what) if kind == ARRAY else self.number(SCALARS[kind], what=what)

    def _array(self, *, what: str) -> Value:
        kind = self.count("I", what=f"the type of the array {what}", most=12)
        length = self.count("Q", what=f"the length of the array {what}", most=len(self._data))
        if kind == ARRAY:
            raise self.wrong(f"{what} is an array of arrays, which is not read")
        if kind == STRING:
            self.num_strings += length
            if self.num_strings > MAX_STRINGS:
                raise self.wrong(
                    f"{what} brings the strings of arrays to {self.num_strings}, at most {MAX_STRINGS}"
                )
            return [self.string(what=f"entry {i} of {what}") for i in range(length)]
        code = "B" if SCALARS[kind] == "?" else SCALARS[kind]
        size = length * struct.calcsize(f"<{code}")
        if size > MAX_ARRAY_BYTES:
            raise self.wrong(f"the array {what} has {size} bytes, at most {MAX_ARRAY_BYTES} are read")
        packed: memoryview[int] = memoryview(bytes(self.take(size, what=what)))
        return packed.cast(code)  # type: ignore[call-overload, no-any-return]  # the stubs want a literal


def _read_metadata(cursor: _Cursor, count: int, *, source: str) -> Metadata:
    values: dict[str, Value] = {}
    for i in range(count):
        key = cursor.string(what=f"the key of metadata {i}", most=MAX_KEY_BYTES)
        if key in values:
            raise cursor.wrong(f"metadata {key[:80]!r} stands there twice")
        values[key] = cursor.value(what=f"metadata {key[:80]!r}")
    return Metadata(values, source=source)


def _read_tensor(cursor: _Cursor, name: str, *, alignment: int) -> TensorPlace:
    what = f"tensor {name[:200]!r}"
    num_dims = cursor.count("I", what=f"the number of dimensions of {what}", most=MAX_DIMS)
    dims = [cursor.count("Q", what=f"dimension {i} of {what}", most=MAX_DIM) for i in range(num_dims)]
    if not dims or 0 in dims:
        raise cursor.wrong(f"{what} has the dimensions {dims}, each must be 1 or more")
    number = cursor.count("I", what=f"the type of {what}", most=(1 << 32) - 1)
    kind = TYPES.get(number)
    if kind is None:
        known = ", ".join(each.name for each in TYPES.values())
        raise UnsupportedModelError(
            f"{cursor.name}: {what} is of type {number}; known: {known}", param="type"
        )
    if dims[0] % kind.values:
        raise cursor.wrong(f"{what} has rows of {dims[0]} values, {kind.name} keeps blocks of {kind.values}")
    offset = cursor.count("Q", what=f"the offset of {what}", most=1 << 62)
    if offset % alignment:
        raise cursor.wrong(f"{what} begins at {offset}, which is no multiple of the alignment {alignment}")
    num_bytes = math.prod(dims) // kind.values * kind.num_bytes
    return TensorPlace(shape=tuple(reversed(dims)), kind=kind, start=offset, num_bytes=num_bytes)


def _placed(
    tensors: dict[str, TensorPlace], *, start: int, size: int, cursor: _Cursor
) -> dict[str, TensorPlace]:
    """Offsets in the file; each tensor lies in it, and none overlaps another."""
    ordered = sorted(tensors.items(), key=lambda item: (item[1].start, item[1].num_bytes))
    for name, place in ordered:
        end = start + place.start + place.num_bytes
        if end > size:
            raise cursor.wrong(
                f"tensor {name[:200]!r} ends at byte {end}, the file has {size}: it is truncated"
            )
    for (_, before), (name, after) in pairwise(ordered):
        if before.start + before.num_bytes > after.start:
            raise cursor.wrong(f"tensor {name[:200]!r} overlaps the one before it")
    return {
        name: TensorPlace(
            shape=each.shape, kind=each.kind, start=start + each.start, num_bytes=each.num_bytes
        )
        for name, each in tensors.items()
    }


def _parse(data: memoryview, path: Path) -> GgufFile:
    cursor = _Cursor(data, name=path.name)
    if bytes(cursor.take(4, what="the magic number")) != MAGIC:
        raise cursor.wrong(f"begins with {bytes(data[:4])!r}, a GGUF file with {MAGIC!r}")
    version = cursor.count("I", what="the version", most=(1 << 32) - 1)
    if version not in VERSIONS:
        raise UnsupportedModelError(
            f"{path.name}: version is {version}; known: 2, 3 (little endian)", param="version"
        )
    num_tensors = cursor.count("Q", what="the number of tensors", most=MAX_TENSORS)
    num_entries = cursor.count("Q", what="the number of metadata entries", most=MAX_ENTRIES)
    metadata = _read_metadata(cursor, num_entries, source=path.name)
    alignment = metadata.integer("general.alignment", DEFAULT_ALIGNMENT, low=8, high=MAX_ALIGNMENT)
    if alignment & (alignment - 1):
        raise metadata.wrong("general.alignment", "a power of two")
    if metadata.integer("split.count", 1, low=0, high=1 << 16) > 1:
        raise UnsupportedModelError(
            f"{path.name}: it is one of several files; join them first", param="split.count"
        )
    tensors: dict[str, TensorPlace] = {}
    for i in range(num_tensors):
        name = cursor.string(what=f"the name of tensor {i}", most=MAX_KEY_BYTES)
        if name in tensors:
            raise cursor.wrong(f"tensor {name[:200]!r} stands there twice")
        tensors[name] = _read_tensor(cursor, name, alignment=alignment)
    start = -(-cursor.at // alignment) * alignment
    placed = _placed(tensors, start=start, size=len(data), cursor=cursor)
    return GgufFile(path=path, metadata=metadata, tensors=placed)


def is_gguf(path: Path) -> bool:
    """True if the path is a GGUF file by its name."""
    return path.suffix == ".gguf" and path.is_file()


def read_header(path: Path) -> GgufFile:
    """Read and check the header of a file.

    Raises:
        CheckpointError: it is damaged or promises more than it holds; names file, field, value and limit.
        UnsupportedModelError: a version or type of tensor that is not built here.
    """
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise CheckpointError(f"{path.name}: the file is empty")
            # Not closed by hand: views of it live as long as an error's traceback.
            return _parse(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)), path)
    except OSError as error:
        raise CheckpointError(f"{path.name}: cannot be read: {error.strerror}") from error
