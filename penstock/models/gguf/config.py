"""The `config.json` that a GGUF file's metadata stands for, as the architecture files read it.

Keys begin with the architecture's name, e.g. `llama.block_count`. What changes the arithmetic and is not read
here is refused by name.

**Source:** llama.cpp, src/llama-model.cpp (`load_hparams`).
"""

from dataclasses import replace
from typing import Any, Final

from penstock.core.errors import UnsupportedModelError
from penstock.models.config import ConfigReader
from penstock.models.gguf.families import FAMILIES, LLAMA, MIXTRAL, Family
from penstock.text.gguf.header import GgufFile, Metadata

Json = dict[str, Any]  # fields of config.json

GEMMA2_27B_LAYERS: Final = 46
GEMMA3_27B_LAYERS: Final = 62
ROPE_FACTORS: Final = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
"""Divisors of frequencies, kept as tensors."""
WINDOW: Final = "{}.attention.sliding_window"
WINDOWED: Final = ("llama", "gemma2", "gemma3", "phi3")
"""Families whose window is read."""
SCALINGS: Final = ("none", "linear", "yarn", "longrope")


class _Keys:
    """Entries under the architecture's name."""

    def __init__(self, metadata: Metadata, prefix: str) -> None:
        self.metadata = metadata
        self._prefix = prefix

    def name(self, key: str) -> str:
        return f"{self._prefix}.{key}"

    def has(self, key: str) -> bool:
        return self.name(key) in self.metadata

    def integer(self, key: str, default: int | None = None, *, low: int = 1) -> int:
        return self.metadata.integer(self.name(key), default, low=low)

    def number(self, key: str, default: float | None = None) -> float:
        return self.metadata.number(self.name(key), default, low=1e-12)


def find_family(metadata: Metadata) -> tuple[str, Family]:
    """The file's architecture and what is known of it.

    Raises:
        UnsupportedModelError: it is not known; lists what is.
    """
    name = metadata.supported("general.architecture", tuple(FAMILIES), "")
    if name == "llama" and metadata.integer("llama.expert_count", 0, low=0) > 0:
        return name, MIXTRAL
    if name == "llama" and metadata.integer(WINDOW.format(name), 0, low=0) > 0:
        return name, replace(LLAMA, architecture="MistralForCausalLM")
    return name, FAMILIES[name]


def _kv_heads(keys: _Keys, num_heads: int) -> int:
    if not keys.has("attention.head_count_kv"):
        return num_heads
    return keys.integer("attention.head_count_kv")


def _rope(keys: _Keys, *, context: int) -> Json:
    theta = keys.number("rope.freq_base", 10_000.0)
    kind = keys.metadata.supported(keys.name("rope.scaling.type"), SCALINGS, "none")
    fields: Json = {"rope_theta": theta}
    if kind in {"linear", "yarn"}:
        fields["rope_scaling"] = {"rope_type": kind, "factor": keys.number("rope.scaling.factor")}
        if kind == "yarn":
            original = keys.integer("rope.scaling.original_context_length", context)
            fields["rope_scaling"]["original_max_position_embeddings"] = original
    return fields


def _common(file: GgufFile, keys: _Keys, family: Family) -> Json:
    heads = keys.integer("attention.head_count")
    hidden, context = keys.integer("embedding_length"), keys.integer("context_length")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    if keys.integer("attention.value_length", head_dim) != head_dim:
        raise keys.metadata.wrong(keys.name("attention.value_length"), f"attention.key_length ({head_dim})")
    rotary = keys.integer("rope.dimension_count", head_dim)
    return {
        "architectures": [family.architecture],
        "hidden_size": hidden,
        "intermediate_size": keys.integer("feed_forward_length", 1),
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": _kv_heads(keys, heads),
        "head_dim": head_dim,
        "partial_rotary_factor": rotary / head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon", 1e-6),
        "attention_bias": "blk.0.attn_output.bias" in file.tensors or "blk.0.attn_q.bias" in file.tensors,
        **_rope(keys, context=context),
    }


