"""GPT-2 and distilgpt2: learned positions, layer norms with bias, weights stored transposed.

Old exports name their tensors without the `transformer.` prefix; both are read. Letters: T tokens, H
heads, D head size.
"""

from dataclasses import dataclass

from torch import Tensor

from penstock.kernels.batch import ForwardBatch
from penstock.kernels.ops import AttentionShape
from penstock.layers.attention import PagedAttention
from penstock.layers.mlp import GeluMlp
from penstock.models.config import ConfigReader, DecoderShape
from penstock.models.interface import CausalLM
from penstock.models.parts import Parts


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpt2Config:
    """What `config.json` says."""

    shape: DecoderShape
    layer_norm_eps: float
    scale_by_head_dim: bool
    """Scores are divided by the root of the head size."""
    scale_by_layer: bool
    """Scores of layer i are divided by i + 1."""

    def attention_scale(self, layer_idx: int) -> float:
        """Factor on the scores of one layer."""
        scale = self.shape.head_dim**-0.5 if self.scale_by_head_dim else 1.0
        return scale / (layer_idx + 1) if self.scale_by_layer else scale


def _read_shape(reader: ConfigReader) -> DecoderShape:
    hidden_size, num_heads = reader.integer("n_embd", 768), reader.integer("n_head", 12)
    if hidden_size % num_heads:
        raise reader.wrong("n_embd", f"a multiple of n_head ({num_heads})")
    return DecoderShape(
        vocab_size=reader.integer("vocab_size", 50257),
        hidden_size=hidden_size,
        intermediate_size=reader.integer("n_inner", 4 * hidden_size),
        num_layers=reader.integer("n_layer", 12, high=1024),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=hidden_size // num_heads,
        max_position_embeddings=reader.integer("n_positions", 1024),
        tie_word_embeddings=reader.boolean("tie_word_embeddings", True),
    )


def read_config(reader: ConfigReader) -> Gpt2Config:
    """Read a GPT-2 `config.json`."""
    reader.refuse("add_cross_attention", unless=False)
    reader.refuse("activation_function", unless="gelu_new")
    return Gpt2Config(
        shape=_read_shape(reader),
        layer_norm_eps=reader.number("layer_norm_epsilon", 1e-5),
        scale_by_head_dim=reader.boolean("scale_attn_weights", True),
        scale_by_layer=reader.boolean("scale_attn_by_inverse_layer_idx", False),
    )


class Gpt2Attention:
    """Multi-head attention; query, key and value come from one weight."""

    def __init__(self, config: Gpt2Config, *, layer_idx: int, parts: Parts) -> None:
        size = config.shape.hidden_size
        self.head_dim = config.shape.head_dim
        self.query_key_value = parts.column_transposed("c_attn", size, 3 * size, parts=(size,) * 3)
        self.output = parts.row_transposed("c_proj", size, size)
        scale = config.attention_scale(layer_idx)
        self.attention = PagedAttention(
            kernels=parts.kernels, layer_idx=layer_idx, shape=AttentionShape(scale=scale)
        )

    def __call__(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, hidden_size] to the same shape."""
        query, key, value = (
            part.view(x.shape[0], -1, self.head_dim) for part in self.query_key_value(x).chunk(3, dim=1)
        )
        return self.output(self.attention(query, key, value, batch))


class Gpt2Block:
    """Attention, then MLP, each on the normed stream and added to it."""

    def __init__(self, config: Gpt2Config, *, layer_idx: int, parts: Parts) -> None:
        size, inner, eps = config.shape.hidden_size, config.shape.intermediate_size, config.layer_norm_eps
        self.attention_norm = parts.layer_norm("ln_1", size, eps=eps)
        self.attention = Gpt2Attention(config, layer_idx=layer_idx, parts=parts.at("attn"))
        self.mlp_norm = parts.layer_norm("ln_2", size, eps=eps)
        mlp = parts.at("mlp")
        self.mlp = GeluMlp(
            up=mlp.column_transposed("c_fc", size, inner), down=mlp.row_transposed("c_proj", inner, size)
        )

    def __call__(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """[T, hidden_size] to the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden), batch)
        return hidden + self.mlp(self.mlp_norm(hidden))


class Gpt2LMHeadModel:
    """The whole decoder."""

    def __init__(self, config: Gpt2Config, *, parts: Parts) -> None:
        shape, size = config.shape, config.shape.hidden_size
        model = parts if parts.has("wte.weight") else parts.at("transformer")
        self.config = config
        self.layer_windows: tuple[int | None, ...] = (None,) * shape.num_layers
        self.num_kv_heads = parts.num_kv_heads(shape.num_kv_heads)
        self.head_dim = shape.head_dim
        self.vocab_size = shape.vocab_size
        self.embedding = model.token_embedding("wte", shape.vocab_size, size)
        self.positions = model.embedding("wpe", shape.max_position_embeddings, size)
        self.blocks = [
            Gpt2Block(config, layer_idx=i, parts=model.at(f"h.{i}")) for i in range(shape.num_layers)
        ]
        self.norm = model.layer_norm("ln_f", size, eps=config.layer_norm_eps)
        self.head = parts.lm_head(self.embedding, tied=shape.tie_word_embeddings)

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.forward`."""
        hidden = self.embedding(batch.token_ids) + self.positions(batch.positions)
        for block in self.blocks:
            hidden = block(hidden, batch)
        return self.norm(hidden)

    def logits(self, hidden: Tensor) -> Tensor:
        """As `CausalLM.logits`."""
        return self.head(hidden)


def build_model(reader: ConfigReader, parts: Parts) -> CausalLM:
    """Build the decoder from its config and tensors."""
    return Gpt2LMHeadModel(read_config(reader), parts=parts)
