"""Small unsigned integers in 32-bit words, and what formats share in reading their tensors.

A word of b-bit values holds 32 / b of them, the first in the lowest bits.
"""

from collections.abc import Collection
from typing import Final

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.models.checkpoint import Checkpoint
from penstock.models.config import ConfigReader

WORD_BITS: Final = 32
FLOATS: Final = ("F16", "BF16", "F32")
"""Dtypes of scales."""


def unpack_words(words: Tensor, *, bits: int, dim: int) -> Tensor:
    """The values of packed words.

    Args:
        words: int32 [rows, cols].
        bits: of a value, 4 or 8.
        dim: 0 or 1, along which a word's values lie.

    Returns:
        uint8; `dim` is 32 / bits times as long.
    """
    rows, cols = words.shape
    values = (
        words.contiguous().view(torch.uint8).view(rows, cols, WORD_BITS // 8)
    )  # little endian, as the files
    if bits == 4:
        values = torch.stack((values & 15, values >> 4), dim=3).flatten(2)
    if dim == 0:
        return values.transpose(1, 2).flatten(0, 1)
    return values.flatten(1)


def stored_bytes(files: Checkpoint, module: str, suffixes: Collection[str]) -> int:
    """Bytes of those of a module's tensors that are there."""
    found = (files.look_up(module + suffix) for suffix in suffixes)
    return sum(entry.num_bytes for entry in found if entry is not None)


def wrong_data(files: Checkpoint, name: str, what: str) -> CheckpointError:
    """The error that says what a tensor breaks; names file and tensor."""
    entry = files.look_up(name)
    place = "" if entry is None else f"{entry.file.name}: "
    return CheckpointError(f"{place}tensor {name[:200]!r}: {what}")


def read_words(files: Checkpoint, name: str, *, shape: tuple[int, int], bits: int, dim: int) -> Tensor:
    """A packed tensor of int32 words, unpacked; its pages are forgotten."""
    words = files.read(files.entry(name, shape=shape, dtypes=("I32",)))
    values = unpack_words(words, bits=bits, dim=dim)
    files.release(words)
    return values


def read_scales(files: Checkpoint, name: str, *, shape: tuple[int, ...]) -> Tensor:
    """Scales and tables as float32.

    Raises:
        CheckpointError: missing, of another shape or dtype, or a value is not finite.
    """
    tensor = files.read(files.entry(name, shape=shape, dtypes=FLOATS)).float()
    if not torch.isfinite(tensor).all():
        raise wrong_data(files, name, "holds infinity or NaN")
    return tensor


def read_group_size(reader: ConfigReader, *, default: int | None = None) -> int | None:
    """`group_size` of a `quantization_config`: inputs that share a scale, None for all of a weight.

    Raises:
        CheckpointError: it is out of range, or missing where there is no default.
    """
    size = reader.integer("group_size", default, low=-1)
    if size in {0, 1}:
        raise reader.wrong("group_size", "-1, or a whole number from 2")
    return None if size == -1 else size


def check_divides(size: int, into: int, *, module: str, what: str) -> None:
    """Refuse a weight whose size is no multiple of what is packed or scaled together.

    Raises:
        CheckpointError: names module and both numbers.
    """
    if into % size:
        raise CheckpointError(f"{module[:200]}.weight: {what} is {size}, which does not divide its {into}")
