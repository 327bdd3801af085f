"""Qwen 3 with experts: Qwen 3's attention, and in most blocks a router over many small experts.

Letters: T tokens, H query heads, N key/value heads, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.batch import ForwardBatch
from penstock.kernels.ops import AttentionShape, ExpertWeights, MoeShape
from penstock.layers.attention import PagedAttention
from penstock.layers.mlp import Activation, GatedMlp
from penstock.layers.moe import SparseMoe
from penstock.layers.rope import Rope, RopeAngles, RopeSpec
from penstock.models.config import ConfigReader, DecoderShape, read_decoder_shape
from penstock.models.interface import CausalLM
from penstock.models.parts import Parts
from penstock.models.rope_config import read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen3MoeConfig:
    """What `config.json` says."""

    shape: DecoderShape
    rms_norm_eps: float
    rope: RopeSpec
    attention_bias: bool
    """Biases on query, key, value and output."""
    window: int | None
    """Tokens that a token attends to, itself included; None for all before it."""
    num_experts: int
    experts_per_token: int
    expert_size: int
    """Inner size of one expert."""
    renormalize: bool
    """Make the chosen experts' probabilities sum to 1."""
    dense_layers: frozenset[int]
    """Layers with a plain MLP."""


def _dense_layers(reader: ConfigReader, *, num_layers: int) -> frozenset[int]:
    # Step 2 of 4 layers: the experts are in layers 1 and 3, the others are dense.
    step = reader.integer("decoder_sparse_step", 1)
    listed = reader.integers("mlp_only_layers")
    return frozenset(i for i in range(num_layers) if i in listed or (i + 1) % step)


def read_config(reader: ConfigReader, *, served_max_len: int | None = None) -> Qwen3MoeConfig:
    """Read a Qwen3Moe `config.json`."""
    shape = read_decoder_shape(reader)
    field = "num_local_experts" if reader.has("num_local_experts") else "num_experts"
    num_experts = reader.integer(field, 128, high=4096)
    reader.refuse("hidden_act", unless="silu")
    is_windowed = reader.boolean("use_sliding_window", False)
    return Qwen3MoeConfig(
        shape=shape,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=read_rope(reader, shape=shape, served_max_len=served_max_len),
        attention_bias=reader.boolean("attention_bias", False),
        window=reader.optional_integer("sliding_window") if is_windowed else None,
        num_experts=num_experts,
        experts_per_token=reader.integer("num_experts_per_tok", 8, high=num_experts),
        expert_size=reader.integer("moe_intermediate_size", 768),
        renormalize=reader.boolean("norm_topk_prob", False),
        dense_layers=_dense_layers(reader, num_layers=shape.num_layers),
    )


class Qwen3MoeAttention:
    """Grouped-query attention with normed heads and rotary positions."""

    def __init__(self, config: Qwen3MoeConfig, *, layer_idx: int, parts: Parts) -> None:
        shape, bias = config.shape, config.attention_bias
        self.head_dim = shape.head_dim
        self.query_key_value = parts.query_key_value(shape, bias=bias)
        self.output = parts.row_linear("o_proj", shape.query_size, shape.hidden_size, bias=bias)
        self.query_norm = parts.rms_norm("q_norm", shape.head_dim, eps=config.rms_norm_eps)
        self.key_norm = parts.rms_norm("k_norm", shape.head_dim, eps=config.rms_norm_eps)
        self.attention = PagedAttention(
            kernels=parts.kernels,
            layer_idx=layer_idx,
            shape=AttentionShape(scale=shape.head_dim**-0.5, window=config.window),
        )

    def __call__(self, x: Tensor, angles: RopeAngles, batch: ForwardBatch) -> Tensor:
        """[T, hidden_size] to the same shape."""
        per_head = (x.shape[0], -1, self.head_dim)
        query, key, value = self.query_key_value(x)
        query, key = self.query_norm(query.view(per_head)), self.key_norm(key.view(per_head))
        query_THD, key_TND = angles.rotate(query, key)
        value_TND = value.view(per_head)
        return self.output(self.attention(query_THD, key_TND, value_TND, batch))


