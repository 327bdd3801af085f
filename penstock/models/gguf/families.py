"""Architectures of GGUF files: their names for tensors, and how the converter changed values.

```
blk.3.attn_q.weight        model.layers.3.self_attn.q_proj.weight        llama: rows of a head interleaved
output_norm.weight         model.norm.weight                             gemma: one more than it is
blk.0.ffn_up_exps.weight   model.layers.0.mlp.experts.E.up_proj.weight   all experts in one tensor
```

**Source:** llama.cpp, gguf-py/gguf/tensor_mapping.py and convert_hf_to_gguf.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

ATTENTION: Final = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
DENSE: Final = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
HEAD_NORMS: Final = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
TWO_NORMS: Final = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
FOUR_NORMS: Final = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTER: Final = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """One `general.architecture`."""

    architecture: str
    """As `config.json` would name it."""
    inner: Mapping[str, str]
    """Names in a block."""
    outer: Mapping[str, str] = field(default_factory=lambda: OUTER)
    """Names outside of blocks."""
    block: str = "model.layers.{}."
    experts: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors of all experts; `{}` is the expert."""
    interleaved: frozenset[str] = frozenset()
    """Names of tensors whose heads' rows are interleaved for another kind of rotation."""
    norm_offset: float = 0.0
    """What the converter added to norms."""


LLAMA: Final = Family(
    architecture="LlamaForCausalLM",
    inner={**ATTENTION, **DENSE, **TWO_NORMS},
    interleaved=frozenset({"attn_q", "attn_k"}),
)
MIXTRAL: Final = Family(
    architecture="MixtralForCausalLM",
    inner={**ATTENTION, **TWO_NORMS, "ffn_gate_inp": "block_sparse_moe.gate"},
    experts={
        "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
        "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
        "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    },
    interleaved=frozenset({"attn_q", "attn_k"}),
)
FAMILIES: Final = {
    "llama": LLAMA,
    "qwen2": Family(architecture="Qwen2ForCausalLM", inner={**ATTENTION, **DENSE, **TWO_NORMS}),
    "qwen3": Family(architecture="Qwen3ForCausalLM", inner={**ATTENTION, **DENSE, **TWO_NORMS, **HEAD_NORMS}),
    "qwen3moe": Family(
        architecture="Qwen3MoeForCausalLM",
        inner={**ATTENTION, **DENSE, **TWO_NORMS, **HEAD_NORMS, "ffn_gate_inp": "mlp.gate"},
        experts={
            "ffn_gate_exps": "mlp.experts.{}.gate_proj",
            "ffn_up_exps": "mlp.experts.{}.up_proj",
            "ffn_down_exps": "mlp.experts.{}.down_proj",
        },
    ),
    "gemma2": Family(
        architecture="Gemma2ForCausalLM", inner={**ATTENTION, **DENSE, **FOUR_NORMS}, norm_offset=1.0
    ),
    "gemma3": Family(
        architecture="Gemma3ForCausalLM",
        inner={**ATTENTION, **DENSE, **FOUR_NORMS, **HEAD_NORMS},
        norm_offset=1.0,
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        inner={
            **TWO_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "gpt2": Family(
        architecture="GPT2LMHeadModel",
        block="transformer.h.{}.",
        outer={
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        inner={
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
    ),
}
"""By `general.architecture`; a `llama` with experts is `MIXTRAL`."""
