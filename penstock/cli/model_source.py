"""Where a model's files are: the embedded one, a folder, or the hub's cache, with a revision for all of them.

Files are only looked at, never run. Called at start, before any process is made, so that a wrong name
or a half-copied folder is told at once.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError, StartupError
from penstock.core.ids import ModelName
from penstock.engine.config import SpeculativeConfig, read_speculative
from penstock.models.embedded_model import EMBEDDED_MODEL_NAME, embedded_draft_path, embedded_path
from penstock.models.gguf.families import FAMILIES
from penstock.models.hub import resolve_model
from penstock.models.registry import check_architecture
from penstock.text.gguf.header import is_gguf, read_header

MAX_SAFETENSORS_HEADER_BYTES: Final = 100_000_000
EMBEDDED_DRAFT_NAME: Final = "embedded"


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A checkpoint on disk."""

    path: Path
    """Folder with config, tokenizer and weights, or a GGUF file, which holds all three."""
    name: ModelName
    """What clients write in `model`."""
    root: str
    """Hub id or folder name, for the model's card; never an absolute path."""
    revision: str
    """Commit of the hub, or a digest of the folder; part of the prefix key."""


def find_model(
    model: str | None, *, revision: str | None = None, on_progress: Callable[[int, int], None] | None = None
) -> ModelSource:
    """The checkpoint that `model` names.

    Args:
        model: a folder, a `.gguf` file, a hub id (`owner/name`), the embedded model's name, or None for that.
        revision: branch, tag or commit; hub ids only.
        on_progress: told of bytes (done, in all) while the hub is asked.

    Raises:
        CheckpointError: its files are incomplete.
        StartupError: there is no such model, or `revision` is given with a folder.
    """
    if model is None or model == EMBEDDED_MODEL_NAME:
        if revision is not None:
            raise StartupError(
                f"revision is {revision!r:.200}, but the embedded model has none", param="revision"
            )
        path = resolve_model(str(embedded_path()), None, on_progress)
        name, commit = EMBEDDED_MODEL_NAME, folder_revision(path)
    elif is_gguf(Path(model).expanduser()):
        return find_gguf(Path(model).expanduser(), revision=revision)
    elif Path(model).expanduser().is_dir():
        path = resolve_model(model, revision, on_progress)
        name, commit = path.resolve().name, folder_revision(path)
    else:
        path = resolve_model(model, revision, on_progress)
        name, commit = model, path.name  # the hub's cache names a snapshot by its commit
    check_folder(path, name=name)
    return ModelSource(path=path, name=ModelName(name), root=name, revision=commit)


def find_gguf(path: Path, *, revision: str | None = None) -> ModelSource:
    """A GGUF file as a model; its header is checked against its size here, before a process is started.

    Raises:
        CheckpointError: it is damaged.
        UnsupportedModelError: its architecture, or a type of its tensors, is not known.
        StartupError: a `revision` is given.
    """
    if revision is not None:
        raise StartupError(f"revision is {revision!r}, but {path.name!r} is a local file", param="revision")
    read_header(path).metadata.supported("general.architecture", tuple(FAMILIES), "")
    status = path.stat()
    digest = hashlib.blake2b(f"{path.name}:{status.st_size}:{status.st_mtime_ns}".encode(), digest_size=16)
    return ModelSource(path=path, name=ModelName(path.stem), root=path.name, revision=digest.hexdigest())


def find_draft(
    given: Mapping[str, object] | None, *, on_progress: Callable[[int, int], None] | None = None
) -> SpeculativeConfig | None:
    """What `speculative_config` says, with the draft model's folder in place of its name.

    Args:
        given: the mapping; its `model` is as for `find_model`, or `embedded` for the embedded model's draft.
        on_progress: as for `find_model`.

    Raises:
        StartupError: a key is wrong, or there is no such model.
    """
    config = read_speculative(given)
    if config is None or not config.model:
        return config
    if config.model in {EMBEDDED_DRAFT_NAME, EMBEDDED_MODEL_NAME}:
        path = embedded_draft_path()
    else:
        path = find_model(config.model, on_progress=on_progress).path
    return msgspec.structs.replace(config, model=str(path))


def folder_revision(folder: Path) -> str:
    """Digest of a folder's files: small ones by content, weights by size and time of change."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.suffix in {".json", ".jinja", ".safetensors", ".model"}:
            digest.update(f"{path.name}:{path.stat().st_size}:".encode())
            if path.suffix == ".safetensors":
                digest.update(str(path.stat().st_mtime_ns).encode())
            else:
                digest.update(path.read_bytes())
    return digest.hexdigest()


def check_folder(folder: Path, *, name: str) -> None:
    """Look at what is cheap to see, before a process is started for the folder.

    Args:
        folder: the checkpoint.
        name: how messages call it.

    Raises:
        CheckpointError: a file is missing, is not JSON, or is shorter than its own header says.
        UnsupportedModelError: the architecture is not known; the message lists what is.
    """
    for required in ("config.json", "tokenizer.json"):
        if not (folder / required).is_file():
            raise CheckpointError(f"model {name!r}: {required} is missing")
    for architecture in _architectures(_read_json(folder / "config.json", name=name)):
        check_architecture(architecture)
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise CheckpointError(f"model {name!r}: there is no *.safetensors file")
    for path in weights:
        _check_safetensors(path, name=name)


def _read_json(path: Path, *, name: str) -> dict[str, object]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, object])
    except (msgspec.MsgspecError, RecursionError, OSError) as error:
        raise CheckpointError(f"model {name!r}: {path.name} cannot be read: {error}") from error


def _architectures(config: dict[str, object]) -> list[str]:
    """What the config says it is, if it says so properly; the loader judges the rest."""
    names = config.get("architectures")
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []


class _TensorEntry(msgspec.Struct):
    data_offsets: tuple[int, int]


def _check_safetensors(path: Path, *, name: str) -> None:
    """Compare the file's length with what its header promises."""
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= min(size - 8, MAX_SAFETENSORS_HEADER_BYTES):
            raise CheckpointError(f"model {name!r}: {path.name} is truncated or no safetensors file")
        header = file.read(header_bytes)
    try:
        entries = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        ends = [
            msgspec.json.decode(raw, type=_TensorEntry).data_offsets[1]
            for key, raw in entries.items()
            if key != "__metadata__"
        ]
    except (msgspec.MsgspecError, RecursionError) as error:
        raise CheckpointError(f"model {name!r}: the header of {path.name} is broken: {error}") from error
    expected = 8 + header_bytes + max(ends, default=0)
    if size < expected:
        raise CheckpointError(f"model {name!r}: {path.name} has {size} bytes, its header says {expected}")