def _experts(keys: _Keys, count: str) -> Json:
    return {count: keys.integer("expert_count"), "num_experts_per_tok": keys.integer("expert_used_count")}


def _gemma(keys: _Keys, common: Json, *, large: int) -> Json:
    heads, hidden = common["num_attention_heads"], common["hidden_size"]
    is_large = common["num_hidden_layers"] == large
    fields: Json = {"query_pre_attn_scalar": hidden // heads if is_large else common["head_dim"]}
    if keys.has("attention.sliding_window"):
        fields["sliding_window"] = keys.integer("attention.sliding_window")
    return fields


def _gemma2(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del file
    caps = {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    }
    found = {name: keys.number(key) for name, key in caps.items() if keys.has(key)}
    return {**_gemma(keys, common, large=GEMMA2_27B_LAYERS), **found}


def _gemma3(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del file
    local = {"rope_local_base_freq": keys.number("rope.freq_base_swa", 10_000.0)}
    return {**_gemma(keys, common, large=GEMMA3_27B_LAYERS), **local}


def _gpt2(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del file
    return {
        "n_embd": common["hidden_size"],
        "n_head": common["num_attention_heads"],
        "n_layer": common["num_hidden_layers"],
        "n_positions": common["max_position_embeddings"],
        "n_inner": common["intermediate_size"],
        "layer_norm_epsilon": keys.number("attention.layer_norm_epsilon", 1e-5),
    }


def _llama(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del common
    experts = (
        _experts(keys, "num_local_experts")
        if keys.metadata.integer(keys.name("expert_count"), 0, low=0)
        else {}
    )
    window = keys.integer("attention.sliding_window", 0, low=0)
    return {"mlp_bias": "blk.0.ffn_up.bias" in file.tensors, "sliding_window": window or None, **experts}


def _qwen3moe(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del file, common
    inner = {"moe_intermediate_size": keys.integer("expert_feed_forward_length"), "norm_topk_prob": True}
    return {**_experts(keys, "num_experts"), **inner}


def _phi3(file: GgufFile, keys: _Keys, common: Json) -> Json:
    del file
    window = keys.integer("attention.sliding_window", 0, low=0)
    original = keys.integer("rope.scaling.original_context_length", common["max_position_embeddings"])
    fields: Json = {"original_max_position_embeddings": original}
    return {**fields, "sliding_window": window} if window else fields


EXTRA: Final = {
    "llama": _llama,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "gpt2": _gpt2,
    "phi3": _phi3,
    "qwen3moe": _qwen3moe,
}


def read_gguf_config(file: GgufFile) -> ConfigReader:
    """The fields that the architecture's `read_config` asks for, the factors of frequencies left out.

    Raises:
        CheckpointError: an entry is missing or out of range; names file, key, value and expectation.
        UnsupportedModelError: an architecture or an option that is not built here.
    """
    metadata = file.metadata
    name, family = find_family(metadata)
    keys = _Keys(metadata, name)
    if metadata.integer(keys.name("expert_shared_count"), 0, low=0):
        raise UnsupportedModelError(
            f"{metadata.source}: shared experts are not supported", param="expert_shared_count"
        )
    if name not in WINDOWED and metadata.integer(WINDOW.format(name), 0, low=0):
        raise UnsupportedModelError(
            f"{metadata.source}: metadata {WINDOW.format(name)!r} is not supported", param="sliding_window"
        )
    if not metadata.boolean(keys.name("attention.causal"), True):
        raise UnsupportedModelError(f"{metadata.source}: it is not causal", param="attention.causal")
    common = _common(file, keys, family)
    embedding = file.tensors.get("token_embd.weight")
    fields = {
        **common,
        "vocab_size": embedding.shape[0] if embedding is not None else 1,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        **(EXTRA[name](file, keys, common) if name in EXTRA else {}),
    }
    return ConfigReader(fields, source=metadata.source)
