"""The whole folder: config, weights, tokenizer, generation config."""

import json
from pathlib import Path

from tools.make_checkpoint.shapes import Shape, config_json, tensor_plans
from tools.make_checkpoint.tokenizer import write_tokenizer
from tools.make_checkpoint.weights import Progress, write_weights


def make_checkpoint(
    folder: Path,
    shape: Shape,
    *,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = 2 << 30,
    on_progress: Progress = lambda done, total: None,  # noqa: ARG005 - the names document the type
    device: str = "cpu",
) -> Path:
    """Write a random checkpoint.

    Args:
        folder: made if missing; files of the same names are replaced.
        shape: sizes.
        dtype: `bfloat16`, `float16` or `float32`.
        seed: the same seed and shape give the same bytes.
        max_shard_bytes: limit of a weights file.
        on_progress: told of bytes of weights.
        device: where the numbers are drawn: `cpu`, or `cuda`, which is many times faster.

    Returns:
        `folder`.

    Raises:
        ValueError: the vocabulary cannot be filled.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, vocab_size=shape.vocab_size, context=shape.max_position_embeddings)
    config = config_json(shape, dtype=dtype)
    end = shape.vocab_size - 1
    generation = {"bos_token_id": end - 2, "eos_token_id": [end, end - 2], "do_sample": False}
    for name, content in (("config.json", config), ("generation_config.json", generation)):
        (folder / name).write_text(json.dumps(content, indent=1), encoding="utf-8")
    plans = list(tensor_plans(shape))
    write_weights(
        folder,
        plans,
        dtype_name=dtype,
        seed=seed,
        max_shard_bytes=max_shard_bytes,
        on_progress=on_progress,
        device=device,
    )
    return folder
