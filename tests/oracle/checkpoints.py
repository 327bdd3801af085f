"""Tiny random checkpoints of every family, made by `transformers` and saved as float32 safetensors.

`tiny_checkpoint(family, path)` serves the logits tests here and the whole-engine tests elsewhere. Sizes
are small and awkward on purpose: grouped heads, a head size that is not hidden / heads, windows shorter
than the sequences.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0],
}
Make = Callable[[int], Any]  # vocab_size -> a transformers config, which has no useful common type


def _llama(vocab_size: int, **extra: Any) -> Any:
    return transformers.LlamaConfig(vocab_size=vocab_size, **{**SIZES, **extra})


def _qwen2(vocab_size: int, **extra: Any) -> Any:
    return transformers.Qwen2Config(vocab_size=vocab_size, **{**SIZES, **extra})


def _gemma2(vocab_size: int, **extra: Any) -> Any:
    options = {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 24}
    return transformers.Gemma2Config(vocab_size=vocab_size, **{**SIZES, **options, **extra})


def _gemma3(vocab_size: int, **extra: Any) -> Any:
    options = {"head_dim": 16, "num_hidden_layers": 4, "sliding_window": 6, "query_pre_attn_scalar": 24}
    options["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"]
    return transformers.Gemma3TextConfig(vocab_size=vocab_size, **{**SIZES, **options, **extra})


def _phi3(vocab_size: int, **extra: Any) -> Any:
    return transformers.Phi3Config(vocab_size=vocab_size, **{**SIZES, **extra})


def _gpt2(vocab_size: int, **extra: Any) -> Any:
    sizes = {
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return transformers.GPT2Config(vocab_size=vocab_size, **{**sizes, **extra})


def _qwen3_moe(vocab_size: int, **extra: Any) -> Any:
    options = {"head_dim": 16, "num_hidden_layers": 3, "num_experts": 5, "num_experts_per_tok": 2}
    options |= {"moe_intermediate_size": 24, "mlp_only_layers": [1]}
    return transformers.Qwen3MoeConfig(vocab_size=vocab_size, **{**SIZES, **options, **extra})


FAMILIES: dict[str, Make] = {
    "llama": lambda v: _llama(v, head_dim=16, rope_parameters=LLAMA3),
    "mistral": lambda v: transformers.MistralConfig(vocab_size=v, **SIZES, head_dim=16, sliding_window=6),
    "qwen2": lambda v: _qwen2(v, tie_word_embeddings=True),
    "qwen3": lambda v: transformers.Qwen3Config(vocab_size=v, **SIZES, head_dim=16),
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": lambda v: _phi3(v, sliding_window=6),
    "gpt2": _gpt2,
    "mixtral": lambda v: transformers.MixtralConfig(
        vocab_size=v, **SIZES, num_local_experts=4, num_experts_per_tok=2
    ),
    "qwen3_moe": lambda v: _qwen3_moe(v, norm_topk_prob=True),
}
"""One of each family, by its name."""

VARIANTS: dict[str, Make] = {
    "llama-plain-rope-tied": lambda v: _llama(v, tie_word_embeddings=True),
    "llama-one-kv-head": lambda v: _llama(v, num_key_value_heads=1),
    "llama-all-biases": lambda v: _llama(v, attention_bias=True, mlp_bias=True),
    "llama-linear-rope": lambda v: _llama(
        v, rope_parameters={"rope_type": "linear", "factor": 2.5, "rope_theta": 1e3}
    ),
    "llama-dynamic-rope": lambda v: _llama(
        v, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e3}
    ),
    "llama-yarn-rope": lambda v: _llama(v, rope_parameters=YARN),
    "mistral-no-window": lambda v: transformers.MistralConfig(vocab_size=v, **SIZES, sliding_window=None),
    "qwen2-upper-layers-slide": lambda v: _qwen2(
        v, use_sliding_window=True, sliding_window=6, max_window_layers=1
    ),
    "qwen3-biases-tied": lambda v: transformers.Qwen3Config(
        vocab_size=v, **SIZES, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
    "gemma2-no-caps": lambda v: _gemma2(v, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3-linear-rope-on-full": lambda v: _gemma3(
        v,
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "phi3-longrope-long": lambda v: _phi3(
        v, rope_parameters=dict(LONGROPE), original_max_position_embeddings=8
    ),
    "phi3-longrope-short": lambda v: _phi3(
        v, rope_parameters=dict(LONGROPE), original_max_position_embeddings=64
    ),
    "phi3-partial-rope": lambda v: _phi3(
        v, rope_parameters={"rope_type": "default", "rope_theta": 1e3, "partial_rotary_factor": 0.5}
    ),
    "gpt2-scaled-by-layer": lambda v: _gpt2(v, scale_attn_by_inverse_layer_idx=True, n_inner=40),
    "mixtral-window": lambda v: transformers.MixtralConfig(
        vocab_size=v, **SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=6
    ),
    "qwen3_moe-raw-probabilities": lambda v: _qwen3_moe(
        v, norm_topk_prob=False, decoder_sparse_step=2, mlp_only_layers=[]
    ),
}
"""Options that change the arithmetic, by what they are."""


def randomise(model: torch.nn.Module, *, seed: int) -> None:
    """Fill with values under which every weight, bias and norm matters and logits are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2
        offset = parameter.data if parameter.dim() == 1 else 0.0
        parameter.data = offset + noise * scale


def tiny_model(  # transformers has no common type
    family: str, *, vocab_size: int = 97, seed: int = 0, head_dim: int | None = None, **sizes: Any
) -> Any:
    """The `transformers` model itself, float32, with its own plain attention; other sizes if given."""
    config = {**FAMILIES, **VARIANTS}[family](vocab_size)
    for name, value in sizes.items():
        setattr(config, name, value)
    if head_dim is not None and family.startswith("gpt2"):
        config.n_embd = head_dim * config.n_head
    elif head_dim is not None:
        config.head_dim = head_dim
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed=seed)
    model.tie_weights()
    return model


def tiny_checkpoint(family: str, path: Path, *, vocab_size: int = 97, seed: int = 0) -> Path:
    """Save a tiny random checkpoint.

    Args:
        family: a key of `FAMILIES` or `VARIANTS`.
        path: folder to write; made if missing.
        vocab_size: ids 0 to 2 are padding, beginning and end.
        seed: of the weights.

    Returns:
        `path`, with `config.json`, `generation_config.json` and `model.safetensors`.
    """
    tiny_model(family, vocab_size=vocab_size, seed=seed).save_pretrained(path)
    return path
