"""A GGUF file as the model folder that it stands for: the small JSON files that such a folder would have."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.text.gguf.header import Metadata, is_gguf, read_header
from penstock.text.gguf.tokenizer import generation_fields, settings_fields, tokenizer_fields

FILES: Final[dict[str, Callable[[Metadata], dict[str, Any]]]] = {  # JSON objects
    "tokenizer.json": tokenizer_fields,
    "tokenizer_config.json": settings_fields,
    "generation_config.json": generation_fields,
}
"""By name: what makes the file's content."""


@lru_cache(maxsize=1)
def _metadata(path: Path, size: int, changed_ns: int) -> Metadata:
    # Of the last file: its text side asks three times in a row.
    del size, changed_ns
    return read_header(path).metadata


def has_file(path: Path) -> bool:
    """True if `path` is `model.gguf/NAME` and the GGUF file says what NAME would hold."""
    return path.name in FILES and is_gguf(path.parent)


def read_file(path: Path) -> bytes:
    """The content of a file for which `has_file` is true.

    Raises:
        CheckpointError: the GGUF file is damaged.
        UnsupportedModelError: its tokenizer is of a kind that is not known.
    """
    status = path.parent.stat()
    metadata = _metadata(path.parent, status.st_size, status.st_mtime_ns)
    return msgspec.json.encode(FILES[path.name](metadata))
