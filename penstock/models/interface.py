"""What the engine knows of a model.

`engine/runner` calls `forward` once a step and `logits` for the rows that are sampled. Each architecture
file implements `CausalLM`; `loader` returns a `LoadedModel`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penstock.kernels.adapters import LoraSites
from penstock.kernels.batch import ForwardBatch, KvShape
from penstock.kernels.devices import CPU
from penstock.kernels.ops import KernelSet
from penstock.models.config import DecoderShape


class ModelConfig(Protocol):
    """The typed config of any architecture."""

    @property
    def shape(self) -> DecoderShape:
        """Sizes that every decoder has."""
        ...


class CausalLM(Protocol):
    """A decoder that reads and writes the paged KV cache."""

    @property
    def config(self) -> ModelConfig:
        """What the checkpoint's `config.json` said."""
        ...

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """For each layer its sliding window in tokens, or None for full attention."""
        ...

    @property
    def num_kv_heads(self) -> int:
        """Key/value heads of each layer."""
        ...

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        ...

    @property
    def vocab_size(self) -> int:
        """Token ids that the embedding knows; columns of the logits, unless the head scores classes."""
        ...

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Run the layers over one step. Writes the step's keys and values into the batch's slabs.

        Args:
            batch: the flat inputs.

        Returns:
            [num_tokens, hidden_size] after the final norm, in the model's dtype.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary.

        Args:
            hidden: [rows, hidden_size], some rows of what `forward` returned.

        Returns:
            [rows, vocab_size] float32, a new tensor; [rows, classes] of a model that classifies.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model ready to run, and what was chosen while loading it."""

    model: CausalLM
    config: ModelConfig
    architecture: str
    """As `config.json` names it, e.g. `LlamaForCausalLM`."""
    kernels: KernelSet
    dtype: torch.dtype
    """Of weights and activations."""
    kv_dtype: torch.dtype
    """Of what the KV cache keeps."""
    quantization: str
    """How the weights are kept: as `--quantization` asks, or what the checkpoint's format became."""
    execution: str
    """How passes run: `recorded`, or `op by op` and why."""
    num_parameters: int
    """Tied weights counted once."""
    weights_bytes: int
    """Of what is resident: tensors mapped from the files, and weights in the form of their kernels."""
    buffer_bytes: Callable[[], int]
    """Bytes that passes keep between steps."""
    max_model_len: int
    """Longest context in tokens, prompt and answer together."""
    sites: LoraSites | None = None
    """Where adapters may act; None if they are not enabled."""
    labels: tuple[str, ...] = ()
    """Classes that the head scores; empty if it scores the vocabulary."""
    device: torch.device = CPU
    """Where weights, KV and activations are."""

    @property
    def is_queued(self) -> bool:
        """True if passes run behind a queue: what they give is there when an event says so.

        Triton's interpreter on the CPU plays the device, so that tests take the same path.
        """
        return self.device != CPU or self.kernels.name == "triton"

    def kv_shape(self, *, block_size: int) -> KvShape:
        """What a KV block of one layer holds."""
        return KvShape(
            block_size=block_size,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            dtype=self.kv_dtype,
        )
