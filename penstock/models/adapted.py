"""A model that runs operation by operation, with a step's adapters put where its layers look for them.

`loader` wraps a model with it when adapters are enabled; a recorded model hands them to its program instead.
"""

from torch import Tensor

from penstock.kernels.adapters import ActiveAdapters
from penstock.kernels.batch import ForwardBatch
from penstock.models.interface import CausalLM, ModelConfig


class AdaptedModel:
    """A `CausalLM` whose products read `active`."""

    def __init__(self, model: CausalLM, *, active: ActiveAdapters) -> None:
        """Wrap a model.

        Args:
            model: built with sites.
            active: that of its sites; set before every pass.
        """
        self._model = model
        self._active = active
        self.config: ModelConfig = model.config
        self.layer_windows = model.layer_windows
        self.num_kv_heads = model.num_kv_heads
        self.head_dim = model.head_dim
        self.vocab_size = model.vocab_size

    def forward(self, batch: ForwardBatch) -> Tensor:
        """As `CausalLM.forward`."""
        self._active.rows, self._active.tables = batch.adapters, batch.adapter_tables
        try:
            return self._model.forward(batch)
        finally:
            self._active.rows, self._active.tables = (), None

    def logits(self, hidden: Tensor) -> Tensor:
        """As `CausalLM.logits`."""
        return self._model.logits(hidden)
