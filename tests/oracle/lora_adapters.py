"""PEFT adapters with random weights on the tiny checkpoints, made and merged by `peft`."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

LINEARS: dict[str, tuple[str, ...]] = {
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "gpt2": ("c_attn", "c_proj", "c_fc"),
    "mixtral": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "qwen3_moe": ("q_proj", "k_proj", "v_proj", "o_proj"),
}
"""Modules of a family on which adapters may act; where it is not listed, those of Llama."""
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """What of an adapter a test chooses."""

    seed: int
    rank: int = 4
    alpha: float = 8.0
    targets: tuple[str, ...] = LLAMA_LINEARS
    rslora: bool = False
    options: tuple[tuple[str, Any], ...] = ()
    """More fields of `LoraConfig`."""


@contextmanager
def _peft_may_warn() -> Iterator[None]:
    """peft calls what transformers is about to drop; that is between those two."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def load_base(path: Path) -> Any:
    """The checkpoint as transformers reads it, float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")


def adapted(base: Path, spec: AdapterSpec) -> Any:
    """A peft model over the checkpoint, both matrices random: as made, B is zero and nothing would change."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # peft divides it: any number will do
        target_modules=list(spec.targets),
        use_rslora=spec.rslora,
        task_type="CAUSAL_LM",
        **dict(spec.options),
    )
    with _peft_may_warn():
        model = get_peft_model(load_base(base), config)
    generator = torch.Generator().manual_seed(spec.seed)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def save_adapter(base: Path, folder: Path, spec: AdapterSpec) -> Path:
    """Write the adapter's folder as peft does."""
    model = adapted(base, spec)
    with _peft_may_warn():
        model.save_pretrained(folder)
    return folder


def merged(base: Path, spec: AdapterSpec) -> Any:
    """The base model with the adapter's product added to its weights."""
    return adapted(base, spec).merge_and_unload().eval()


def greedy(model: Any, prompt: Sequence[int], *, num_tokens: int) -> list[int]:
    """What a transformers model answers at temperature 0."""
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(num_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]
