"""A small PEFT folder, and the sites of the model that it is for; tests break one thing at a time."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from penstock.kernels.adapters import LoraSites

RANK = 2
SIZES = {"q_proj": (8, 8), "v_proj": (8, 4)}
"""(inputs, outputs)"""
LAYERS = 2
CONFIG: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": 4,
    "target_modules": ["q_proj", "v_proj"],
    "bias": "none",
    "modules_to_save": None,
    "use_dora": False,
}


def make_sites() -> LoraSites:
    """Those of a model of two layers."""
    sites = LoraSites()
    for layer in range(LAYERS):
        for name, (in_features, out_features) in SIZES.items():
            sites.add(
                f"model.layers.{layer}.self_attn.{name}", in_features=in_features, out_features=out_features
            )
    return sites


def make_tensors(*, seed: int = 0, rank: int = RANK) -> dict[str, torch.Tensor]:
    """Both matrices of every site."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for site in make_sites().sites:
        name = f"base_model.model.{site.name}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(rank, site.in_features, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(site.out_features, rank, generator=generator)
    return tensors


def write_folder(
    folder: Path, *, config: dict[str, Any] | None = None, tensors: dict[str, torch.Tensor] | None = None
) -> Path:
    """Write both files; `config` changes fields of `CONFIG`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    save_file(make_tensors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder
