"""Where a stage runs, on which models, and what it tells."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES

SMALL: Final = "llama-3.2-1b"
LARGE: Final = "llama-3.1-8b"
TINY: Final = "tiny-llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One measured value beside what it has to reach."""

    name: str
    value: float
    at_least: float | None = None
    at_most: float | None = None
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """True if it is, or if there is nothing to reach."""
        low, high = self.at_least, self.at_most
        return (low is None or self.value >= low) and (high is None or self.value <= high)

    def record(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "value": self.value,
            "unit": self.unit,
            "at_least": self.at_least,
            "at_most": self.at_most,
            "is_met": self.is_met,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """Told to every stage."""

    is_dry: bool
    """Tiny sizes on the CPU, kernels interpreted: proves that the stage has no typo, and nothing else."""
    models: Path
    """Folder of the checkpoints, made where they are missing."""
    out: Path
    """Folder of the results; stages read those of earlier ones."""

    @property
    def device(self) -> str:
        """Torch's word."""
        return "cpu" if self.is_dry else "cuda"

    def pick(self, real: int, dry: int) -> int:
        """A size."""
        return dry if self.is_dry else real

    def model(self, name: str) -> Path:
        """A random checkpoint of a named shape; drawn on the device, written once."""
        shape = TINY if self.is_dry else name
        folder = self.models / shape
        done = folder / "complete"
        if not done.exists():
            make_checkpoint(folder, SHAPES[shape], device=self.device)
            done.touch()
        return folder

    def config(
        self,
        model: str,
        *,
        max_num_seqs: int,
        max_model_len: int,
        max_num_batched_tokens: int = 8192,
        deterministic: bool = False,
        enforce_eager: bool = False,
    ) -> EngineConfig:
        """An engine with room for `max_num_seqs` contexts, whose steps nobody cuts."""
        return EngineConfig(
            model_path=str(self.model(model)),
            device=self.device,
            kernels="triton",
            dtype="bfloat16",
            deterministic=deterministic,
            enforce_eager=enforce_eager,
            max_model_len=max_model_len,
            warmup=not self.is_dry,
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs,
                max_num_batched_tokens=max(max_num_batched_tokens, max_num_seqs),
                max_num_queued_reqs=100_000,
                max_num_queued_tokens=1 << 40,
                step_time_target_ms=600_000.0,
                decode_stretch=1_000_000.0,
                enable_prefix_caching=False,
                async_scheduling=True,
            ),
            kv=KvConfig(num_blocks=max_num_seqs * -(-max_model_len // 16) + 8),
        )

    def earlier(self, stage: str) -> dict[str, Any]:
        """Results of a stage that ran before, as dry as this one; empty if it did not."""
        path = self.out / f"{stage}.json"
        if not path.exists():
            return {}
        record = json.loads(path.read_text(encoding="utf-8"))
        found: dict[str, Any] = record["results"] if record["is_dry_run"] == self.is_dry else {}
        return found


def synchronize() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
