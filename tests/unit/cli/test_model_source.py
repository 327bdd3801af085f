"""A model's name leads to a folder, its revision, and an early error if files are missing or cut."""

import json
from pathlib import Path

import pytest

from penstock.cli.model_source import check_folder, find_model, folder_revision
from penstock.core.errors import CheckpointError, StartupError, UnsupportedModelError


def _write_safetensors(path: Path, *, num_bytes: int, promised: int) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [promised], "data_offsets": [0, promised]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * num_bytes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "my-model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "tokenizer.json").write_text("{}")
    _write_safetensors(path / "model.safetensors", num_bytes=8, promised=8)
    return path


def test_a_folder_is_named_by_its_last_part(folder: Path) -> None:
    source = find_model(str(folder))
    assert (source.name, source.root, source.path) == ("my-model", "my-model", folder)


def test_no_name_is_the_embedded_model() -> None:
    assert find_model(None).name == "penstock-tales"
    assert find_model("penstock-tales").path == find_model(None).path


def test_a_revision_is_only_for_the_hub(folder: Path) -> None:
    with pytest.raises(StartupError, match="revision"):
        find_model(str(folder), revision="main")


def test_the_revision_of_a_folder_changes_with_its_files(folder: Path) -> None:
    before = folder_revision(folder)
    assert folder_revision(folder) == before
    (folder / "config.json").write_text('{"a": 1}')
    assert folder_revision(folder) != before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=r"safetensors" if "safe" in name else name):
        check_folder(folder, name="m")


def test_a_file_shorter_than_its_header_says_is_refused(folder: Path) -> None:
    _write_safetensors(folder / "model.safetensors", num_bytes=7, promised=8)
    with pytest.raises(CheckpointError, match=r"model\.safetensors has .* bytes, its header says"):
        check_folder(folder, name="m")


@pytest.mark.parametrize("data", [b"", b"\x10", b"\xff" * 16, (4).to_bytes(8, "little") + b"[[[["])
def test_a_file_that_is_no_safetensors_is_refused(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        check_folder(folder, name="m")


def test_a_config_that_is_not_json_is_refused(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        check_folder(folder, name="m")


def test_an_unknown_architecture_is_refused_with_the_list_of_known_ones(folder: Path) -> None:
    (folder / "config.json").write_text('{"architectures": ["FooForCausalLM"]}')
    with pytest.raises(UnsupportedModelError, match="FooForCausalLM.*LlamaForCausalLM"):
        check_folder(folder, name="m")
