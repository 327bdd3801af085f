"""Reads the small JSON files of a model folder; every failure is one line that names the file.

Not the weights and not the model's config (`models` reads those). Called by the tokenizer and the chat
template.
"""

from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError
from penstock.text.gguf import folder as gguf_folder

MAX_JSON_BYTES: Final = 256 * 1024 * 1024
"""Larger than any tokenizer.json in use (about 35 MB); a bound against a folder that is not a model."""


def read_bytes(path: Path) -> bytes:
    """The content of `path`; in a GGUF file, what a folder in its place would hold there.

    Raises:
        CheckpointError: the file is missing, unreadable or larger than `MAX_JSON_BYTES`.
    """
    if gguf_folder.has_file(path):
        return gguf_folder.read_file(path)
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise CheckpointError(f"{path.name} has {size} bytes, the limit is {MAX_JSON_BYTES}")
        return path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path.name} is missing in the model folder {path.parent.name!r}") from None
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from None


def has_file(path: Path) -> bool:
    """True if there is such a file, in a folder or in what a GGUF file stands for."""
    return path.exists() or gguf_folder.has_file(path)


def read_object(path: Path) -> dict[str, object]:
    """The JSON object in `path`, or an empty one if there is no such file.

    Raises:
        CheckpointError: the file exists and is not a JSON object.
    """
    if not has_file(path):
        return {}
    try:
        value: object = msgspec.json.decode(read_bytes(path))
    except (msgspec.DecodeError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a JSON object, not {type(value).__name__}")
    return value
