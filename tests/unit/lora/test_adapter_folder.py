"""A PEFT folder becomes matrices by site, or is refused with the field, file or tensor named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.errors import InvalidParameterError
from penstock.engine.lora.adapter import Adapter, LoraLimits, read_adapter
from tests.unit.lora.peft_folder import make_sites, make_tensors, write_folder

LIMITS = LoraLimits(max_rank=8, max_bytes=1 << 20)
FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


def read(folder: Path, *, limits: LoraLimits = LIMITS, allow_links: bool = False) -> Adapter:
    return read_adapter(folder, sites=make_sites(), limits=limits, allow_links=allow_links)


def refused(folder: Path, **options: Any) -> InvalidParameterError:
    with pytest.raises(InvalidParameterError) as caught:
        read(folder, **options)
    return caught.value


def test_every_target_gets_its_matrices_and_the_scale_is_alpha_over_rank(tmp_path: Path) -> None:
    tensors = make_tensors()
    adapter = read(write_folder(tmp_path, tensors=tensors))
    assert adapter.rank == 2
    assert sorted(adapter.pairs) == [0, 1, 2, 3]
    assert torch.equal(adapter.pairs[0].a, tensors[f"{FIRST}.lora_A.weight"])
    assert torch.equal(adapter.pairs[0].b, tensors[f"{FIRST}.lora_B.weight"])
    assert {pair.scale for pair in adapter.pairs.values()} == {2.0}


def test_rslora_divides_by_the_root_of_the_rank(tmp_path: Path) -> None:
    adapter = read(write_folder(tmp_path, config={"use_rslora": True}))
    assert {pair.scale for pair in adapter.pairs.values()} == {4 / math.sqrt(2)}


def test_patterns_change_rank_and_alpha_of_the_modules_they_name(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(5, 8)
    tensors[f"{FIRST}.lora_B.weight"] = torch.ones(8, 5)
    config = {"rank_pattern": {"layers.0.self_attn.q_proj": 5}, "alpha_pattern": {"v_proj": 6}}
    adapter = read(write_folder(tmp_path, config=config, tensors=tensors))
    assert [adapter.pairs[idx].rank for idx in range(4)] == [5, 2, 2, 2]
    assert [adapter.pairs[idx].scale for idx in range(4)] == [4 / 5, 3.0, 2.0, 3.0]


def test_the_revision_is_that_of_the_content_alone(tmp_path: Path) -> None:
    first = read(write_folder(tmp_path / "a"))
    assert read(write_folder(tmp_path / "b")).revision == first.revision
    assert read(write_folder(tmp_path / "c", config={"lora_alpha": 5})).revision != first.revision
    other = write_folder(tmp_path / "d", tensors=make_tensors(seed=1))
    assert read(other).revision != first.revision


@pytest.mark.parametrize(
    ("config", "param"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 9}, "r"),
        ({"r": 0}, "r"),
        ({"r": True}, "r"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"use_rslora": 1}, "use_rslora"),
        ({"bias": "all"}, "bias"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"exclude_modules": ["v_proj"]}, "exclude_modules"),
        ({"lora_bias": True}, "lora_bias"),
        ({"some_new_math": 3}, "some_new_math"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"rank_pattern": {"q_proj": 9}}, "rank_pattern.q_proj"),
        ({"rank_pattern": {".*q": 2}}, "rank_pattern"),
        ({"alpha_pattern": [1]}, "alpha_pattern"),
        ({"target_modules": "all-linear"}, "target_modules"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules"),
        ({"target_modules": [".*proj"]}, "target_modules"),
    ],
)
def test_a_field_that_is_wrong_or_unknown_is_named(
    config: dict[str, Any], param: str, tmp_path: Path
) -> None:
    error = refused(write_folder(tmp_path, config=config))
    assert error.param == param
    assert param.split(".", maxsplit=1)[0] in error.message


def test_half_a_character_in_a_field_is_shown_escaped_so_that_the_refusal_can_be_sent(tmp_path: Path) -> None:
    error = refused(write_folder(tmp_path, config={"\ud800x": 1}))
    assert error.param == "\\ud800x"
    assert error.message.encode()


def test_a_rank_of_thousands_of_digits_is_refused_in_a_line(tmp_path: Path) -> None:
    assert len(refused(write_folder(tmp_path, config={"r": 10**4000})).message) < 200


def test_a_tensor_of_another_shape_missing_or_too_many_is_named(tmp_path: Path) -> None:
    for name, change in {
        f"{FIRST}.lora_A.weight": {f"{FIRST}.lora_A.weight": torch.ones(2, 7)},
        "model.layers.0.self_attn.q_proj": {f"{FIRST}.lora_B.weight": None},
        "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": {
            "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight": torch.ones(2, 8)
        },
        "base_model.model.model.embed_tokens.lora_embedding_A": {
            "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(2, 8)
        },
    }.items():
        tensors = {**make_tensors(), **change}
        folder = write_folder(
            tmp_path, tensors={key: tensor for key, tensor in tensors.items() if tensor is not None}
        )
        assert refused(folder).param == name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused(value: float, tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[f"{FIRST}.lora_B.weight"][3, 1] = value
    assert "NaN or infinity" in refused(write_folder(tmp_path, tensors=tensors)).message


@pytest.mark.parametrize("sign", [1, -1])
def test_a_number_that_bfloat16_cannot_hold_is_refused_when_it_is_loaded(sign: int, tmp_path: Path) -> None:
    """Kernels keep adapters in bfloat16: there it would be infinite, and every answer would fail."""
    largest = torch.finfo(torch.bfloat16).max
    tensors = make_tensors()
    tensors[f"{FIRST}.lora_B.weight"][1, 1] = sign * largest
    read(write_folder(tmp_path / "largest", tensors=tensors))
    tensors[f"{FIRST}.lora_B.weight"][1, 1] = sign * 3.4e38
    error = refused(write_folder(tmp_path / "larger", tensors=tensors))
    assert error.param == f"{FIRST}.lora_B.weight"
    assert "3.4e+38" in error.message
    assert "at most 3.38953e+38" in error.message


def test_integers_are_no_weights(tmp_path: Path) -> None:
    tensors = make_tensors()
    tensors[f"{FIRST}.lora_A.weight"] = torch.ones(2, 8, dtype=torch.int32)
    assert "int32" in refused(write_folder(tmp_path, tensors=tensors)).message


def test_only_safetensors_are_read_and_a_bin_file_is_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    error = refused(folder)
    assert error.param == "adapter_model.safetensors"
    assert "adapter_model.bin is there" in error.message


def test_links_are_followed_only_where_they_are_allowed(tmp_path: Path) -> None:
    real = write_folder(tmp_path / "real")
    linked = tmp_path / "linked"
    linked.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (linked / name).symlink_to(real / name)
    assert refused(linked).param == "adapter_config.json"
    assert read(linked, allow_links=True).revision == read(real).revision


def test_a_folder_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    assert refused(folder).param == "adapter_model.safetensors"


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 64, (1 << 40).to_bytes(8, "little") + b"{}", b"PK\x03\x04pickle"]
)
def test_damaged_weights_are_refused(data: bytes, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_model.safetensors").write_bytes(data)
    assert refused(folder).param == "adapter_model.safetensors"


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null"])
def test_a_config_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    (folder / "adapter_config.json").write_text(text)
    assert refused(folder).param in {"adapter_config.json", "peft_type"}


def test_a_file_larger_than_its_rank_can_need_is_refused_unread(tmp_path: Path) -> None:
    folder = write_folder(tmp_path)
    with (folder / "adapter_model.safetensors").open("ab") as file:
        file.truncate(1 << 30)  # sparse
    error = refused(folder)
    assert error.param == "adapter_model.safetensors"
    assert str(1 << 30) in error.message


def test_more_bytes_than_the_memory_for_adapters_are_refused(tmp_path: Path) -> None:
    error = refused(write_folder(tmp_path), limits=LoraLimits(max_rank=8, max_bytes=100))
    assert "lora_memory_bytes is 100" in error.message


def test_unknown_fields_of_training_with_empty_values_are_ignored(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, config={"velora_config": None, "use_bdlora": None, "new_thing": False})
    assert json.loads((folder / "adapter_config.json").read_text())["new_thing"] is False
    assert read(folder).rank == 2
