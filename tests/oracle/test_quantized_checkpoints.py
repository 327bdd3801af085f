"""Quantized checkpoints through the whole engine: the answers are those of the weights that they stand for."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu.weights import PackedLinear, unpacked
from penstock.kernels.options import KernelOptions
from penstock.kernels.quantization import Quantization
from penstock.layers.linear import SeparateLinears
from penstock.models.llama import LlamaForCausalLM
from penstock.models.loader import load_model
from penstock.models.recorded import RecordedModel
from tests.oracle.checkpoints import tiny_model
from tests.oracle.greedy_engine import greedy_answers
from tests.oracle.paged_driver import PagedDriver
from tools.quantized.checkpoint import read_tensors, write_dequantized, write_quantized

VOCAB = 101
SIZES = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
EXACT = ("awq-g64-symmetric", "gptq-g128", "gptq-all-inputs", "w4a16-g128", "w8a8", "bitsandbytes-int8")
"""Whose integers and scales the native kernels keep."""
REFERENCE = {"kernels": "reference", "dtype": "float32"}


def checkpoint(folder: Path, family: str = "llama") -> Path:
    sizes = {"n_embd": 128} if family == "gpt2" else SIZES
    sizes = sizes | ({"moe_intermediate_size": 32} if family == "qwen3_moe" else {})
    tiny_model(family, vocab_size=VOCAB, **sizes).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("llama"))


ONE_OF_EACH = (
    "awq-g32", "gptq-g32-act-order", "w4a16-g32-asymmetric", "w8a8-asymmetric", "fp8-block", "nf4-nested",
    "bitsandbytes-int8",
)  # fmt: skip
"""Forms whose inputs are not rounded."""


@pytest.mark.parametrize("form", ONE_OF_EACH)
def test_greedy_answers_are_those_of_the_dequantized_weights(form: str, llama: Path, tmp_path: Path) -> None:
    """On the reference kernels in float32, where both are exact."""
    quantized = write_quantized(llama, tmp_path / "quantized", form)
    plain = write_dequantized(llama, tmp_path / "plain", form)
    assert greedy_answers(quantized, **REFERENCE) == greedy_answers(plain, **REFERENCE)


@pytest.mark.parametrize("family", ["gpt2", "phi3", "mixtral", "qwen3_moe"])
def test_transposed_and_fused_layers_and_experts_are_read_quantized(family: str, tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", family)
    quantized = write_quantized(source, tmp_path / "quantized", "gptq-g32")
    plain = write_dequantized(source, tmp_path / "plain", "gptq-g32")
    logits = [
        PagedDriver(load_model(folder, **REFERENCE)).step([("a", [3, 14, 15, 92])])["a"]
        for folder in (quantized, plain)
    ]
    assert torch.equal(*logits)


def packed_weights(folder: Path) -> dict[str, Tensor]:
    """What the native kernels multiply by, of the first block."""
    loaded = load_model(folder, kernels="native", dtype="bfloat16")
    assert isinstance(loaded.model, RecordedModel)
    model = loaded.model.plain
    assert isinstance(model, LlamaForCausalLM)
    block = model.blocks[0]
    projections = block.attention.query_key_value
    assert isinstance(projections, SeparateLinears)
    layers = {"self_attn.q_proj": projections.linears[0], "mlp.down_proj": block.mlp.down}
    found = {}
    for name, layer in layers.items():
        assert isinstance(layer.weight, PackedLinear)
        assert layer.weight.quantization.method != "none"
        found[f"model.layers.0.{name}.weight"] = unpacked(layer.weight)
    return found


@pytest.mark.parametrize("form", EXACT)
def test_native_weights_are_bit_for_bit_what_the_file_stands_for(
    form: str, llama: Path, tmp_path: Path
) -> None:
    """The same integers and scales: nothing is rounded a second time."""
    quantized = write_quantized(llama, tmp_path / "quantized", form)
    plain = read_tensors(write_dequantized(llama, tmp_path / "plain", form))
    for name, weight in packed_weights(quantized).items():
        assert torch.equal(weight, plain[name])


@pytest.mark.parametrize("form", ["gptq-g32", "awq-g32"])
def test_a_quantized_checkpoint_can_be_rounded_once_more_if_asked(
    form: str, llama: Path, tmp_path: Path
) -> None:
    """`--quantization int8` over GPTQ is int8 of the weights that it stands for."""
    quantized = write_quantized(llama, tmp_path / "quantized", form)
    plain = write_dequantized(llama, tmp_path / "plain", form)
    options = KernelOptions(quantization=Quantization(method="int8", activations="bf16"))
    loaded = [load_model(folder, options=options, **REFERENCE) for folder in (quantized, plain)]
    assert loaded[0].quantization.startswith("int8, activations bf16, from ")
    logits = [PagedDriver(each).step([("a", [3, 14, 15, 92])])["a"] for each in loaded]
    assert torch.equal(*logits)


def test_the_start_table_says_what_became_of_the_weights(llama: Path, tmp_path: Path) -> None:
    kept = load_model(write_quantized(llama, tmp_path / "kept", "gptq-g32"), kernels="native")
    assert kept.quantization == ("gptq int4, groups of 32: 14 kept as int4, groups of 32, activations bf16")
    dequantized = load_model(write_quantized(llama, tmp_path / "awq", "awq-g32"), kernels="native")
    assert dequantized.quantization == "awq int4, groups of 32: 14 dequantized to bfloat16"
