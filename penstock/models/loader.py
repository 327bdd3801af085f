"""A checkpoint folder in, a model out.

Order: config, architecture, headers, a check of every tensor, then the data. The engine process calls
`load_model` once at start. Quantized formats are refused by name.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import torch

from penstock.core.errors import CheckpointError, StartupError, UnsupportedModelError
from penstock.kernels.registry import select_kernels
from penstock.models.checkpoint import Checkpoint, open_checkpoint
from penstock.models.config import ConfigReader, read_json_config
from penstock.models.interface import LoadedModel
from penstock.models.parts import Parts, Weights
from penstock.models.registry import find_model

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_architecture(reader: ConfigReader) -> str:
    """The architecture that a `config.json` names.

    Raises:
        CheckpointError: it names none.
        UnsupportedModelError: the weights are quantized.
    """
    if reader.has("quantization_config"):
        method = reader.section("quantization_config").text("quant_method", "unknown")
        raise UnsupportedModelError(
            f"{reader.source}: quantized checkpoints are not supported, this one is {method!r}",
            param="quantization_config",
        )
    names = reader.texts("architectures")
    if len(names) != 1:
        raise reader.wrong("architectures", "a list of one name")
    return names[0]


def _resolve_dtype(dtype: str, checkpoint: Checkpoint) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if checkpoint.dtypes() <= {"F32", "F64"} else torch.bfloat16
    if dtype not in TORCH_DTYPES:
        raise StartupError(
            f"dtype is {dtype!r}, it must be one of auto, {', '.join(TORCH_DTYPES)}", param="dtype"
        )
    return TORCH_DTYPES[dtype]


def _max_model_len(requested: int | None, possible: int) -> int:
    if requested is not None and not 2 <= requested <= possible:
        raise StartupError(
            f"max_model_len is {requested}, the model's context allows 2 to {possible}", param="max_model_len"
        )
    return requested or possible


def load_model(
    path: Path,
    *,
    dtype: str = "auto",
    kernels: str = "auto",
    device: str = "cpu",
    max_model_len: int | None = None,
    on_progress: Progress | None = None,
) -> LoadedModel:
    """Load a checkpoint.

    Args:
        path: folder with `config.json` and safetensors.
        dtype: `auto` (float32 if all weights are, else bfloat16), `float32` or `bfloat16`.
        kernels: a name of `kernels.registry`, or `auto`.
        device: `cpu`.
        max_model_len: longest context to serve, in tokens; None for the model's own.
        on_progress: told after each tensor.

    Returns:
        The model; weights whose dtype matches are mapped from the files, without a copy.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: the architecture or an option of it is not built here.
        StartupError: an argument is out of range.
    """
    reader = read_json_config(path / "config.json") if path.is_dir() else _missing(path)
    architecture = read_architecture(reader)
    build = find_model(architecture)
    checkpoint = open_checkpoint(path)
    torch_dtype = _resolve_dtype(dtype, checkpoint)
    kernel_set = select_kernels(kernels, device=device, dtype=torch_dtype)
    check = Weights(checkpoint=checkpoint, dtype=torch_dtype, is_check=True)
    shape = build(reader, Parts(weights=check, kernels=kernel_set)).config.shape
    check.refuse_rest()
    served_len = _max_model_len(max_model_len, shape.max_position_embeddings)
    weights = _tracked_weights(checkpoint, dtype=torch_dtype, total=check.file_bytes, on_progress=on_progress)
    model = build(reader, Parts(weights=weights, kernels=kernel_set, max_model_len=served_len))
    return LoadedModel(
        model=model,
        config=model.config,
        architecture=architecture,
        kernels=kernel_set,
        dtype=torch_dtype,
        num_parameters=sum(tensor.numel() for tensor in weights.taken.values()),
        weights_bytes=sum(tensor.nbytes for tensor in weights.taken.values()),
        max_model_len=served_len,
    )


def _missing(path: Path) -> ConfigReader:
    raise CheckpointError(f"{path}: no such folder")


def _tracked_weights(
    checkpoint: Checkpoint, *, dtype: torch.dtype, total: int, on_progress: Progress | None
) -> Weights:
    on_tensor = None if on_progress is None else lambda done: on_progress(done, total)
    return Weights(checkpoint=checkpoint, dtype=dtype, is_check=False, on_tensor=on_tensor)
