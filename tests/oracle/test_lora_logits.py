"""Logits with adapters: the reference equals weights that `peft` has merged, the native kernels are near it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.engine.lora.adapter import LoraLimits, read_adapter
from penstock.kernels import ops
from penstock.kernels.adapters import AdapterWeights
from penstock.kernels.quantization import Quantization
from penstock.models.interface import LoadedModel
from tests.oracle.lora_adapters import LINEARS, LLAMA_LINEARS, AdapterSpec, merged, save_adapter
from tests.oracle.paged_driver import PagedDriver, run_schedule
from tests.oracle.test_family_logits import SCHEDULE, tokens_by_name
from tests.oracle.test_native_families import BLOCK_SIZE, MOST_ERROR, checkpoint, load

TOLERANCE = 2e-4
"""Merging rounds each weight to float32 once more, before the sums of some tens of layers' inputs."""
LIMITS = LoraLimits(max_rank=8, max_bytes=1 << 30)
MOST_ROUNDED = 0.12
"""As `MOST_ERROR`, where inputs are int8 too: what bfloat16 has rounded before falls to another of 255 values."""
FAMILIES = ("llama", "qwen2", "gemma2", "phi3", "gpt2", "mixtral")


def specs(family: str) -> dict[str, AdapterSpec]:
    """Two adapters of different rank and reach; the sequence `c` of the schedule has none."""
    targets = LINEARS.get(family, LLAMA_LINEARS)
    return {
        "a": AdapterSpec(seed=1, targets=targets),
        "b": AdapterSpec(seed=2, rank=7, alpha=3.0, targets=targets[1:3], rslora=True),
    }


def weights_of(loaded: LoadedModel, folder: Path) -> AdapterWeights:
    assert loaded.sites is not None
    adapter = read_adapter(folder, sites=loaded.sites, limits=LIMITS)
    return ops.prepare_adapter(
        loaded.kernels, adapter.pairs, num_sites=len(loaded.sites.sites), dtype=loaded.dtype
    )


def logits(loaded: LoadedModel, folders: dict[str, Path]) -> dict[str, Tensor]:
    driver = PagedDriver(loaded, block_size=BLOCK_SIZE)
    driver.adapters = {name: weights_of(loaded, folder) for name, folder in folders.items()}
    return run_schedule(driver, tokens_by_name(4), SCHEDULE)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_merged_weights_and_native_ones_are_near(family: str, tmp_path: Path) -> None:
    path = checkpoint(family, tmp_path / "base")
    folders = {name: save_adapter(path, tmp_path / name, spec) for name, spec in specs(family).items()}
    exact = logits(load(path, "reference", "float32", enable_lora=True), folders)
    for name, spec in specs(family).items():
        with torch.inference_mode():
            expected = merged(path, spec)(torch.tensor([tokens_by_name(4)[name]])).logits[0]
        torch.testing.assert_close(exact[name], expected, atol=TOLERANCE, rtol=TOLERANCE)
    loaded = load(path, "native", enable_lora=True)
    assert loaded.execution == "recorded"
    for name, got in logits(loaded, folders).items():
        assert (got - exact[name]).square().mean().sqrt() < MOST_ERROR * exact[name].std(), name


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_adapters_beside_quantized_weights_are_near_the_reference_of_the_same_rounding(
    method: str, tmp_path: Path
) -> None:
    path = checkpoint("llama", tmp_path / "base")
    folders = {name: save_adapter(path, tmp_path / name, spec) for name, spec in specs("llama").items()}
    rule = Quantization(method=method, group_size=32 if method == "int4" else 128)  # type: ignore[arg-type]
    exact = logits(load(path, "reference", "float32", enable_lora=True, quantization=rule), folders)
    got = logits(load(path, "native", enable_lora=True, quantization=rule), folders)
    for name, expected in exact.items():
        assert (got[name] - expected).square().mean().sqrt() < MOST_ROUNDED * expected.std(), name
