"""Writes random tensors to safetensors shards, a piece of a tensor in memory at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

import torch

from tools.make_checkpoint.shapes import TensorPlan

DTYPES: Final = {
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float32": ("F32", torch.float32),
}
PIECE_ELEMENTS: Final = 1 << 22
"""Elements drawn at a time: 16 MB of float32."""

Progress = Callable[[int, int], None]
"""Called with (bytes written, bytes in all)."""


def split_shards(plans: list[TensorPlan], *, item_bytes: int, max_shard_bytes: int) -> list[list[TensorPlan]]:
    """Fill shards in order; a tensor larger than the limit gets one of its own."""
    shards: list[list[TensorPlan]] = [[]]
    size = 0
    for plan in plans:
        num_bytes = plan.num_elements * item_bytes
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(plan)
        size += num_bytes
    return shards


def _header(plans: list[TensorPlan], *, word: str, item_bytes: int) -> bytes:
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for plan in plans:
        end = start + plan.num_elements * item_bytes
        fields[plan.name] = {"dtype": word, "shape": list(plan.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts aligned
    return len(text).to_bytes(8, "little") + text


def _pieces(plan: TensorPlan, *, dtype: torch.dtype, seed: int, device: str) -> Iterator[bytes]:
    generator = torch.Generator(device).manual_seed(seed)
    for start in range(0, plan.num_elements, PIECE_ELEMENTS):
        count = min(PIECE_ELEMENTS, plan.num_elements - start)
        piece = torch.full((count,), plan.mean, device=device)
        if plan.std:
            piece.normal_(plan.mean, plan.std, generator=generator)
        yield piece.to(dtype).view(torch.uint8).cpu().numpy().tobytes()


def _write_shard(
    file: BinaryIO,
    plans: list[TensorPlan],
    *,
    dtype_name: str,
    seeds: dict[str, int],
    done: int,
    device: str,
) -> Iterator[int]:
    word, dtype = DTYPES[dtype_name]
    file.write(_header(plans, word=word, item_bytes=dtype.itemsize))
    for plan in plans:
        for piece in _pieces(plan, dtype=dtype, seed=seeds[plan.name], device=device):
            file.write(piece)
            done += len(piece)
            yield done


def write_weights(
    folder: Path,
    plans: list[TensorPlan],
    *,
    dtype_name: str,
    seed: int,
    max_shard_bytes: int,
    on_progress: Progress,
    device: str = "cpu",
) -> None:
    """Write all tensors.

    Args:
        folder: gets `model.safetensors`, or numbered shards and their index.
        plans: what to write; the same plans and seed give the same numbers for any shard size.
        dtype_name: a key of `DTYPES`.
        seed: 0 or more.
        max_shard_bytes: limit of a shard.
        on_progress: told after each piece.
        device: where the numbers are drawn; each kind draws others from one seed.
    """
    item_bytes = DTYPES[dtype_name][1].itemsize
    seeds = {plan.name: seed * 1_000_003 + i for i, plan in enumerate(plans)}
    total = sum(plan.num_elements for plan in plans) * item_bytes
    shards = split_shards(plans, item_bytes=item_bytes, max_shard_bytes=max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = names if len(shards) > 1 else ["model.safetensors"]
    done = 0
    for name, shard in zip(names, shards, strict=True):
        with (folder / name).open("wb") as file:
            pieces = _write_shard(file, shard, dtype_name=dtype_name, seeds=seeds, done=done, device=device)
            for written in pieces:
                done = written
                on_progress(done, total)
    if len(shards) > 1:
        weight_map = {plan.name: name for name, shard in zip(names, shards, strict=True) for plan in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")
