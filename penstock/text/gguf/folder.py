"""A GGUF file as the model folder that it stands for: the small JSON files that such a folder would have."""

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

import msgspec

from penstock.text.gguf.header import Metadata, is_gguf, read_header
from penstock.text.gguf.tokenizer import generation_fields, settings_fields, tokenizer_fields

SMALL_FILES: Final[dict[str, Callable[[Metadata], dict[str, Any]]]] = {  # JSON objects
    "tokenizer_config.json": settings_fields,
    "generation_config.json": generation_fields,
}
"""By name: what makes the file's content."""
TOKENIZER: Final = "tokenizer.json"


@lru_cache(maxsize=4)
def _small_files(path: Path, size: int, changed_ns: int) -> dict[str, bytes]:
    # Asked for several times at start; the vocabulary itself is not kept.
    del size, changed_ns
    metadata = read_header(path).metadata
    return {name: msgspec.json.encode(make(metadata)) for name, make in SMALL_FILES.items()}


def has_file(path: Path) -> bool:
    """True if `path` is `model.gguf/NAME` and the GGUF file says what NAME would hold."""
    return (path.name == TOKENIZER or path.name in SMALL_FILES) and is_gguf(path.parent)


def read_file(path: Path) -> bytes:
    """The content of a file for which `has_file` is true.

    Raises:
        CheckpointError: the GGUF file is damaged.
        UnsupportedModelError: its tokenizer is of a kind that is not known.
    """
    if path.name == TOKENIZER:
        return msgspec.json.encode(tokenizer_fields(read_header(path.parent).metadata))
    status = path.parent.stat()
    return _small_files(path.parent, status.st_size, status.st_mtime_ns)[path.name]
