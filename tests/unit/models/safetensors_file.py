"""Writes safetensors files by hand, good ones and damaged ones."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WORDS = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


def file_bytes(header: Any, data: bytes) -> bytes:
    """A file of a header (bytes as they are, else as JSON) and data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def header_of(tensors: dict[str, Tensor]) -> tuple[dict[str, Any], bytes]:
    """The header and the data of some tensors."""
    header: dict[str, Any] = {}
    data = b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": WORDS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return header, data


def write(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Write tensors, the header padded so that data is aligned."""
    header, data = header_of(tensors)
    text = json.dumps(header).encode()
    path.write_bytes(file_bytes(text + b" " * (-len(text) % 8), data))
    return path
