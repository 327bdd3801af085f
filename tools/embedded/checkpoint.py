"""Reads and writes the training checkpoint: one safetensors file, counters in its metadata.

Weights are named `weight:<parameter>`, optimizer state `state:<parameter>:<name>`; so nothing in
the file carries code and any reader of safetensors can open it.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tools.embedded.model import LanguageModel

Optimizers = list[torch.optim.Optimizer]


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A checkpoint in memory, on the CPU."""

    weights: dict[str, Tensor]
    states: dict[str, dict[str, Tensor]]  # parameter -> name -> value
    progress: dict[str, Any]  # Any: JSON values
    config: dict[str, Any]  # Any: JSON values


def _named_states(model: LanguageModel, optimizers: Optimizers) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Each parameter's name with its optimizer's (mutable) state."""
    for name, parameter in model.named_parameters():
        for optimizer in optimizers:
            if parameter in optimizer.state:
                yield name, optimizer.state[parameter]


def write(path: Path, *, model: LanguageModel, optimizers: Optimizers, progress: dict[str, Any]) -> None:
    """Write the checkpoint; a reader never sees half of one. Any: JSON values."""
    tensors = {f"weight:{name}": weight.detach() for name, weight in model.named_parameters()}
    for name, state in _named_states(model, optimizers):
        tensors |= {f"state:{name}:{key}": value for key, value in state.items()}
    metadata = {"progress": json.dumps(progress), "config": json.dumps(model.config.to_dict())}
    partial = path.with_suffix(".partial")
    save_file({name: value.contiguous() for name, value in tensors.items()}, partial, metadata)
    partial.replace(path)


def read(path: Path) -> Saved:
    """Read a checkpoint."""
    weights: dict[str, Tensor] = {}
    states: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        for full_name in file.keys():  # noqa: SIM118  # the file is no mapping
            group, name, *key = full_name.split(":")
            if group == "weight":
                weights[name] = file.get_tensor(full_name)
            else:
                states.setdefault(name, {})[key[0]] = file.get_tensor(full_name)
    return Saved(
        weights=weights,
        states=states,
        progress=json.loads(metadata["progress"]),
        config=json.loads(metadata["config"]),
    )


def restore(saved: Saved, *, model: LanguageModel, optimizers: Optimizers) -> None:
    """Copy a checkpoint into a fresh model and its optimizers, in place."""
    model.load_state_dict(saved.weights)
    for name, parameter in model.named_parameters():
        owner = next(o for o in optimizers if any(parameter is p for p in _parameters(o)))
        if name in saved.states:
            values = saved.states[name].items()
            owner.state[parameter] = {
                key: value if value.ndim == 0 else value.to(parameter.device) for key, value in values
            }


def _parameters(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimizer.param_groups:
        yield from group["params"]
