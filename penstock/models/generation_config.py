"""What a checkpoint suggests for generation: when to stop and how to sample.

Read from `generation_config.json`, with the end-of-sequence ids of `config.json` as fallback. Advice
only: the request's own fields win, in `text/service` and the scheduler.
"""

from dataclasses import dataclass
from pathlib import Path

from penstock.models.config import ConfigReader, read_json_config


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Suggestions of the model's author; None where there is none."""

    eos_token_ids: tuple[int, ...]
    """Ids that end an answer; empty if the checkpoint names none."""
    bos_token_id: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None


def read_generation_defaults(folder: Path, config: ConfigReader) -> GenerationDefaults:
    """Read the suggestions of a checkpoint.

    Args:
        folder: of the checkpoint; the file may be missing.
        config: its `config.json`.

    Raises:
        CheckpointError: a field has a wrong type; names file, field and value.
    """
    path = folder / "generation_config.json"
    reader = read_json_config(path) if path.exists() else ConfigReader({}, source=path.name)
    return GenerationDefaults(
        eos_token_ids=reader.token_ids("eos_token_id") or config.token_ids("eos_token_id"),
        bos_token_id=next(iter(reader.token_ids("bos_token_id") or config.token_ids("bos_token_id")), None),
        temperature=reader.optional_number("temperature", low=0.0),
        top_p=reader.optional_number("top_p", low=0.0, high=1.0),
        top_k=reader.optional_integer("top_k", low=0),
        min_p=reader.optional_number("min_p", low=0.0, high=1.0),
        repetition_penalty=reader.optional_number("repetition_penalty", low=0.0),
    )
