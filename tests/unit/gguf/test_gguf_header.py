"""The header of a GGUF file: whatever is wrong with it is one line that names it, never a crash."""

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.text.gguf.header import MAX_STRINGS, read_header
from tests.unit.gguf.gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    STRING,
    U32,
    U64,
    entry,
    file_bytes,
    tensor,
    text,
    write,
)

ENTRIES = [
    entry("general.architecture", STRING, "llama"),
    entry("llama.block_count", U32, 2),
    entry("flag", BOOL, True),
    entry("scores", ARRAY, (F32, [0.5, -1.0])),
    entry("tokens", ARRAY, (STRING, ["a", "b"])),
]
GOOD = file_bytes(ENTRIES, [tensor("x", [4, 2]), tensor("y", [32], kind=8, offset=32)], bytes(32 + 34))


def refused(folder: Path, raw: bytes) -> str:
    with pytest.raises(StartupError) as caught:
        read_header(write(folder, raw))
    assert "\n" not in caught.value.message
    assert "model.gguf" in caught.value.message
    return caught.value.message


def test_a_good_header_is_read(tmp_path: Path) -> None:
    file = read_header(write(tmp_path, GOOD))
    assert file.metadata.text("general.architecture") == "llama"
    assert file.metadata.integer("llama.block_count") == 2
    assert file.metadata.boolean("flag", False)
    assert file.metadata.numbers("scores", length=2) == [0.5, -1.0]
    assert file.metadata.texts("tokens") == ["a", "b"]
    assert file.tensors["x"].shape == (2, 4)
    assert file.tensors["y"].kind.name == "Q8_0"
    assert file.tensors["y"].start + file.tensors["y"].num_bytes == len(GOOD)


HUGE = (1 << 64) - 1
BROKEN = {
    "nothing": (b"", "the file is empty"),
    "another format": (b"GGML" + GOOD[4:], "begins with b'GGML'"),
    "version 1": (file_bytes(ENTRIES, [], version=1), "version is 1; known: 2, 3"),
    "another byte order": (file_bytes(ENTRIES, [], version=3 << 24), "known: 2, 3 (little endian)"),
    "tensors without end": (file_bytes([], [], num_tensors=HUGE), f"number of tensors is {HUGE}, at most"),
    "entries without end": (file_bytes([], [], num_entries=HUGE), "number of metadata entries is"),
    "entries that are not there": (file_bytes([], [], num_entries=9), "truncated"),
    "a key without end": (file_bytes([struct.pack("<Q", HUGE)], [], num_entries=1), "the length of the key"),
    "a long text": (
        file_bytes([text("k") + struct.pack("<IQ", STRING, 1 << 20)], [], num_entries=1), "metadata 'k' takes 1048576 bytes",
    ),
    "a text that is none": (file_bytes([entry("k", STRING, b"\xff")], []), "is not UTF-8"),
    "a key twice": (file_bytes([ENTRIES[0], ENTRIES[0]], []), "'general.architecture' stands there twice"),
    "a type that is none": (file_bytes([text("k") + struct.pack("<I", 13)], []), "the type of metadata 'k' is 13"),
    "a boolean of 2": (file_bytes([text("k") + struct.pack("<IB", BOOL, 2)], []), "is 2, a boolean is 0 or 1"),
    "an array of arrays": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, ARRAY, 1) + bytes(32)], []), "array of arrays",
    ),
    "an array without end": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, U64, HUGE)], []), "the length of the array",
    ),
    "an array past the end": (
        file_bytes([text("k") + struct.pack("<IIQ", ARRAY, U64, 30)], [], bytes(64)), "truncated",
    ),
    "a tensor twice": (
        file_bytes([], [tensor("x", [4]), tensor("x", [4], offset=32)], bytes(64)), "'x' stands there twice",
    ),
    "five dimensions": (file_bytes([], [tensor("x", [1] * 5)], bytes(64)), "is 5, at most 4"),
    "no dimension": (file_bytes([], [tensor("x", [])], bytes(64)), "each must be 1 or more"),
    "a dimension of 0": (file_bytes([], [tensor("x", [0])], bytes(64)), "each must be 1 or more"),
    "a product that wraps": (
        file_bytes([], [tensor("x", [1 << 32, 1 << 32])], bytes(64)), "ends at byte",
    ),
    "a dimension without end": (file_bytes([], [tensor("x", [HUGE])], bytes(64)), "dimension 0 of tensor 'x'"),
    "an unknown type": (file_bytes([], [tensor("x", [256], kind=23)], bytes(512)), "is of type 23; known: F32"),
    "a row of half a block": (file_bytes([], [tensor("x", [48], kind=2)], bytes(64)), "blocks of 32"),
    "data that is not there": (file_bytes([], [tensor("x", [100])], bytes(64)), "it is truncated"),
    "an offset past the end": (file_bytes([], [tensor("x", [4], offset=1 << 40)], bytes(64)), "it is truncated"),
    "an offset that wraps": (file_bytes([], [tensor("x", [4], offset=HUGE - 31)], bytes(64)), "the offset of"),
    "an odd offset": (file_bytes([], [tensor("x", [4], offset=4)], bytes(64)), "no multiple of the alignment 32"),
    "an overlap": (
        file_bytes([], [tensor("x", [16]), tensor("y", [4], offset=32)], bytes(64)), "'y' overlaps the one before",
    ),
    "an alignment of 0": (file_bytes([entry("general.alignment", U32, 0)], []), "'general.alignment' is 0"),
    "an alignment of 24": (file_bytes([entry("general.alignment", U32, 24)], []), "a power of two"),
    "an alignment in words": (file_bytes([entry("general.alignment", STRING, "x")], []), "'general.alignment' is 'x'"),
    "a part of a file": (file_bytes([entry("split.count", U32, 3)], []), "one of several files"),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_what_is_wrong_is_named(what: str, tmp_path: Path) -> None:
    raw, message = BROKEN[what]
    assert message in refused(tmp_path, raw)


