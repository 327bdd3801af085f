"""Gemma 2: every other layer slides, scores and logits are capped, blocks have norms before and after.

Norm weights are stored minus one; embeddings are scaled by the root of their size. Letters: T tokens,
H query heads, N key/value heads, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.batch import ForwardBatch
from penstock.kernels.ops import AttentionShape
from penstock.layers.attention import PagedAttention
from penstock.layers.mlp import Activation
from penstock.layers.norm import RmsNorm
from penstock.layers.rope import Rope, RopeAngles, RopeSpec
from penstock.models.config import ConfigReader, DecoderShape, read_activation, read_decoder_shape
from penstock.models.interface import CausalLM
from penstock.models.layer_windows import read_layer_windows
from penstock.models.parts import Parts
from penstock.models.rope_config import read_rope


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemma2Config:
    """What `config.json` says."""

    shape: DecoderShape
    rms_norm_eps: float
    rope: RopeSpec
    activation: Activation
    attention_bias: bool
    """Biases on query, key, value and output."""
    attention_scale: float
    attention_softcap: float | None
    logits_softcap: float | None
    layer_windows: tuple[int | None, ...]
    """Window of each layer in tokens, None for full attention."""


def read_config(reader: ConfigReader, *, served_max_len: int | None = None) -> Gemma2Config:
    """Read a Gemma2 `config.json`."""
    shape = read_decoder_shape(reader, head_dim=256, tied=True)
    reader.refuse("use_bidirectional_attention", unless=False)
    return Gemma2Config(
        shape=shape,
        rms_norm_eps=reader.number("rms_norm_eps", 1e-6),
        rope=read_rope(reader, shape=shape, served_max_len=served_max_len),
        activation=read_activation(reader, name="hidden_activation", default="gelu_pytorch_tanh"),
        attention_bias=reader.boolean("attention_bias", False),
        attention_scale=reader.number("query_pre_attn_scalar", 256, low=1e-6) ** -0.5,
        attention_softcap=reader.optional_number("attn_logit_softcapping", low=1e-6),
        logits_softcap=reader.optional_number("final_logit_softcapping", low=1e-6),
        layer_windows=read_layer_windows(
            reader,
            num_layers=shape.num_layers,
            window=reader.optional_integer("sliding_window"),
            is_sliding=lambda i: i % 2 == 0,
        ),
    )


class Gemma2Attention:
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: Gemma2Config, *, layer_idx: int, parts: Parts) -> None:
        shape, bias = config.shape, config.attention_bias
        self.head_dim = shape.head_dim
        self.query_key_value = parts.query_key_value(shape, bias=bias)
        self.output = parts.row_linear("o_proj", shape.query_size, shape.hidden_size, bias=bias)
        self.attention = PagedAttention(
            kernels=parts.kernels,
            layer_idx=layer_idx,
            shape=AttentionShape(
                scale=config.attention_scale,
                window=config.layer_windows[layer_idx],
                softcap=config.attention_softcap,
            ),
        )

    def __call__(self, x: Tensor, angles: RopeAngles, batch: ForwardBatch) -> Tensor:
        """[T, hidden_size] to the same shape."""
        per_head = (x.shape[0], -1, self.head_dim)
        query, key, value = self.query_key_value(x)
        query_THD, key_TND = angles.rotate(query.view(per_head), key.view(per_head))
        value_TND = value.view(per_head)
        return self.output(self.attention(query_THD, key_TND, value_TND, batch))


class Gemma2Block:
    """Attention, then MLP, each normed before and after and added to the stream."""

    def __init__(self, config: Gemma2Config, *, layer_idx: int, parts: Parts) -> None:
        shape = config.shape

        def norm(name: str) -> RmsNorm:
            return parts.rms_norm(name, shape.hidden_size, eps=config.rms_norm_eps, weight_offset=1.0)

        self.input_norm = norm("input_layernorm")
        self.attention = Gemma2Attention(config, layer_idx=layer_idx, parts=parts.at("self_attn"))
        self.post_attention_norm = norm("post_attention_layernorm")
        self.pre_mlp_norm = norm("pre_feedforward_layernorm")
        self.mlp = parts.gated_mlp(
            "mlp", shape.hidden_size, shape.intermediate_size, activation=config.activation
        )
        self.post_mlp_norm = norm("post_feedforward_layernorm")

    def __call__(
        self, hidden: Tensor, added: Tensor | None, angles: RopeAngles, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor]:
        """The stream [T, hidden_size] and what the next norm adds to it first, from block to block."""
        normed, hidden = self.input_norm.add(added, hidden)
        attended = self.attention(normed, angles, batch)
        normed, hidden = self.pre_mlp_norm.add(self.post_attention_norm(attended), hidden)
        return hidden, self.post_mlp_norm(self.mlp(normed))


class Gemma2ForCausalLM:
    """The whole decoder."""

    def __init__(self, config: Gemma2Config, *, parts: Parts) -> None:
        shape, model = config.shape, parts.at("model")
        self.config = config
        self.layer_windows = config.layer_windows
        self.num_kv_heads = parts.num_kv_heads(shape.num_kv_heads)
        self.head_dim = shape.head_dim
        self.vocab_size = shape.vocab_size
        self.rope = Rope(config.rope, kernels=parts.kernels)
        self.embedding = model.token_embedding("embed_tokens", shape.vocab_size, shape.hidden_size)
        self.blocks = [
            Gemma2Block(config, layer_idx=i, parts=model.at(f"layers.{i}")) for i in range(shape.num_layers)
        ]
        self.norm = model.rms_norm("norm", shape.hidden_size, eps=config.rms_norm_eps, weight_offset=1.0)
        self.head = parts.lm_head(
            self.embedding, tied=shape.tie_word_embeddings, softcap=config.logits_softcap
        )

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.forward`."""
        hidden = self.embedding.scaled(batch.token_ids, self.config.shape.hidden_size**0.5)
        angles = self.rope.angles(batch.positions)
        added: Tensor | None = None
        for block in self.blocks:
            hidden, added = block(hidden, added, angles, batch)
        return self.norm.add(added, hidden)[0]

    def logits(self, hidden: Tensor) -> Tensor:
        """As `CausalLM.logits`."""
        return self.head(hidden)


def build_model(reader: ConfigReader, parts: Parts) -> CausalLM:
    """Build the decoder from its config and tensors."""
    return Gemma2ForCausalLM(read_config(reader, served_max_len=parts.max_model_len), parts=parts)
