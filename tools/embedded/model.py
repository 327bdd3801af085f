"""The Llama-architecture network in training form, with the parameter names `transformers` uses.

It is what `train.py` optimises and `export.py` saves; it is not the engine's model file, which
reads a paged cache. Sizes stay small, so it reads as config, attention, MLP, block, model.

Shape letters: B rows, T positions, D hidden size, N query heads, K key-value heads, H head size.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F  # noqa: N812  # the name everyone reads
from torch import Tensor, nn

QUERY_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes of the network; the defaults are those of `penstock-tales`."""

    vocab_size: int = 4096
    hidden_size: int = 384
    intermediate_size: int = 768
    num_hidden_layers: int = 5
    num_attention_heads: int = 6
    num_key_value_heads: int = 2
    head_dim: int = 64
    max_position_embeddings: int = 4096
    rope_theta: float = 10_000.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        assert self.num_attention_heads % self.num_key_value_heads == 0
        assert self.head_dim % 2 == 0

    def to_dict(self) -> dict[str, int | float]:
        """The fields as a plain mapping."""
        return asdict(self)


def rotary_tables(config: ModelConfig, *, device: torch.device | None = None) -> Tensor:
    """Cosines and sines of every position, `[2, max_position_embeddings, head_dim]` float32.

    Source: Su et al., RoFormer (2021), section 3.4; halves are rotated together, as in Llama.
    """
    half = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device)
    frequency_h = torch.pow(config.rope_theta, -half / config.head_dim)
    position_t = torch.arange(config.max_position_embeddings, dtype=torch.float32, device=device)
    angle_th = torch.outer(position_t, frequency_h).repeat(1, 2)
    tables: Tensor = torch.stack((angle_th.cos(), angle_th.sin()))
    return tables


def rotate(x_bnth: Tensor, tables: Tensor) -> Tensor:
    """Turn each head vector by its position's angles; `tables` is `[2, T, H]`."""
    first, second = x_bnth.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    cos, sin = tables.to(x_bnth.dtype).unbind(0)
    return x_bnth * cos + turned * sin


def causal_attention(q_bnth: Tensor, k_bnth: Tensor, v_bnth: Tensor) -> Tensor:
    """Softmax attention where each position sees itself and what is before it.

    Queries go in blocks, so about half the scores are never computed. On a CPU in bfloat16 this
    is 2.5 times as fast, forward and backward, as `scaled_dot_product_attention`; on an
    accelerator that function is used.
    """
    if q_bnth.is_cuda:
        return F.scaled_dot_product_attention(q_bnth, k_bnth, v_bnth, is_causal=True)
    length = q_bnth.shape[2]
    q_bnth = q_bnth * q_bnth.shape[-1] ** -0.5
    k_bnht = k_bnth.transpose(-1, -2)
    mask = torch.full((QUERY_BLOCK, QUERY_BLOCK), float("-inf"), dtype=q_bnth.dtype).triu(1)
    mixed = []
    for start in range(0, length, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, length)
        scores = q_bnth[:, :, start:end] @ k_bnht[..., :end]
        diagonal = scores[..., start:] + mask[: end - start, : end - start]
        scores = torch.cat((scores[..., :start], diagonal), dim=-1) if start else diagonal
        mixed.append(scores.softmax(-1) @ v_bnth[:, :, :end])
    return torch.cat(mixed, dim=2)


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention over whole rows."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        query_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)

    def _heads(self, x_btd: Tensor, num_heads: int) -> Tensor:
        rows, length = x_btd.shape[:2]
        return x_btd.view(rows, length, num_heads, self.config.head_dim).transpose(1, 2)

    def forward(self, x_btd: Tensor, tables: Tensor) -> Tensor:
        """Mix positions; `[B, T, D]` in and out."""
        num_heads, num_kv = self.config.num_attention_heads, self.config.num_key_value_heads
        q_bnth = rotate(self._heads(self.q_proj(x_btd), num_heads), tables)
        k_bkth = rotate(self._heads(self.k_proj(x_btd), num_kv), tables)
        v_bkth = self._heads(self.v_proj(x_btd), num_kv)
        k_bnth = k_bkth.repeat_interleave(num_heads // num_kv, dim=1)
        v_bnth = v_bkth.repeat_interleave(num_heads // num_kv, dim=1)
        mixed_bnth = causal_attention(q_bnth, k_bnth, v_bnth)
        mixed: Tensor = self.o_proj(mixed_bnth.transpose(1, 2).flatten(2))
        return mixed


class MLP(nn.Module):
    """SwiGLU feed-forward. Source: Shazeer, GLU Variants Improve Transformer (2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_btd: Tensor) -> Tensor:
        """Transform each position alone."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x_btd)) * self.up_proj(x_btd))
        return out


class Block(nn.Module):
    """One pre-norm layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x_btd: Tensor, tables: Tensor) -> Tensor:
        """Apply attention and feed-forward, each around a residual."""
        x_btd = x_btd + self.self_attn(self.input_layernorm(x_btd), tables)
        out: Tensor = x_btd + self.mlp(self.post_attention_layernorm(x_btd))
        return out


class Decoder(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.register_buffer("tables", rotary_tables(config), persistent=False)

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Hidden states after the final norm, `[B, T, D]`."""
        x_btd = self.embed_tokens(ids_bt)
        if torch.is_autocast_enabled(ids_bt.device.type):
            x_btd = x_btd.to(torch.get_autocast_dtype(ids_bt.device.type))
        tables = self.tables[:, : ids_bt.shape[1]]  # type: ignore[index]  # a buffer is a Tensor
        for layer in self.layers:
            x_btd = layer(x_btd, tables)
        out: Tensor = self.norm(x_btd)
        return out


class LanguageModel(nn.Module):
    """The decoder with its embedding matrix as output head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.apply(self._initialise)
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)

    @staticmethod
    def _initialise(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            fan_in = module.weight.shape[1]
            nn.init.normal_(module.weight, std=0.02 if fan_in > 512 else 0.03)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores over the vocabulary, `[..., vocab_size]`."""
        return F.linear(hidden, self.model.embed_tokens.weight)

    def forward(self, ids_bt: Tensor) -> Tensor:
        """Logits of every position, `[B, T, vocab_size]`."""
        return self.logits(self.model(ids_bt))

    def loss(self, ids_bt: Tensor, targets_bt: Tensor) -> Tensor:
        """Mean cross-entropy over the targets that are not -1; only those reach the head."""
        kept = (targets_bt.flatten() >= 0).nonzero()[:, 0]
        hidden_td = self.model(ids_bt).flatten(0, 1)[kept]
        return F.cross_entropy(self.logits(hidden_td), targets_bt.flatten()[kept])
