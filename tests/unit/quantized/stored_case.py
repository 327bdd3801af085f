"""Opens one module of a quantized checkpoint that was written by hand, and the plain loops that say what it means."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.models.config import ConfigReader
from penstock.models.quantized.scheme import QuantizedCheckpoint
from penstock.models.quantized.select import open_source
from penstock.models.stored import StoredMatrix

MODULE = "model.layers.0.mlp.up_proj"
Array = npt.NDArray[Any]


def source_of(folder: Path, tensors: dict[str, Tensor], section: dict[str, Any]) -> QuantizedCheckpoint:
    """A checkpoint of one module beside a plain tensor."""
    named = {MODULE + suffix: tensor.contiguous() for suffix, tensor in tensors.items()}
    save_file({**named, "model.norm.weight": torch.ones(4)}, folder / "model.safetensors")
    source = open_source(folder, ConfigReader({"quantization_config": section}, source="config.json"))
    assert isinstance(source, QuantizedCheckpoint)
    return source


def matrix_of(
    folder: Path, tensors: dict[str, Tensor], section: dict[str, Any], *, shape: tuple[int, int]
) -> StoredMatrix:
    """Its weight, found and checked."""
    found = source_of(folder, tensors, section).find(f"{MODULE}.weight", shape=shape)
    assert isinstance(found, StoredMatrix)
    return found


def nibbles(words: Tensor) -> list[list[list[int]]]:
    """Of each int32 its eight 4-bit values, the lowest bits first."""
    unsigned = words.numpy().astype(np.int64) & 0xFFFFFFFF
    return [[[int(word) >> 4 * j & 15 for j in range(8)] for word in row] for row in unsigned]
