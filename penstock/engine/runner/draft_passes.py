"""The draft model's passes over KV memory of its own, whose blocks bear the ids of the model's blocks.

It computes; `spec/draft_model` says what. Made by `engine/loaded_engine`.
"""

from collections.abc import Sequence

from penstock.core.errors import StartupError
from penstock.engine.kv.cache_groups import CacheGroupSpec, CacheLayout
from penstock.engine.runner.device_batch import on_device
from penstock.engine.runner.input_batch import InputBatchBuilder
from penstock.engine.runner.kv_pool import bytes_per_block, pool_for
from penstock.engine.runner.stored_weights import StoredWeights
from penstock.engine.sampling.vocabulary import Floats
from penstock.engine.scheduler.plan import BlockCopy, ScheduledSequence
from penstock.kernels.ops import kv_block
from penstock.kernels.transfer import on_host
from penstock.models.interface import LoadedModel


def draft_layout(draft: LoadedModel, *, target: LoadedModel, target_layout: CacheLayout) -> CacheLayout:
    """All layers of a draft in one group over the blocks of the model's full attention.

    Raises:
        StartupError: the vocabularies differ, the model has no full attention, or the draft's layers do not
            all look equally far back.
    """
    if draft.model.vocab_size != target.model.vocab_size:
        raise StartupError(
            f"speculative_config: the draft model has a vocabulary of {draft.model.vocab_size} tokens, the "
            f"model of {target.model.vocab_size}: they must be the same",
            param="speculative_config",
        )
    windows = set(draft.model.layer_windows)
    if target_layout.windows[0] is not None or len(windows) != 1:
        raise StartupError(
            "speculative_config: a draft model needs a model with full attention, and layers with one window",
            param="speculative_config",
        )
    num_layers = len(draft.model.layer_windows)
    group = CacheGroupSpec(layers=tuple(range(num_layers)), window=windows.pop())
    return CacheLayout(groups=(group,), num_slabs=num_layers)


def draft_bytes_per_block(draft: LoadedModel, layout: CacheLayout, *, block_size: int) -> int:
    """Bytes that a draft adds to every block of the pool."""
    shape = draft.kv_shape(block_size=block_size)
    return bytes_per_block(layout, block=kv_block(draft.kernels, shape))


class ModelPasses:
    """A loaded draft with its memory; a `DraftPasses`."""

    def __init__(self, draft: LoadedModel, *, layout: CacheLayout, num_blocks: int, block_size: int) -> None:
        """Reserve the KV memory.

        Args:
            draft: the model.
            layout: from `draft_layout`.
            num_blocks: blocks of the model's pool.
            block_size: token slots in a block.
        """
        self._pool = pool_for(draft, layout, num_blocks=num_blocks, block_size=block_size)
        self._inputs = InputBatchBuilder(layout, pool=self._pool)
        self._draft = draft
        self._weights = StoredWeights(draft.model)

    @property
    def buffer_bytes(self) -> int:
        """Bytes kept beside weights and KV."""
        return self._pool.bytes_per_block + self._inputs.buffer_bytes + self._draft.buffer_bytes()

    def run(self, sequences: Sequence[ScheduledSequence]) -> Floats:
        """See `DraftPasses`."""
        batch = self._inputs.build(sequences)
        if self._draft.is_queued:
            batch = on_device(batch, device=self._draft.device)
        hidden = self._draft.model.forward(batch)
        ends = batch.groups[0].query_start_loc[1:].long()
        taken = hidden if len(ends) == len(hidden) else hidden.index_select(0, ends - 1)
        return on_host(self._draft.model.logits(taken))

    def release(self) -> None:
        """See `DraftPasses`."""
        self._weights.put_aside()
        self._pool.release()

    def restore(self) -> None:
        """See `DraftPasses`."""
        self._weights.bring_back()
        self._pool.restore()

    def move_blocks(self, *, copies: Sequence[BlockCopy], zeroed: Sequence[int]) -> None:
        """See `DraftPasses`."""
        self._pool.zero_blocks(zeroed)
        self._pool.copy_blocks(copies)
