"""What a model must compute: operations of a token, counted from the shapes in the checkpoint's headers."""

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import CheckpointError

EMBEDDINGS: Final = ("embed_tokens.weight", "wte.weight")
HEAD: Final = "lm_head.weight"
MAX_HEADER_BYTES: Final = 100_000_000


class _Entry(msgspec.Struct):
    shape: list[int]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCost:
    """Multiply-adds count twice; attention's own products are left out, they are below a tenth here."""

    body_flops: int
    """Of each token that goes through the layers: 2 per weight of a matrix."""
    head_flops: int
    """Of each token that is drawn, on top."""

    def flops(self, *, num_computed: float, num_generated: float) -> float:
        """Of a run: prompt tokens that were computed (not found in a cache), and tokens that were drawn.

        The last token of an answer is drawn and never computed; with answers of dozens that is nothing.
        """
        return self.body_flops * (num_computed + num_generated) + self.head_flops * num_generated


def read_model_cost(folder: Path) -> ModelCost:
    """From the headers of a checkpoint's files; experts count as if all were used.

    Raises:
        CheckpointError: a header cannot be read.
    """
    shapes: dict[str, list[int]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes |= _read_shapes(path)
    embedding = next((shape for name, shape in shapes.items() if name.endswith(EMBEDDINGS)), [0, 0])
    head = next((shape for name, shape in shapes.items() if name.endswith(HEAD)), embedding)
    body = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if len(shape) == 2 and not name.endswith((*EMBEDDINGS, HEAD))
    )
    return ModelCost(body_flops=2 * body, head_flops=2 * math.prod(head))


def _read_shapes(path: Path) -> dict[str, list[int]]:
    try:
        with path.open("rb") as file:
            (num_bytes,) = struct.unpack("<Q", file.read(8))
            header = file.read(min(num_bytes, MAX_HEADER_BYTES))
        raw = msgspec.json.decode(header, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(entry, type=_Entry).shape
            for name, entry in raw.items()
            if name != "__metadata__"
        }
    except (OSError, struct.error, msgspec.MsgspecError) as error:
        raise CheckpointError(f"the header of {path.name} cannot be read: {error}") from error
