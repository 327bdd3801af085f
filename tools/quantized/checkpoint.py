"""From a checkpoint folder to one in a quantized format; every linear layer but the head is quantized."""

import json
import re
import shutil
from pathlib import Path
from typing import Final

from safetensors.torch import load_file, save_file
from torch import Tensor

from tools.quantized.forms import FORMS
from tools.quantized.writers import Form

NOT_QUANTIZED: Final = re.compile(
    r"(^|\.)(embed_tokens|lm_head|wte|wpe|gate|[a-z_0-9]*norm[a-z_0-9]*|ln_[12f])\.weight$"
)
"""Embeddings, the head, routers and norms."""
TRANSPOSED: Final = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
"""GPT-2 keeps these as [in, out]; quantized formats do not."""
COMPANIONS: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)


def is_quantized(name: str, tensor: Tensor) -> bool:
    """True for the weights of linear layers."""
    return name.endswith(".weight") and tensor.dim() == 2 and not NOT_QUANTIZED.search(name)


def quantize_tensors(tensors: dict[str, Tensor], form: Form) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """All tensors of a checkpoint in a form.

    Returns:
        What the quantized files hold, and a plain checkpoint of what they stand for in float32.
    """
    stored: dict[str, Tensor] = {}
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if not is_quantized(name, tensor):
            stored[name], plain[name] = tensor, tensor.float()
            continue
        is_transposed = TRANSPOSED.search(name) is not None
        written = form.write((tensor.t() if is_transposed else tensor).float())
        stored |= {name.removesuffix(".weight") + suffix: each for suffix, each in written.tensors.items()}
        plain[name] = (written.stands_for.t() if is_transposed else written.stands_for).contiguous()
    return stored, plain


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def _write_folder(source: Path, target: Path, tensors: dict[str, Tensor], fields: dict[str, object]) -> Path:
    target.mkdir(parents=True, exist_ok=True)
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | fields, indent=1))
    for name in COMPANIONS:
        if (source / name).exists():
            shutil.copy(source / name, target / name)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, target / "model.safetensors", metadata={"format": "pt"})
    return target


def write_quantized(source: Path, target: Path, form: str) -> Path:
    """Write a checkpoint folder in a form of `FORMS`; returns it."""
    stored, _ = quantize_tensors(read_tensors(source), FORMS[form])
    return _write_folder(source, target, stored, {"quantization_config": dict(FORMS[form].section)})


def write_dequantized(source: Path, target: Path, form: str) -> Path:
    """Write the plain float32 checkpoint that a quantized one stands for; returns it."""
    _, plain = quantize_tensors(read_tensors(source), FORMS[form])
    return _write_folder(source, target, plain, {"torch_dtype": "float32"})
