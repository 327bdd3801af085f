"""GGUF files through the loader and the whole engine; `gguf` names and writes, our plain loader is the oracle."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from penstock.models.gguf.source import open_gguf
from penstock.models.loader import load_model
from tests.oracle.checkpoints import FAMILIES, tiny_model
from tests.oracle.greedy_engine import greedy_answers
from tests.oracle.paged_driver import PagedDriver
from tools.quantized.gguf_file import TYPES, write_gguf

VOCAB = 101
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
REFERENCE = {"kernels": "reference", "dtype": "float32"}
TOKENS = [3, 14, 15, 92, 65, 35, 89]
IN_METADATA = {"llama": "llama-plain-rope-tied"}
"""Llama 3's frequencies are no metadata, they are a tensor."""


def checkpoint(folder: Path, family: str) -> Path:
    sizes = {"n_embd": 256} if family == "gpt2" else SIZES
    sizes = sizes | ({"mlp_only_layers": [], "moe_intermediate_size": 64} if family == "qwen3_moe" else {})
    name = IN_METADATA.get(family, family)
    model = tiny_model(name, vocab_size=VOCAB, **sizes)
    if family.startswith("gemma"):  # the file does not say it: the head size decides, as in all releases
        model.config.query_pre_attn_scalar = SIZES["head_dim"]
    if family == "gemma3":  # the pattern of the family
        model.config.layer_types = ["sliding_attention"] * 4
    model.save_pretrained(folder)
    return folder


def logits(path: Path) -> Tensor:
    return PagedDriver(load_model(path, **REFERENCE)).step([("a", TOKENS)])["a"]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_read_from_a_gguf_file(family: str, tmp_path: Path) -> None:
    """In float32 the logits are those of the folder.

    Not bit for bit: the file rounds the norm's epsilon to float32, and Gemma's norms lose a digit to the one that
    is added to them.
    """
    source = checkpoint(tmp_path / "source", family)
    write_gguf(source, tmp_path / "model.gguf", kind="F32")
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(source), atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("qwen2"), "qwen2")


def dequantized(source: Path, folder: Path, *, kind: str) -> tuple[Path, Path]:
    """A GGUF file, and a plain folder of what the `gguf` package says it stands for."""
    file = folder / "model.gguf"
    meant = write_gguf(source, file, kind=kind)
    config = json.loads((source / "config.json").read_text())
    _, stored = open_gguf(file)
    tensors = {}
    for name in stored:
        values = meant[stored._places[name].name]
        tensors[name] = torch.from_numpy(np.ascontiguousarray(values)).float()
    plain = folder / "plain"
    plain.mkdir()
    save_file(tensors, plain / "model.safetensors")
    (plain / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    return file, plain


@pytest.mark.parametrize("kind", TYPES)
def test_greedy_answers_are_those_of_the_dequantized_weights(kind: str, qwen2: Path, tmp_path: Path) -> None:
    file, plain = dequantized(qwen2, tmp_path, kind=kind)
    if kind in {"Q4_0", "Q8_0", "Q4_K", "Q6_K"}:
        assert greedy_answers(file, **REFERENCE) == greedy_answers(plain, **REFERENCE)
    else:
        assert torch.equal(logits(file), logits(plain))


def test_factors_of_frequencies_are_honoured(tmp_path: Path) -> None:
    """Llama 3's scaling lies in the file as divisors of the frequencies."""
    import gguf

    from tools.quantized import gguf_file

    source = tmp_path / "source"
    tiny_model("llama", vocab_size=VOCAB, head_dim=16).save_pretrained(source)
    rope = json.loads((source / "config.json").read_text())["rope_parameters"]
    plain = rope["rope_theta"] ** -(np.arange(0, 16, 2) / 16)
    waves = rope["original_max_position_embeddings"] * plain / (2 * np.pi)
    span = rope["high_freq_factor"] - rope["low_freq_factor"]
    blend = np.clip((waves - rope["low_freq_factor"]) / span, 0, 1)
    factors = 1 / ((1 - blend) / rope["factor"] + blend)
    original = gguf_file.gguf_tensors

    def with_factors(*args):  # type: ignore[no-untyped-def]
        return original(*args) | {"rope_freqs.weight": factors.astype(np.float32)}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "gguf_tensors", with_factors)
        write_gguf(source, tmp_path / "model.gguf", kind="F32")
    assert "rope_freqs.weight" in {tensor.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    torch.testing.assert_close(logits(tmp_path / "model.gguf"), logits(source), atol=1e-4, rtol=1e-4)


def test_the_start_table_says_what_became_of_the_blocks(qwen2: Path, tmp_path: Path) -> None:
    write_gguf(qwen2, tmp_path / "model.gguf", kind="Q4_0")
    loaded = load_model(tmp_path / "model.gguf", kernels="native")
    assert loaded.quantization == (
        "gguf (11 F32, 14 Q4_0, 1 Q8_0): 14 kept as int4, groups of 32, activations bf16; "
        "1 dequantized to bfloat16"
    )
    assert loaded.architecture == "Qwen2ForCausalLM"
