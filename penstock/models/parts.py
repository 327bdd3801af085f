"""Builds layers from a checkpoint's tensors, by name.

A model's constructor takes its layers from a `Parts`, so it reads like the list of its tensors. The
loader builds every model twice: first over `meta` tensors, which checks each name, shape and dtype in
milliseconds, then over the data; so nothing is half loaded.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penstock.core.errors import CheckpointError
from penstock.kernels.ops import KernelSet
from penstock.layers.embedding import Embedding, LmHead
from penstock.layers.linear import Linear
from penstock.layers.mlp import Activation, GatedMlp
from penstock.layers.norm import LayerNorm, RmsNorm
from penstock.models.checkpoint import Checkpoint

IGNORED_SUFFIXES = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
"""Tensors that older exports carry and that follow from the config: frequencies and causal masks."""


@dataclass(slots=True, kw_only=True)
class Weights:
    """The tensors of one checkpoint as a model takes them. Counts what was taken."""

    checkpoint: Checkpoint
    dtype: torch.dtype
    is_check: bool
    """Hand out `meta` tensors: check only."""
    on_tensor: Callable[[int], None] | None = None
    """Called after each tensor with the bytes taken so far, as the files count them."""
    taken: dict[str, Tensor] = field(default_factory=dict)
    file_bytes: int = 0
    """Size in the files of what was taken."""

    def take(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """The tensor in the model's dtype; mapped, or converted if the file has another dtype.

        Raises:
            CheckpointError: missing or not of this shape.
        """
        assert name not in self.taken, name
        entry = self.checkpoint.entry(name, shape=shape)
        if self.is_check:
            tensor = torch.empty(shape, dtype=self.dtype, device="meta")
        else:
            tensor = self.checkpoint.read(entry).to(self.dtype)
        self.taken[name] = tensor
        self.file_bytes += entry.num_bytes
        if self.on_tensor is not None:
            self.on_tensor(self.file_bytes)
        return tensor

    def refuse_rest(self) -> None:
        """Refuse tensors that no layer took.

        Raises:
            CheckpointError: names the first of them.
        """
        rest = [
            name
            for name in self.checkpoint
            if name not in self.taken and not name.endswith(IGNORED_SUFFIXES) and name != "lm_head.weight"
        ]
        if rest:
            more = f" and {len(rest) - 1} more" if len(rest) > 1 else ""
            raise CheckpointError(
                f"tensor {rest[0][:200]!r}{more} in the checkpoint fits no layer of the model"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """Layers under one name prefix."""

    weights: Weights
    kernels: KernelSet
    max_model_len: int | None = None
    """Longest context that will be served; None for the model's own."""
    prefix: str = ""

    def at(self, name: str) -> "Parts":
        """The same, one level down."""
        prefix = f"{self.prefix}{name}."
        return Parts(
            weights=self.weights, kernels=self.kernels, max_model_len=self.max_model_len, prefix=prefix
        )

    def has(self, name: str) -> bool:
        """True if the checkpoint has this tensor."""
        return self.prefix + name in self.weights.checkpoint

    def tensor(self, name: str, *shape: int) -> Tensor:
        """The tensor `prefix + name`."""
        return self.weights.take(self.prefix + name, shape)

    def linear(self, name: str, in_features: int, out_features: int, *, bias: bool = False) -> Linear:
        """A dense layer stored as [out, in]."""
        return Linear(
            kernels=self.kernels,
            weight=self.tensor(f"{name}.weight", out_features, in_features),
            bias=self.tensor(f"{name}.bias", out_features) if bias else None,
        )

    def transposed_linear(self, name: str, in_features: int, out_features: int) -> Linear:
        """A dense layer with bias stored as [in, out] (GPT-2); used through a view."""
        return Linear(
            kernels=self.kernels,
            weight=self.tensor(f"{name}.weight", in_features, out_features).t(),
            bias=self.tensor(f"{name}.bias", out_features),
        )

    def rms_norm(self, name: str, size: int, *, eps: float, weight_offset: float = 0.0) -> RmsNorm:
        """A root mean square norm."""
        weight = self.tensor(f"{name}.weight", size)
        return RmsNorm(kernels=self.kernels, weight=weight, eps=eps, weight_offset=weight_offset)

    def layer_norm(self, name: str, size: int, *, eps: float) -> LayerNorm:
        """A norm with bias."""
        weight, bias = self.tensor(f"{name}.weight", size), self.tensor(f"{name}.bias", size)
        return LayerNorm(kernels=self.kernels, weight=weight, bias=bias, eps=eps)

    def embedding(self, name: str, num_rows: int, size: int) -> Embedding:
        """A table of vectors."""
        return Embedding(kernels=self.kernels, weight=self.tensor(f"{name}.weight", num_rows, size))

    def gated_mlp(
        self, name: str, hidden_size: int, inner_size: int, *, activation: Activation, bias: bool = False
    ) -> GatedMlp:
        """An MLP stored as `gate_proj`, `up_proj` and `down_proj`."""
        mlp = self.at(name)
        return GatedMlp(
            gate=mlp.linear("gate_proj", hidden_size, inner_size, bias=bias),
            up=mlp.linear("up_proj", hidden_size, inner_size, bias=bias),
            down=mlp.linear("down_proj", inner_size, hidden_size, bias=bias),
            activation=activation,
        )

    def lm_head(self, embedding: Embedding, *, tied: bool, softcap: float | None = None) -> LmHead:
        """The head: the embedding's weight if tied, else `lm_head.weight`."""
        weight = embedding.weight if tied else self.tensor("lm_head.weight", *embedding.weight.shape)
        return LmHead(kernels=self.kernels, weight=weight, softcap=softcap)
