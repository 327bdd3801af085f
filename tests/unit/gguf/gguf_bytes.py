"""GGUF files byte by byte, good ones and damaged ones."""

import struct
from pathlib import Path
from typing import Any

U32, F32, BOOL, STRING, ARRAY, U64 = 4, 6, 7, 8, 9, 10
CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, content: Any) -> bytes:
    """One value with its type; an array is (type, values)."""
    if kind == STRING:
        return struct.pack("<I", kind) + text(content)
    if kind == ARRAY:
        inner, values = content
        body = b"".join(text(v) if inner == STRING else struct.pack(f"<{CODES[inner]}", v) for v in values)
        return struct.pack("<IIQ", kind, inner, len(values)) + body
    return struct.pack(f"<I{CODES[kind]}", kind, content)


def entry(key: str, kind: int, content: Any) -> bytes:
    return text(key) + value(kind, content)


def tensor(name: str, dims: list[int], *, kind: int = 0, offset: int = 0) -> bytes:
    """`dims` innermost first, as the file has them."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file_bytes(
    entries: list[bytes],
    tensors: list[bytes],
    data: bytes = b"",
    *,
    version: int = 3,
    num_tensors: int | None = None,
    num_entries: int | None = None,
    alignment: int = 32,
) -> bytes:
    counts = (
        len(tensors) if num_tensors is None else num_tensors,
        len(entries) if num_entries is None else num_entries,
    )
    head = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(entries) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


def write(folder: Path, raw: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(raw)
    return path
