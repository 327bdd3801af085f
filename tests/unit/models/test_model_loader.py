"""Loading a whole checkpoint: what is chosen, what is converted, what is refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import CheckpointError, StartupError, UnsupportedModelError
from penstock.kernels.reference.weights import PlainLinear
from penstock.models.checkpoint import read_entries
from penstock.models.llama import LlamaForCausalLM
from penstock.models.loader import load_model
from tests.unit.models.safetensors_file import write

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 8,
    "intermediate_size": 6,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "auto_map": {"AutoModelForCausalLM": "evil.Model"},
}
LAYER = "model.layers.0."
SHAPES = {
    "model.embed_tokens.weight": (11, 8),
    f"{LAYER}input_layernorm.weight": (8,),
    f"{LAYER}self_attn.q_proj.weight": (8, 8),
    f"{LAYER}self_attn.k_proj.weight": (4, 8),
    f"{LAYER}self_attn.v_proj.weight": (4, 8),
    f"{LAYER}self_attn.o_proj.weight": (8, 8),
    f"{LAYER}post_attention_layernorm.weight": (8,),
    f"{LAYER}mlp.gate_proj.weight": (6, 8),
    f"{LAYER}mlp.up_proj.weight": (6, 8),
    f"{LAYER}mlp.down_proj.weight": (8, 6),
    "model.norm.weight": (8,),
}
NUM_PARAMETERS = 88 + 8 + 64 + 32 + 32 + 64 + 8 + 48 * 3 + 8


def tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {name: torch.ones(shape, dtype=dtype) for name, shape in SHAPES.items()}


def checkpoint(
    folder: Path, *, config: dict[str, Any] | None = None, weights: dict[str, torch.Tensor] | None = None
) -> Path:
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    write(folder / "model.safetensors", tensors() if weights is None else weights)
    return folder


def test_a_loaded_model_says_what_it_is(tmp_path: Path) -> None:
    loaded = load_model(checkpoint(tmp_path))
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.num_parameters == NUM_PARAMETERS
    assert loaded.weights_bytes == 4 * NUM_PARAMETERS
    assert loaded.max_model_len == 32
    assert loaded.kernels.name == "eager"
    assert (loaded.model.num_kv_heads, loaded.model.head_dim, loaded.model.vocab_size) == (1, 4, 11)
    assert loaded.model.layer_windows == (None,)


@pytest.mark.parametrize(
    ("stored", "asked", "used"),
    [
        (torch.float32, "auto", torch.float32),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float16, "auto", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
        (torch.float32, "bfloat16", torch.bfloat16),
    ],
)
def test_dtype_is_the_checkpoints_or_the_one_asked_for(
    tmp_path: Path, stored: torch.dtype, asked: str, used: torch.dtype
) -> None:
    loaded = load_model(checkpoint(tmp_path, weights=tensors(stored)), dtype=asked)
    assert loaded.dtype == used
    assert loaded.weights_bytes == NUM_PARAMETERS * used.itemsize


def test_weights_of_the_models_dtype_are_views_of_the_mapped_file(tmp_path: Path) -> None:
    """No second copy: tensors lie in memory as far apart as in the file."""
    model = load_model(checkpoint(tmp_path)).model
    assert isinstance(model, LlamaForCausalLM)
    start = {name: entry.start for name, entry in read_entries(tmp_path / "model.safetensors").items()}
    apart = start["model.norm.weight"] - start["model.embed_tokens.weight"]
    assert model.norm.weight.data_ptr() - model.embedding.weight.data_ptr() == apart
    assert isinstance(model.head.weight, PlainLinear)
    assert model.head.weight.weight.data_ptr() == model.embedding.weight.data_ptr()


def test_progress_counts_the_bytes_of_the_files_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load_model(checkpoint(tmp_path), on_progress=lambda done, total: seen.append((done, total)))
    total = 4 * NUM_PARAMETERS
    assert [entry[1] for entry in seen] == [total] * len(SHAPES)
    assert sorted(entry[0] for entry in seen) == [entry[0] for entry in seen]
    assert seen[-1][0] == total


def refused(folder: Path, kind: type[StartupError], **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load_model(folder, **options)
    assert "\n" not in caught.value.message
    return caught.value.message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    weights = tensors()
    del weights["model.norm.weight"]
    message = refused(checkpoint(tmp_path, weights=weights), CheckpointError)
    assert message == "tensor 'model.norm.weight' of shape [8] is missing from the checkpoint"


def test_a_wrong_shape_is_named_before_any_data_is_read(tmp_path: Path) -> None:
    weights = {**tensors(), f"{LAYER}mlp.up_proj.weight": torch.ones(6, 9)}
    seen: list[int] = []
    folder = checkpoint(tmp_path, weights=weights)
    message = refused(folder, CheckpointError, on_progress=lambda done, _: seen.append(done))
    assert message.endswith("tensor 'model.layers.0.mlp.up_proj.weight': expected shape [6, 8], found [6, 9]")
    assert seen == []


def test_a_tensor_that_fits_no_layer_is_refused(tmp_path: Path) -> None:
    weights = {**tensors(), "model.layers.1.input_layernorm.weight": torch.ones(8), "extra": torch.ones(1)}
    message = refused(checkpoint(tmp_path, weights=weights), CheckpointError)
    assert message == (
        "tensor 'model.layers.1.input_layernorm.weight' and 1 more in the checkpoint fits no layer of the model"
    )


def test_frequencies_and_a_tied_head_in_the_file_are_ignored(tmp_path: Path) -> None:
    weights = {
        **tensors(),
        f"{LAYER}self_attn.rotary_emb.inv_freq": torch.ones(2),
        "lm_head.weight": torch.ones(11, 8),
    }
    assert load_model(checkpoint(tmp_path, weights=weights)).num_parameters == NUM_PARAMETERS


def test_an_unknown_architecture_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    message = refused(checkpoint(tmp_path, config={"architectures": ["Bert"]}), UnsupportedModelError)
    assert "'Bert' is not supported; known: GPT2ForSequenceClassification, GPT2LMHeadModel" in message


def test_a_vision_gemma_is_refused_with_the_reason(tmp_path: Path) -> None:
    config = {"architectures": ["Gemma3ForConditionalGeneration"]}
    assert "vision tower" in refused(checkpoint(tmp_path, config=config), UnsupportedModelError)


def test_an_unknown_quantized_checkpoint_is_refused_by_its_method(tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "quip"}}
    assert "'quant_method' is 'quip', which is not supported; known: awq, gptq" in refused(
        checkpoint(tmp_path, config=config), UnsupportedModelError
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": None}, "field 'architectures' is None, expected a list of strings"),
        ({"architectures": []}, "field 'architectures' is [], expected a list of one name"),
        ({"hidden_size": "8"}, "field 'hidden_size' is '8', expected a whole number from 1 to"),
        ({"hidden_size": None}, "field 'hidden_size' is None"),
        ({"hidden_size": 9}, "field 'hidden_size' is 9, expected a multiple of num_attention_heads (2)"),
        ({"hidden_size": True}, "field 'hidden_size' is True"),
        ({"num_hidden_layers": 10**9}, "expected a whole number from 1 to 1024"),
        ({"num_key_value_heads": 3}, "expected a divisor of num_attention_heads (2)"),
        ({"rms_norm_eps": float("nan")}, "field 'rms_norm_eps' is nan"),
        ({"hidden_act": "tanh"}, "field 'hidden_act' is 'tanh', expected one of silu"),
        ({"tie_word_embeddings": "yes"}, "expected true or false"),
        ({"rope_scaling": 3}, "field 'rope_scaling' is 3, expected an object"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: field 'factor' is missing"),
    ],
)
def test_each_bad_config_field_is_named_with_its_value(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    assert message in refused(checkpoint(tmp_path, config=config), CheckpointError)


def test_an_unknown_rope_type_is_refused_by_name(tmp_path: Path) -> None:
    config = {"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}
    message = refused(checkpoint(tmp_path, config=config), UnsupportedModelError)
    assert "rope type 'spiral' is not supported; known: default, dynamic, linear" in message


@pytest.mark.parametrize("content", ["{", "[1]", "[" * 100_000, "\x00"])
def test_a_broken_config_file_is_refused(tmp_path: Path, content: str) -> None:
    (checkpoint(tmp_path) / "config.json").write_text(content)
    assert refused(tmp_path, CheckpointError).startswith("config.json: ")


def test_a_missing_folder_or_config_is_refused(tmp_path: Path) -> None:
    assert "no such folder" in refused(tmp_path / "absent", CheckpointError)
    assert "config.json: cannot be read" in refused(tmp_path, CheckpointError)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', it must be one of auto, float32, bfloat16"),
        ({"kernels": "metal"}, "kernels is 'metal'"),
        ({"device": "cuda"}, "cannot run on cuda"),
        ({"max_model_len": 33}, "max_model_len is 33, the model's context allows 2 to 32"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    assert message in refused(checkpoint(tmp_path), StartupError, **options)


def test_a_shorter_context_can_be_asked_for(tmp_path: Path) -> None:
    assert load_model(checkpoint(tmp_path), max_model_len=16).max_model_len == 16
