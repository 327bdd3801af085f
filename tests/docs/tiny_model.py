"""A random checkpoint of a few kilobytes with one token for each printable ASCII character."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
"""Modules that the tiny adapter changes."""
RANK = 2
SPECIALS = ("<pad>", "<s>", "</s>")
CHARACTERS = [chr(code) for code in range(0x20, 0x7F)]
VOCAB_SIZE = len(SPECIALS) + len(CHARACTERS)
EOS_IDS = [2, *range(3, VOCAB_SIZE, 8)]
"""A good part of the vocabulary ends an answer, so that short answers meet it."""
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP = 32, 2, 4, 2, 8, 48
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if tools %}<tool_call>{% endif %}assistant: {% if enable_thinking %}<think>{% endif %}"
)


def _shapes(head_dim: int, mlp: int = MLP) -> dict[str, tuple[int, int]]:
    return {
        "self_attn.q_proj": (HEADS * head_dim, HIDDEN),
        "self_attn.k_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.v_proj": (KV_HEADS * head_dim, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * head_dim),
        "mlp.gate_proj": (mlp, HIDDEN),
        "mlp.up_proj": (mlp, HIDDEN),
        "mlp.down_proj": (HIDDEN, mlp),
    }


def _weights(*, seed: int, head_dim: int, mlp: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.3) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * scale

    weights = {
        "model.embed_tokens.weight": normal(VOCAB_SIZE, HIDDEN, scale=1.0),
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": normal(VOCAB_SIZE, HIDDEN),
    }
    shapes = _shapes(head_dim, mlp)
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"model.layers.{layer}.{name}.weight"] = normal(*shape)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"model.layers.{layer}.{name}.weight"] = torch.ones(HIDDEN)
    return weights


def _tokenizer() -> Tokenizer:
    vocab = {text: index for index, text in enumerate([*SPECIALS, *CHARACTERS])}
    spelled = {("\u0120" if text == " " else text): index for text, index in vocab.items()}
    tokenizer = Tokenizer(models.BPE(vocab=spelled, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in SPECIALS])
    return tokenizer


def make_tiny_model(
    folder: Path, *, window: int | None = None, head_dim: int = HEAD_DIM, mlp: int = MLP, seed: int = 5
) -> Path:
    """Write the checkpoint; with a window it calls itself Mistral."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "model_type": "mistral" if window else "llama",
        "hidden_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": head_dim,
        "intermediate_size": mlp,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": EOS_IDS,
        **({"sliding_window": window} if window else {}),
    }
    settings = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "chat_template": CHAT_TEMPLATE}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS_IDS}))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    _tokenizer().save(str(folder / "tokenizer.json"))
    save_file(_weights(seed=seed, head_dim=head_dim, mlp=mlp), folder / "model.safetensors")
    return folder


def make_tiny_adapter(folder: Path, *, head_dim: int = HEAD_DIM, mlp: int = MLP, seed: int = 7) -> Path:
    """Write a LoRA adapter of the checkpoint, in the form of PEFT; it changes what is said."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(LAYERS):
        for name in ADAPTED:
            rows, cols = _shapes(head_dim, mlp)[name]
            key = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, cols, generator=generator) * 0.3
            tensors[f"{key}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.3
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": 2 * RANK,
        "target_modules": [name.rpartition(".")[2] for name in ADAPTED],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder
