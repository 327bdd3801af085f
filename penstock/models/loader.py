"""A checkpoint in, a model out.

Order: config, architecture, headers, a check of every tensor, then the data. The engine process calls
`load_model` once at start. Quantized checkpoints are read by `quantized`.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import torch

from penstock.core.errors import StartupError
from penstock.kernels.adapters import LoraSites
from penstock.kernels.batch import KvShape
from penstock.kernels.devices import CPU
from penstock.kernels.ops import KernelSet
from penstock.kernels.options import DEFAULT_OPTIONS, KernelOptions
from penstock.kernels.quantization import Quantization
from penstock.kernels.reference.kernel_set import ReferenceKernels
from penstock.kernels.registry import select_kernels
from penstock.models.adapted import AdaptedModel
from penstock.models.config import ConfigReader, DecoderShape
from penstock.models.formats import open_model
from penstock.models.interface import CausalLM, LoadedModel
from penstock.models.parts import Parts, Weights
from penstock.models.registry import CLASSIFIERS, BuildModel, find_model
from penstock.models.stored import TensorSource
from penstock.parallel.rank import ALONE, Rank

Progress = Callable[[int, int], None]
"""Called with (bytes done, bytes in all)."""

log = logging.getLogger("penstock.models")

MAX_LABELS: Final = 4096
"""Classes of a head; a request's answer tells all of them."""
TORCH_DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def read_architecture(reader: ConfigReader) -> str:
    """The architecture that a `config.json` names.

    Raises:
        CheckpointError: it names none.
    """
    names = reader.texts("architectures")
    if len(names) != 1:
        raise reader.wrong("architectures", "a list of one name")
    return names[0]


def read_labels(reader: ConfigReader) -> tuple[str, ...]:
    """The classes of a sequence classification head, in the order of its rows.

    A config without them means two, as in the Hugging Face stack.

    Raises:
        CheckpointError: they are not numbered from 0 on, or too many.
    """
    if not reader.has("id2label"):
        return tuple(f"LABEL_{i}" for i in range(reader.integer("num_labels", 2, high=MAX_LABELS)))
    labels = reader.mapping("id2label")
    if not 1 <= len(labels) <= MAX_LABELS or set(labels) != {str(i) for i in range(len(labels))}:
        raise reader.wrong("id2label", f"1 to {MAX_LABELS} classes numbered from 0 on")
    return tuple(labels[str(i)] for i in range(len(labels)))


