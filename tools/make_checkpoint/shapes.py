"""Named model shapes, their `config.json` and their tensors."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

ARCHITECTURES: Final = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
NUM_SPECIALS: Final = 3
"""`<|endoftext|>`, `<|im_start|>`, `<|im_end|>`: the last three ids of the vocabulary."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a decoder."""

    architecture: str
    """A key of `ARCHITECTURES`."""
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    """At least 256 bytes and the specials."""
    max_position_embeddings: int
    """Context in tokens."""
    rope_theta: float = 10_000.0
    rope_factor: float = 1.0
    """Above 1: Llama 3's scaling by this factor, from a context of 8192 tokens."""
    tied: bool = True
    """The head uses the embedding's weight."""
    window: int = 0
    """Sliding window in tokens, for mistral; 0 for none."""

    def __post_init__(self) -> None:
        if self.architecture not in ARCHITECTURES:
            raise ValueError(
                f"architecture is {self.architecture!r}, it must be one of {', '.join(ARCHITECTURES)}"
            )
        if self.vocab_size < 256 + NUM_SPECIALS:
            raise ValueError(f"vocab_size is {self.vocab_size}, it must be at least {256 + NUM_SPECIALS}")
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError("kv_heads must divide heads, and head_dim must be even")


def _tiny(architecture: str, *, window: int = 0) -> Shape:
    return Shape(
        architecture=architecture,
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=512,
        max_position_embeddings=512,
        window=window,
    )


SHAPES: Final = {
    "qwen2.5-0.5b": Shape(
        architecture="qwen2",
        hidden_size=896,
        layers=24,
        heads=14,
        kv_heads=2,
        head_dim=64,
        intermediate_size=4864,
        vocab_size=151_936,
        max_position_embeddings=32_768,
        rope_theta=1e6,
    ),
    "llama-3.2-1b": Shape(
        architecture="llama",
        hidden_size=2048,
        layers=16,
        heads=32,
        kv_heads=8,
        head_dim=64,
        intermediate_size=8192,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_theta=5e5,
        rope_factor=32.0,
    ),
    "llama-3.1-8b": Shape(
        architecture="llama",
        hidden_size=4096,
        layers=32,
        heads=32,
        kv_heads=8,
        head_dim=128,
        intermediate_size=14_336,
        vocab_size=128_256,
        max_position_embeddings=131_072,
        rope_theta=5e5,
        rope_factor=8.0,
        tied=False,
    ),
    "tiny-llama": _tiny("llama"),
    "tiny-mistral": _tiny("mistral", window=32),
    "tiny-qwen2": _tiny("qwen2"),
    "tiny-qwen3": _tiny("qwen3"),
}
"""By the name that the command takes."""


def config_json(shape: Shape, *, dtype: str) -> dict[str, object]:
    """The `config.json` of a shape."""
    end = shape.vocab_size - 1
    config: dict[str, object] = {
        "architectures": [ARCHITECTURES[shape.architecture]],
        "model_type": shape.architecture,
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocab_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": shape.rope_theta,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "tie_word_embeddings": shape.tied,
        "torch_dtype": dtype,
        "bos_token_id": end - 2,
        "eos_token_id": end,
    }
    if shape.rope_factor > 1:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": shape.rope_factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if shape.architecture == "mistral":
        config["sliding_window"] = shape.window or None
    return config


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """One tensor to be made."""

    name: str
    shape: tuple[int, ...]
    mean: float = 0.0
    std: float = 0.0

    @property
    def num_elements(self) -> int:
        """Product of the dimensions."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def _attention(shape: Shape, prefix: str, depth_scale: float) -> Iterator[TensorPlan]:
    query, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for name, size in (("q_proj", query), ("k_proj", kv), ("v_proj", kv)):
        yield TensorPlan(
            name=f"{prefix}.{name}.weight", shape=(size, shape.hidden_size), std=shape.hidden_size**-0.5
        )
        if shape.architecture == "qwen2":
            yield TensorPlan(name=f"{prefix}.{name}.bias", shape=(size,), std=0.02)
    std = query**-0.5 * depth_scale
    yield TensorPlan(name=f"{prefix}.o_proj.weight", shape=(shape.hidden_size, query), std=std)
    if shape.architecture == "qwen3":
        for name in ("q_norm", "k_norm"):
            yield TensorPlan(name=f"{prefix}.{name}.weight", shape=(shape.head_dim,), mean=1.0)


def _block(shape: Shape, prefix: str, depth_scale: float) -> Iterator[TensorPlan]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    yield TensorPlan(name=f"{prefix}.input_layernorm.weight", shape=(hidden,), mean=1.0)
    yield from _attention(shape, f"{prefix}.self_attn", depth_scale)
    yield TensorPlan(name=f"{prefix}.post_attention_layernorm.weight", shape=(hidden,), mean=1.0)
    for name in ("gate_proj", "up_proj"):
        yield TensorPlan(name=f"{prefix}.mlp.{name}.weight", shape=(inner, hidden), std=hidden**-0.5)
    std = inner**-0.5 * depth_scale
    yield TensorPlan(name=f"{prefix}.mlp.down_proj.weight", shape=(hidden, inner), std=std)


def tensor_plans(shape: Shape) -> Iterator[TensorPlan]:
    """All tensors of a shape, in file order.

    Matrices keep the variance of what flows through them and what is added to the stream shrinks with
    depth, so that logits have a spread of about 1 in any dtype.
    """
    table = (shape.vocab_size, shape.hidden_size)
    yield TensorPlan(name="model.embed_tokens.weight", shape=table, std=shape.hidden_size**-0.5)
    for layer in range(shape.layers):
        yield from _block(shape, f"model.layers.{layer}", (2 * shape.layers) ** -0.5)
    yield TensorPlan(name="model.norm.weight", shape=(shape.hidden_size,), mean=1.0)
    if not shape.tied:
        yield TensorPlan(name="lm_head.weight", shape=table, std=shape.hidden_size**-0.5)
