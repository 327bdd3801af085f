"""Perplexity of the embedded model on Penstock's own kernels, by how its weights are quantized.

Windows and counting are those of `evaluate`; the model runs through `load_model` and the native kernels, one
window at a time. It prints one JSON document, whose figures stand in the model card:

    python -m tools.embedded.quantized --corpus ../shared/corpus
"""

import argparse
import json
import math
from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer
from torch import Tensor

from penstock.engine.kv.cache_groups import make_cache_layout
from penstock.kernels import ops
from penstock.kernels.batch import AttentionBatch, ForwardBatch
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization
from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from tools.embedded.data import encode_held_out
from tools.embedded.evaluate import STRIDE, WINDOW

BLOCK_SIZE: Final = 16
BOS_ID: Final = 0
RULES: Final = {
    "bfloat16": NO_QUANTIZATION,
    "int8": Quantization(method="int8"),
    "int8, activations bf16": Quantization(method="int8", activations="bf16"),
    "int4, groups of 32": Quantization(method="int4", group_size=32),
    "int4, groups of 64": Quantization(method="int4", group_size=64),
    "int4, groups of 128": Quantization(method="int4", group_size=128),
    "int4, groups of 32, activations bf16": Quantization(method="int4", group_size=32, activations="bf16"),
}


class Scorer:
    """Teacher-forced losses of one window at a time."""

    def __init__(self, loaded: LoadedModel) -> None:
        assert len(make_cache_layout(loaded.model.layer_windows).groups) == 1, "one kind of layer"
        self._model = loaded.model
        shape = loaded.kv_shape(block_size=BLOCK_SIZE)
        num_blocks = WINDOW // BLOCK_SIZE
        self._slabs = tuple(
            ops.make_slab(loaded.kernels, shape, num_blocks=num_blocks) for _ in loaded.model.layer_windows
        )

    def _batch(self, tokens: Tensor) -> ForwardBatch:
        count = len(tokens)
        blocks = torch.arange(-(-count // BLOCK_SIZE), dtype=torch.int32)
        group = AttentionBatch(
            query_start_loc=torch.tensor([0, count], dtype=torch.int32),
            seq_lens=torch.tensor([count], dtype=torch.int32),
            block_tables=blocks[None],
            slot_mapping=torch.arange(count),
            query_lens_host=(count,),
            seq_lens_host=(count,),
        )
        return ForwardBatch(
            token_ids=tokens,
            positions=torch.arange(count),
            groups=(group,),
            layer_groups=(0,) * len(self._slabs),
            layer_slabs=self._slabs,
        )

    @torch.inference_mode()
    def logits(self, tokens: Tensor) -> Tensor:
        """[count, vocab_size] after each of at most `WINDOW` tokens."""
        return self._model.logits(self._model.forward(self._batch(tokens))).clone()

    @torch.inference_mode()
    def losses(self, tokens: Tensor) -> Tensor:
        """Nats of `tokens[1:]`, each given what precedes it; at most `WINDOW` tokens."""
        logits = self._model.logits(self._model.forward(self._batch(tokens)))[:-1]
        return torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")

    def perplexity(self, ids: Tensor) -> float:
        """Per token, each counted once, with 512 to 1,023 tokens before it."""
        stream = torch.cat((torch.tensor([BOS_ID]), ids))
        total = 0.0
        for start in range(0, max(1, len(stream) - STRIDE), STRIDE):
            losses = self.losses(stream[start : start + WINDOW].clone())
            total += losses[0 if start == 0 else STRIDE - 1 :].sum().item()
        return math.exp(total / len(ids))


def load_native(folder: Path, rule: Quantization) -> LoadedModel:
    """The model in bfloat16 on the native kernels."""
    return load_model(folder, dtype="bfloat16", kernels="native", options=KernelOptions(quantization=rule))


def main() -> None:
    """Measure every rule from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=0, help="of the book; 0 means all")
    arguments = parser.parse_args()
    held_out = encode_held_out(Tokenizer.from_file(str(arguments.model / "tokenizer.json")), arguments.corpus)
    ids = torch.from_numpy(held_out).long()
    ids = ids[: arguments.tokens] if arguments.tokens else ids
    torch.set_num_threads(1)
    figures = {
        name: Scorer(load_native(arguments.model, rule)).perplexity(ids) for name, rule in RULES.items()
    }
    plain = figures["bfloat16"]
    rises = {name: f"{100 * (value / plain - 1):+.2f} %" for name, value in figures.items()}
    print(json.dumps({"tokens": len(ids), "perplexity": figures, "against bfloat16": rises}, indent=2))


if __name__ == "__main__":
    main()
