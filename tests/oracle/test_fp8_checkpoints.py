"""Checkpoints of 8-bit floats through whole models: kept as they are by the homes that multiply them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.models.interface import LoadedModel
from penstock.models.loader import load_model
from tests.oracle.checkpoints import tiny_model
from tests.oracle.paged_driver import PagedDriver
from tools.quantized.checkpoint import read_tensors, write_dequantized, write_quantized

PROMPT = [3, 14, 15, 92]
SIZES = {"hidden_size": 64, "intermediate_size": 64, "head_dim": 32}
FAMILIES = ("llama", "mixtral")
"""Plain products; experts."""


def checkpoint(folder: Path, family: str) -> Path:
    tiny_model(family, vocab_size=101, **SIZES).save_pretrained(folder)
    return folder


def logits_of(loaded: LoadedModel) -> Tensor:
    """[tokens, vocabulary]"""
    return PagedDriver(loaded).step([("a", PROMPT)])["a"]


def error(got: Tensor, wanted: Tensor) -> float:
    """Root mean square of the error over that of the logits."""
    return float((got - wanted).square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("form", ["fp8-tensor", "fp8-channel"])
def test_kept_floats_are_the_dequantized_model_where_inputs_are_not_rounded(
    family: str, form: str, tmp_path: Path
) -> None:
    """Bit for bit on the reference kernels: they compute with what the numbers stand for."""
    source = checkpoint(tmp_path / "source", family)
    folders = (
        write_quantized(source, tmp_path / "kept", form),
        write_dequantized(source, tmp_path / "plain", form),
    )
    kept, plain = (load_model(folder, kernels="reference", dtype="float32") for folder in folders)
    assert "kept as fp8, activations bf16" in kept.quantization
    assert torch.equal(logits_of(kept), logits_of(plain))


def test_rounded_inputs_explain_what_differs(tmp_path: Path) -> None:
    """An e4m3 has 3 binary places, so that a number is off by at most 1/16 of itself, by 1/28 in the mean square,
    and so is a sum of products whose errors have no common sign. Each block adds four such products one after
    the other to what has no error, so logits are off by less than twice that after two blocks; a scale that is
    wrong is off by more than the logits. The Triton kernels round by the same rule: only numbers in the middle
    between two e4m3 fall to the other side, because their sums are in another order.
    """
    source = checkpoint(tmp_path / "source", "mixtral")
    folder = write_quantized(source, tmp_path / "kept", "fp8-dynamic")
    plain = load_model(write_dequantized(source, tmp_path / "plain", "fp8-dynamic"), dtype="float32")
    wanted = logits_of(plain)
    found = {
        home: logits_of(load_model(folder, kernels=home, dtype="float32"))
        for home in ("reference", "eager", "triton")
    }
    errors = {home: error(logits, wanted) for home, logits in found.items()}
    assert all(1e-3 < each < 2 / 28 for each in errors.values()), errors
    assert error(found["triton"], found["reference"]) < min(errors.values()) / 2


def test_the_device_home_keeps_a_byte_a_weight_and_says_so(tmp_path: Path) -> None:
    """The native home has no such products: it dequantizes, as it says."""
    source = checkpoint(tmp_path / "source", "llama")
    folder = write_quantized(source, tmp_path / "kept", "fp8-dynamic")
    kept = load_model(folder, kernels="triton", dtype="bfloat16")
    assert kept.quantization == ("compressed-tensors fp8, a scale a channel: 14 kept as fp8, activations fp8")
    dequantized = load_model(folder, kernels="native", dtype="bfloat16")
    assert dequantized.quantization.endswith(": 14 dequantized to bfloat16")
    tensors = read_tensors(folder)
    num_scales = sum(each.numel() for name, each in tensors.items() if name.endswith(".weight_scale"))
    num_floats = sum(each.numel() for each in tensors.values() if each.dtype == torch.float8_e4m3fn)
    num_others = sum(each.numel() for each in tensors.values()) - num_floats - num_scales
    assert kept.weights_bytes == num_floats + 4 * num_scales + 2 * num_others
