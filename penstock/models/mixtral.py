"""Mixtral: Mistral's attention and, in place of the MLP, eight experts of which each token uses two.

Letters: T tokens, H query heads, N key/value heads, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.batch import ForwardBatch
from penstock.kernels.ops import AttentionShape, ExpertWeights, MoeShape
from penstock.layers.attention import PagedAttention
from penstock.layers.moe import SparseMoe
from penstock.layers.rope import Rope, RopeAngles, RopeSpec
from penstock.models.config import ConfigReader, DecoderShape, read_decoder_shape
from penstock.models.interface import CausalLM
from penstock.models.parts import Parts
from penstock.models.rope_config import read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtralConfig:
    """What `config.json` says."""

    shape: DecoderShape
    rms_norm_eps: float
    rope: RopeSpec
    num_experts: int
    experts_per_token: int
    window: int | None
    """Tokens that a token attends to, itself included; None for all before it."""


def read_config(reader: ConfigReader, *, served_max_len: int | None = None) -> MixtralConfig:
    """Read a Mixtral `config.json`."""
    shape = read_decoder_shape(reader)
    num_experts = reader.integer("num_local_experts", 8, high=4096)
    reader.refuse("hidden_act", unless="silu")
    return MixtralConfig(
        shape=shape,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=read_rope(reader, shape=shape, theta=1e6, served_max_len=served_max_len),
        num_experts=num_experts,
        experts_per_token=reader.integer("num_experts_per_tok", 2, high=num_experts),
        window=reader.optional_integer("sliding_window"),
    )


class MixtralAttention:
    """Grouped-query attention with rotary positions over a window."""

    def __init__(self, config: MixtralConfig, *, layer_idx: int, parts: Parts) -> None:
        shape = config.shape
        self.head_dim = shape.head_dim
        self.query_key_value = parts.query_key_value(shape)
        self.output = parts.row_linear("o_proj", shape.query_size, shape.hidden_size)
        self.attention = PagedAttention(
            kernels=parts.kernels,
            layer_idx=layer_idx,
            shape=AttentionShape(scale=shape.head_dim**-0.5, window=config.window),
        )

    def __call__(self, x: Tensor, angles: RopeAngles, batch: ForwardBatch) -> Tensor:
        """[T, hidden_size] to the same shape."""
        per_head = (x.shape[0], -1, self.head_dim)
        query, key, value = self.query_key_value(x)
        query_THD, key_TND = angles.rotate(query.view(per_head), key.view(per_head))
        value_TND = value.view(per_head)
        return self.output(self.attention(query_THD, key_TND, value_TND, batch))


def _expert(config: MixtralConfig, parts: Parts) -> ExpertWeights:
    hidden, inner = config.shape.hidden_size, config.shape.intermediate_size
    return ExpertWeights(
        gate=parts.column_matrix("w1.weight", inner, hidden),
        up=parts.column_matrix("w3.weight", inner, hidden),
        down=parts.row_matrix("w2.weight", hidden, inner),
    )


def make_moe(config: MixtralConfig, parts: Parts) -> SparseMoe:
    """Router and experts of one block; the chosen probabilities are made to sum to 1."""
    return SparseMoe(
        kernels=parts.kernels,
        router=parts.tensor("gate.weight", config.num_experts, config.shape.hidden_size),
        experts=tuple(_expert(config, parts.at(f"experts.{i}")) for i in range(config.num_experts)),
        shape=MoeShape(top_k=config.experts_per_token, renormalize=True),
        rank=parts.rank,
    )


class MixtralBlock:
    """Attention, then experts, each on the normed stream and added to it."""

    def __init__(self, config: MixtralConfig, *, layer_idx: int, parts: Parts) -> None:
        size, eps = config.shape.hidden_size, config.rms_norm_eps
        self.input_norm = parts.rms_norm("input_layernorm", size, eps=eps)
        self.attention = MixtralAttention(config, layer_idx=layer_idx, parts=parts.at("self_attn"))
        self.post_attention_norm = parts.rms_norm("post_attention_layernorm", size, eps=eps)
        self.moe = make_moe(config, parts.at("block_sparse_moe"))

    def __call__(
        self, hidden: Tensor, added: Tensor | None, angles: RopeAngles, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The stream [T, hidden_size] and what the next norm adds to it first, from block to block."""
        normed, hidden = self.input_norm.add(added, hidden)
        attended = self.attention(normed, angles, batch)
        normed, hidden = self.post_attention_norm.add(attended, hidden)
        return hidden, self.moe(normed)


class MixtralForCausalLM:
    """The whole decoder."""

    def __init__(self, config: MixtralConfig, *, parts: Parts) -> None:
        shape, model = config.shape, parts.at("model")
        self.config = config
        self.layer_windows: tuple[int | None, ...] = (config.window,) * shape.num_layers
        self.num_kv_heads = parts.num_kv_heads(shape.num_kv_heads)
        self.head_dim = shape.head_dim
        self.vocab_size = shape.vocab_size
        self.rope = Rope(config.rope, kernels=parts.kernels)
        self.embedding = model.token_embedding("embed_tokens", shape.vocab_size, shape.hidden_size)
        self.blocks = [
            MixtralBlock(config, layer_idx=i, parts=model.at(f"layers.{i}")) for i in range(shape.num_layers)
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
    return MixtralForCausalLM(read_config(reader, served_max_len=parts.max_model_len), parts=parts)