def _resolve_dtype(dtype: str, checkpoint: TensorSource) -> torch.dtype:
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
    device: str | torch.device = CPU,
    max_model_len: int | None = None,
    options: KernelOptions = DEFAULT_OPTIONS,
    on_progress: Progress | None = None,
    kernel_set: KernelSet | None = None,
    rank: Rank = ALONE,
) -> LoadedModel:
    """Load a checkpoint, or a rank's part of it.

    Args:
        path: folder with `config.json` and safetensors, or a `.gguf` file.
        dtype: `auto` (float32 if all weights are, else bfloat16), `float32` or `bfloat16`.
        kernels: a name of `kernels.registry`, or `auto`.
        device: where its tensors are put; its type is one that the kernels run on.
        max_model_len: longest context to serve, in tokens; None for the model's own.
        options: quantization, threads and what else the kernels are told.
        on_progress: told after each tensor.
        kernel_set: of another model, on whose threads this one is to run; None makes one.
        rank: whose part is read.

    Returns:
        The model; on the CPU, weights whose dtype matches are mapped from the files, without a copy.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
        UnsupportedModelError: the architecture or an option of it is not built here.
        StartupError: an argument is out of range.
    """
    device = torch.device(device)
    checked = _check(path, dtype=dtype)
    options = replace(options, head_dim=checked.shape.head_dim)
    if kernel_set is None:
        kernel_set = select_kernels(kernels, device=device.type, dtype=checked.dtype, options=options)
    served_len = _max_model_len(max_model_len, checked.shape.max_position_embeddings)
    weights = checked.weights(on_progress, kernels=kernel_set, device=device)
    sites = LoraSites() if options.enable_lora else None
    parts = Parts(
        weights=weights,
        kernels=kernel_set,
        quantization=options.quantization,
        max_model_len=served_len,
        sites=sites,
        num_labels=len(checked.labels),
        rank=rank,
    )
    model = checked.build(checked.reader, parts)
    run = _make_runnable(model, kernel_set, dtype=checked.dtype, options=options, sites=sites, rank=rank)
    return LoadedModel(
        model=run.model,
        config=run.model.config,
        architecture=checked.architecture,
        kernels=kernel_set,
        dtype=checked.dtype,
        kv_dtype=options.kv_dtype(checked.dtype),
        quantization=_describe(options.quantization, weights),
        execution=run.execution,
        num_parameters=weights.num_parameters,
        weights_bytes=weights.resident_bytes,
        buffer_bytes=run.buffer_bytes,
        max_model_len=served_len,
        sites=sites,
        labels=checked.labels,
        device=device,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Checked:
    """A checkpoint whose every tensor has been looked for, and none read."""

    reader: ConfigReader
    checkpoint: TensorSource
    architecture: str
    build: BuildModel
    dtype: torch.dtype
    labels: tuple[str, ...]
    shape: DecoderShape
    file_bytes: int
    """Of the tensors that the model takes."""

    def weights(self, on_progress: Progress | None, *, kernels: KernelSet, device: torch.device) -> Weights:
        """Its tensors, to be read for these kernels on this device."""
        on_tensor = None if on_progress is None else lambda done: on_progress(done, self.file_bytes)
        return Weights(
            checkpoint=self.checkpoint,
            dtype=self.dtype,
            is_check=False,
            on_tensor=on_tensor,
            is_packed=kernels.copies_weights,
            device=device,
            rounded_methods=kernels.rounded_methods,
        )


def read_shape(path: Path) -> DecoderShape:
    """The sizes of a checkpoint's model, whatever its family calls them; reads no data.

    Raises:
        PenstockError: as `load_model`.
    """
    return _check(path, dtype="auto").shape


def _check(path: Path, *, dtype: str) -> _Checked:
    """Open a checkpoint and build its model without data.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not the model's.
        UnsupportedModelError: the architecture or an option of it is not built here.
        StartupError: the dtype is out of range.
    """
    reader, checkpoint = open_model(path)
    architecture = read_architecture(reader)
    build = find_model(architecture)
    torch_dtype = _resolve_dtype(dtype, checkpoint)
    labels = read_labels(reader) if architecture in CLASSIFIERS else ()
    check = Weights(checkpoint=checkpoint, dtype=torch_dtype, is_check=True)
    parts = Parts(weights=check, kernels=ReferenceKernels(), num_labels=len(labels))
    shape = build(reader, parts).config.shape
    check.refuse_rest()
    return _Checked(
        reader=reader,
        checkpoint=checkpoint,
        architecture=architecture,
        build=build,
        dtype=torch_dtype,
        labels=labels,
        shape=shape,
        file_bytes=check.file_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runnable:
    """A model as it will be run."""

    model: CausalLM
    execution: str
    buffer_bytes: Callable[[], int] = lambda: 0


def _make_runnable(
    model: CausalLM,
    kernels: KernelSet,
    *,
    dtype: torch.dtype,
    options: KernelOptions,
    sites: LoraSites | None,
    rank: Rank,
) -> _Runnable:
    """The model recorded, where the kernels can; else as it is."""
    plain = model if sites is None else AdaptedModel(model, active=sites.active)
    if not rank.is_alone:
        return _Runnable(model=plain, execution=f"op by op, on {rank.size} ranks")
    if kernels.name != "native":
        return _Runnable(model=plain, execution="op by op")
    # Imported here: it needs the extension module, which is there if the native kernels are.
    from penstock.kernels.cpu.kernel_set import NativeKernels
    from penstock.models.recorded import RecordedModel

    assert isinstance(kernels, NativeKernels)
    kv = KvShape(
        block_size=options.block_size,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        dtype=options.kv_dtype(dtype),
    )
    try:
        recorded = RecordedModel(model, kernels, kv=kv, dtype=dtype)
    except Exception as error:  # noqa: BLE001  the edge of an outside model's code, run without data
        log.warning("the model's passes cannot be recorded and run op by op: %s", error)
        return _Runnable(model=plain, execution=f"op by op: {error}")
    return _Runnable(model=recorded, execution="recorded", buffer_bytes=lambda: recorded.buffer_bytes)


def _describe(asked: Quantization, weights: Weights) -> str:
    """How the weights are kept: as asked for, and what the checkpoint's own format became."""
    label = weights.checkpoint.label
    if not label:
        return str(asked)
    if asked.method != "none":
        return f"{asked}, from {label}"
    kept = [f"{count} kept as {kind}" for kind, count in sorted(weights.num_rounded.items())]
    if weights.num_dequantized:
        kept.append(f"{weights.num_dequantized} dequantized to {str(weights.dtype).removeprefix('torch.')}")
    return f"{label}: {'; '.join(kept) or 'no weight'}"