def test_strings_of_all_arrays_together_are_bounded(tmp_path: Path) -> None:
    """Counted before the first of them is made."""
    claim = struct.pack("<IIQ", ARRAY, STRING, MAX_STRINGS + 1)
    raw = file_bytes([text("k") + claim], [], bytes(MAX_STRINGS + 2))
    assert "at most 4194304" in refused(tmp_path, raw)


@pytest.mark.parametrize("length", range(0, len(GOOD), 7))
def test_a_truncated_file_is_refused(length: int, tmp_path: Path) -> None:
    refused(tmp_path, GOOD[:length])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_no_flipped_bytes_crash_the_reader(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]]
) -> None:
    """Either it is refused by name, or every tensor still lies inside the file."""
    raw = bytearray(GOOD)
    for at, new in changes:
        raw[at] = new
    path = write(tmp_path_factory.getbasetemp(), bytes(raw))
    with contextlib.suppress(StartupError):
        for place in read_header(path).tensors.values():
            assert place.start >= 0
            assert place.start + place.num_bytes <= len(raw)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.integer("flag"), "'flag' is True, expected a whole number"),
        (lambda m: m.integer("absent"), "'absent' is missing"),
        (lambda m: m.integer("llama.block_count", high=1), "expected a whole number from 1 to 1"),
        (lambda m: m.text("llama.block_count"), "expected a string"),
        (lambda m: m.number("general.architecture"), "expected a number"),
        (lambda m: m.boolean("llama.block_count", False), "expected true or false"),
        (lambda m: m.texts("scores"), "expected an array of strings"),
        (lambda m: m.numbers("scores", length=3), "expected an array of 3 finite numbers"),
        (lambda m: m.numbers("tokens", length=2), "expected an array of 2 finite numbers"),
        (lambda m: m.supported("general.architecture", ("a", "b"), "a"), "'llama', which is not supported; known: a, b"),
    ],
)  # fmt: skip
def test_an_entry_of_another_type_or_range_is_named(call, message: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(StartupError) as caught:
        call(read_header(write(tmp_path, GOOD)).metadata)
    assert message in caught.value.message
