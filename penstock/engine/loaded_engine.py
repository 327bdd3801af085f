"""What an engine is built from once its weights are there: `build` makes it, and all that sizes reads it."""

from dataclasses import dataclass

import msgspec

from penstock.engine.config import EngineConfig, SchedulerConfig, check_whole_prompts
from penstock.engine.kv.cache_groups import CacheLayout, make_cache_layout
from penstock.engine.runner.draft_passes import ModelPasses, draft_bytes_per_block, draft_layout
from penstock.engine.runner.kv_pool import bytes_per_block
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.spec.draft_model import DraftModel
from penstock.kernels.ops import kv_block
from penstock.models.interface import LoadedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A loaded draft model that fits the model."""

    loaded: LoadedModel
    layout: CacheLayout

    @classmethod
    def over(cls, loaded: LoadedModel, *, target: LoadedModel, target_layout: CacheLayout) -> "Draft":
        """Check that it fits.

        Raises:
            StartupError: as `draft_layout`.
        """
        return cls(loaded=loaded, layout=draft_layout(loaded, target=target, target_layout=target_layout))

    def drafter(self, sampler: Sampler, *, num_blocks: int, block_size: int) -> DraftModel:
        """Who guesses with it, with the target's sampler."""
        passes = ModelPasses(self.loaded, layout=self.layout, num_blocks=num_blocks, block_size=block_size)
        return DraftModel(passes, sampler=sampler, num_blocks=num_blocks, block_size=block_size)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedEngine:
    """A checked config and the models that it names."""

    config: EngineConfig
    loaded: LoadedModel
    """The model, or this rank's part of it."""
    layout: CacheLayout
    limits: SchedulerConfig
    """Those of the config, with all that was left to the model and the device."""
    draft: Draft | None

    @classmethod
    def over(
        cls, config: EngineConfig, *, loaded: LoadedModel, draft_model: LoadedModel | None
    ) -> "LoadedEngine":
        """Check that models and limits fit each other.

        Raises:
            StartupError: as `check_whole_prompts` and `draft_layout`.
        """
        layout = make_cache_layout(loaded.model.layer_windows)
        limits = _resolved_limits(config, loaded)
        check_whole_prompts(limits, max_model_len=limits.max_model_len)
        draft = None if draft_model is None else Draft.over(draft_model, target=loaded, target_layout=layout)
        return cls(config=config, loaded=loaded, layout=layout, limits=limits, draft=draft)

    @property
    def slot_bytes(self) -> int:
        """Of one block of this rank's part of the model, in all slabs; the draft model's not counted."""
        shape = self.loaded.kv_shape(block_size=self.config.kv.block_size)
        return bytes_per_block(self.layout, block=kv_block(self.loaded.kernels, shape))

    @property
    def block_bytes(self) -> int:
        """Of one block, with the draft model's, in all ranks."""
        draft, size = self.draft, self.config.kv.block_size
        of_draft = draft_bytes_per_block(draft.loaded, draft.layout, block_size=size) if draft else 0
        # On the CPU all ranks share one memory, and each holds its heads of a block.
        return (self.slot_bytes + of_draft) * self.config.tensor_parallel_size


def _resolved_limits(config: EngineConfig, loaded: LoadedModel) -> SchedulerConfig:
    """The limits with all that was left to the model and the device."""
    looks_ahead = config.scheduler.async_scheduling
    return msgspec.structs.replace(
        config.scheduler,
        max_model_len=loaded.max_model_len,
        async_scheduling=looks_ahead
        if looks_ahead is not None
        else loaded.device.type == "cuda" and config.tensor_parallel_size == 1,
    )
