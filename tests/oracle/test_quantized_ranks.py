"""Quantized checkpoints that two ranks share: each keeps its part of a weight as the file has it."""

from pathlib import Path

import pytest
import torch

from penstock.models.loader import load_model
from penstock.parallel.rank import Rank
from tests.fakes.thread_ranks import run_ranks
from tests.oracle.checkpoints import tiny_model
from tests.oracle.paged_driver import PagedDriver
from tools.quantized.checkpoint import write_quantized

TOKENS = [3, 14, 15, 92]
TOLERANCE = 5e-5
"""As of plain weights: sums over the ranks round in another order, in float32."""
KEPT = {
    "fp8-channel": "compressed-tensors fp8, a scale a channel: 14 kept as fp8, activations bf16",
    "bitsandbytes-int8": "bitsandbytes int8: 14 kept as int8, activations bf16",
    "gptq-g32": (
        "gptq int4, groups of 32: 10 kept as int4, groups of 32, activations bf16; 4 dequantized to float32"
    ),
    "nf4": "bitsandbytes nf4: 14 dequantized to float32",
}
"""Of two layers; a group may end where a rank's inputs do not."""


@pytest.mark.parametrize("form", KEPT)
def test_two_ranks_compute_the_logits_of_one_and_keep_what_they_can(form: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
    tiny_model("llama", vocab_size=101, **sizes).save_pretrained(tmp_path / "plain")
    path = write_quantized(tmp_path / "plain", tmp_path / "quantized", form)
    (expected,) = (
        PagedDriver(load_model(path, dtype="float32", kernels="reference")).step([("a", TOKENS)]).values()
    )

    def work(rank: Rank) -> None:
        part = load_model(path, dtype="float32", kernels="reference", rank=rank)
        assert part.quantization == KEPT[form]
        (got,) = PagedDriver(part).step([("a", TOKENS)]).values()
        torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)

    run_ranks(work)