def _expert(config: Qwen3MoeConfig, parts: Parts) -> ExpertWeights:
    hidden, inner = config.shape.hidden_size, config.expert_size
    return ExpertWeights(
        gate=parts.column_matrix("gate_proj.weight", inner, hidden),
        up=parts.column_matrix("up_proj.weight", inner, hidden),
        down=parts.row_matrix("down_proj.weight", hidden, inner),
    )


def make_mlp(config: Qwen3MoeConfig, *, layer_idx: int, parts: Parts) -> SparseMoe | GatedMlp:
    """Router and experts of one block, or its plain MLP."""
    hidden = config.shape.hidden_size
    if layer_idx in config.dense_layers:
        return parts.gated_mlp("mlp", hidden, config.shape.intermediate_size, activation=Activation.SILU)
    mlp = parts.at("mlp")
    return SparseMoe(
        kernels=parts.kernels,
        router=mlp.tensor("gate.weight", config.num_experts, hidden),
        experts=tuple(_expert(config, mlp.at(f"experts.{i}")) for i in range(config.num_experts)),
        shape=MoeShape(top_k=config.experts_per_token, renormalize=config.renormalize),
        rank=parts.rank,
    )


class Qwen3MoeBlock:
    """Attention, then experts or MLP, each on the normed stream and added to it."""

    def __init__(self, config: Qwen3MoeConfig, *, layer_idx: int, parts: Parts) -> None:
        size, eps = config.shape.hidden_size, config.rms_norm_eps
        self.input_norm = parts.rms_norm("input_layernorm", size, eps=eps)
        self.attention = Qwen3MoeAttention(config, layer_idx=layer_idx, parts=parts.at("self_attn"))
        self.post_attention_norm = parts.rms_norm("post_attention_layernorm", size, eps=eps)
        self.mlp = make_mlp(config, layer_idx=layer_idx, parts=parts)

    def __call__(
        self, hidden: Tensor, added: Tensor | None, angles: RopeAngles, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The stream [T, hidden_size] and what the next norm adds to it first, from block to block."""
        normed, hidden = self.input_norm.add(added, hidden)
        attended = self.attention(normed, angles, batch)
        normed, hidden = self.post_attention_norm.add(attended, hidden)
        return hidden, self.mlp(normed)


class Qwen3MoeForCausalLM:
    """The whole decoder."""

    def __init__(self, config: Qwen3MoeConfig, *, parts: Parts) -> None:
        shape, model = config.shape, parts.at("model")
        self.config = config
        self.layer_windows: tuple[int | None, ...] = (config.window,) * shape.num_layers
        self.num_kv_heads = parts.num_kv_heads(shape.num_kv_heads)
        self.head_dim = shape.head_dim
        self.vocab_size = shape.vocab_size
        self.rope = Rope(config.rope, kernels=parts.kernels)
        self.embedding = model.token_embedding("embed_tokens", shape.vocab_size, shape.hidden_size)
        self.blocks = [
            Qwen3MoeBlock(config, layer_idx=i, parts=model.at(f"layers.{i}")) for i in range(shape.num_layers)
        ]
        self.norm = model.rms_norm("norm", shape.hidden_size, eps=config.rms_norm_eps)
        self.head = parts.lm_head(self.embedding, tied=shape.tie_word_embeddings)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.forward`."""
        hidden, angles = self.embedding(batch.token_ids), self.rope.angles(batch.positions)
        added: Tensor | None = None
        for block in self.blocks:
            hidden, added = block(hidden, added, angles, batch)
        return self.norm.add(added, hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """As `CausalLM.logits`."""
        return self.head(hidden)


def build_model(reader: ConfigReader, parts: Parts) -> CausalLM:
    """Build the decoder from its config and tensors."""
    return Qwen3MoeForCausalLM(read_config(reader, served_max_len=parts.max_model_len), parts=parts)
