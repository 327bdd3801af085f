"""The forms of one checkpoint that peers read: compressed-tensors for vLLM, GGUF, OpenVINO's.

Each is made once and kept in a folder named by the checkpoint and its content; a form half made is not kept.
Weights are rounded to nearest, so that every engine computes with numbers of the same width from the same
source. Called by `peers`.

Layout of 4-bit weights in compressed-tensors, eight to a word, the first in the lowest bits:

    word = (q0 + 8) | (q1 + 8) << 4 | ... | (q7 + 8) << 28        q in [-8, 7]
"""

import hashlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from penstock.bench.compare.server_process import log_tail
from penstock.bench.target import TargetError

if TYPE_CHECKING:
    from torch import Tensor

CtScheme = Literal["w8a8", "w4a16"]
GROUP_SIZE: Final = 128
LINEAR: Final = re.compile(r"layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.\w+_proj)\.weight$")
CONVERT_TIMEOUT_S: Final = 1800.0


def form_path(model: Path, *, form: str, folder: Path) -> Path:
    """Where the form of this checkpoint is or will be: name, content and form are in it."""
    digest = hashlib.blake2b(digest_size=4)
    for path in [model / "config.json", *sorted(model.glob("*.safetensors"))]:
        stat = path.stat()
        digest.update(f"{path.name}:{stat.st_size}:{stat.st_mtime_ns}".encode())
    return folder / f"{model.resolve().name}-{digest.hexdigest()}-{form}"


def make_once(path: Path, make: Callable[[Path], None]) -> Path:
    """Return `path`, made by `make` under another name first if it is not there."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"part-{path.name}")
    _remove(part)
    try:
        make(part)
        part.rename(path)
    finally:
        _remove(part)
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# -- compressed-tensors --------------------------------------------------------------------------------------


def write_compressed_tensors(model: Path, target: Path, *, scheme: CtScheme) -> None:
    """Quantize the linear layers of a checkpoint; embedding and head stay as they are, as vLLM's recipes do.

    `w8a8`: int8 per output channel, activations quantized as they come; `w4a16`: int4 in groups of 128.
    """
    from safetensors.torch import save_file

    target.mkdir()
    tensors = dict(_quantized(model, scheme=scheme))
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for path in model.glob("*.json"):
        if path.name != "config.json" and "index" not in path.name:
            shutil.copy(path, target / path.name)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = _quantization_config(scheme)
    (target / "config.json").write_text(json.dumps(config, indent=1))


def _quantized(model: Path, *, scheme: CtScheme) -> Iterator[tuple[str, "Tensor"]]:
    from safetensors import safe_open

    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                if LINEAR.search(name):
                    yield from _linear(name.removesuffix("weight"), tensor, scheme=scheme)
                else:
                    yield name, tensor.contiguous()


def _linear(prefix: str, weight: "Tensor", *, scheme: CtScheme) -> Iterator[tuple[str, "Tensor"]]:
    import torch

    # Letters: O output features, I input features, G groups of a row.
    if scheme == "w8a8":
        scale_O1 = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-8) / 127
        yield f"{prefix}weight", (weight.float() / scale_O1).round().clamp(-127, 127).to(torch.int8)
        yield f"{prefix}weight_scale", scale_O1.to(torch.bfloat16)
        return
    rows_OGg = weight.float().view(weight.shape[0], -1, GROUP_SIZE)
    scale_OG1 = rows_OGg.abs().amax(2, keepdim=True).clamp_min(1e-8) / 7
    quantized_OI = (rows_OGg / scale_OG1).round().clamp(-8, 7).view(weight.shape)
    yield f"{prefix}weight_packed", pack_int4(quantized_OI)
    yield f"{prefix}weight_scale", scale_OG1.squeeze(2).to(torch.bfloat16)
    yield f"{prefix}weight_shape", torch.tensor(weight.shape, dtype=torch.int64)


def pack_int4(values: "Tensor") -> "Tensor":
    """[O, I] of whole numbers in [-8, 7] to [O, I / 8] int32, as drawn in the module."""
    import torch

    nibbles = (values.to(torch.int64) + 8).view(values.shape[0], -1, 8)
    words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _quantization_config(scheme: CtScheme) -> dict[str, object]:
    is_int8 = scheme == "w8a8"
    weights = {
        "num_bits": 8 if is_int8 else 4,
        "type": "int",
        "symmetric": True,
        "dynamic": False,
        "strategy": "channel" if is_int8 else "group",
        "group_size": None if is_int8 else GROUP_SIZE,
        "observer": "minmax",
    }
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized" if is_int8 else "pack-quantized",
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs if is_int8 else None,
                "output_activations": None,
            }
        },
    }


# -- converters of the peers ---------------------------------------------------------------------------------


def run_converter(command: list[str], *, log_path: Path, env: dict[str, str] | None = None) -> None:
    """Run a peer's own converter.

    Raises:
        TargetError: it failed; the message has its last line.
    """
    with log_path.open("wb") as log:
        try:
            done = subprocess.run(  # noqa: S603 - a command that `peers` made
                command, stdout=log, stderr=log, timeout=CONVERT_TIMEOUT_S, check=False, env=env
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise TargetError(f"{Path(command[0]).name} cannot convert the checkpoint: {error}") from error
    if done.returncode:
        raise TargetError(f"{Path(command[0]).name} cannot convert the checkpoint: {log_tail(log_path)}")
