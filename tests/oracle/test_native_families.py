"""Every family on the native kernels: near float32, and recorded as operation by operation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import passes
from penstock.kernels.cpu.kernel_set import NativeKernels
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Quantization
from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from penstock.models.recorded import RecordedModel
from tests.oracle.checkpoints import FAMILIES, tiny_model
from tests.oracle.paged_driver import PagedDriver, run_schedule
from tests.oracle.test_family_logits import SCHEDULE, VOCAB_SIZE, tokens_by_name

BLOCK_SIZE = 16
HEAD_DIM = 32
VARIANTS = ("llama-all-biases", "qwen3-biases-tied", "gemma2-no-caps", "phi3-partial-rope")
NAMES = [*FAMILIES, *VARIANTS]
MOST_ERROR = 0.05
"""Root mean square of logits' errors over their spread: bfloat16 keeps 8 bits, some tens of roundings deep."""
NEAR_TIE = 0.3
"""A greedy token may differ where the oracle's own logits of both lie as near, in spreads."""


def checkpoint(family: str, path: Path) -> Path:
    tiny_model(family, vocab_size=VOCAB_SIZE, head_dim=HEAD_DIM).save_pretrained(path)
    return path


def load(path: Path, kernels: str, dtype: str = "bfloat16", **options: object) -> LoadedModel:
    made = KernelOptions(**options)  # type: ignore[arg-type]  # as the tests write them
    return load_model(path, dtype=dtype, kernels=kernels, device="cpu", options=made)


def logits(loaded: LoadedModel, seed: int = 4) -> Tensor:
    driver = PagedDriver(loaded, block_size=BLOCK_SIZE)
    return torch.cat(list(run_schedule(driver, tokens_by_name(seed), SCHEDULE).values()))


@pytest.mark.parametrize("family", NAMES)
def test_native_logits_are_near_those_of_the_reference_in_float32(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, tmp_path)
    exact = logits(load(path, "reference", "float32"))
    loaded = load(path, "native")
    assert loaded.execution == "recorded"
    got = logits(loaded)
    spread = exact.std()
    assert (got - exact).square().mean().sqrt() < MOST_ERROR * spread
    lost = exact.max(dim=1).values - exact.gather(1, got.argmax(dim=1, keepdim=True)).squeeze(1)
    assert lost.max() < NEAR_TIE * spread


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
@pytest.mark.parametrize("family", NAMES)
def test_a_recorded_pass_equals_operation_by_operation_bit_for_bit(
    family: str, quantization: str, tmp_path: Path
) -> None:
    """As recorded, without the passes that keep more digits than the model's own roundings."""
    if quantization != "none" and family in VARIANTS:
        pytest.skip("the families cover it")
    rule = Quantization(method=quantization, group_size=32 if quantization == "int4" else 128)  # type: ignore[arg-type]
    loaded = load(checkpoint(family, tmp_path), "native", quantization=rule)
    assert isinstance(loaded.model, RecordedModel)
    assert isinstance(loaded.kernels, NativeKernels)
    plain = loaded.model.plain
    as_recorded = RecordedModel(
        plain,
        loaded.kernels,
        kv=loaded.kv_shape(block_size=BLOCK_SIZE),
        dtype=loaded.dtype,
        rewrite=passes.lower,
    )
    alone = logits(replace(loaded, model=plain))
    assert torch.equal(logits(replace(loaded, model=as_recorded)), alone)
