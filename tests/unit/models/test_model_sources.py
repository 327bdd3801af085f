"""Where models come from: the registry, entry points, folders, the hub, the package itself."""

from fnmatch import fnmatch
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import CheckpointError, StartupError, UnsupportedModelError
from penstock.models import hub, registry
from penstock.models.config import read_json_config
from penstock.models.embedded_model import embedded_path
from penstock.models.llama import build_model
from penstock.models.loader import load_model
from penstock.models.registry import ARCHITECTURES, CLASSIFIERS, find_model, known_architectures

ADDITIONAL_TEMPLATES = "additional_chat_templates"


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *CLASSIFIERS])
def test_every_listed_architecture_has_its_file(architecture: str) -> None:
    assert callable(find_model(architecture))


def test_a_model_from_outside_is_found_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(
        name="OtherForCausalLM", group="penstock.models", value="penstock.models.llama:build_model"
    )

    def points(*, group: str, name: str | None = None) -> list[EntryPoint]:
        assert group == "penstock.models"
        return [point] if name in (None, point.name) else []

    monkeypatch.setattr(registry, "entry_points", points)
    assert find_model("OtherForCausalLM") is build_model
    assert "OtherForCausalLM" in known_architectures()
    with pytest.raises(UnsupportedModelError, match="OtherForCausalLM"):
        find_model("Nowhere")


def test_a_folder_is_its_own_answer(tmp_path: Path) -> None:
    assert hub.resolve_model(str(tmp_path)) == tmp_path


@pytest.mark.parametrize("name", ["../x/y/z", "a/b/c", "", "no such folder", "-x", "/absent/folder"])
def test_what_is_neither_folder_nor_id_is_refused(name: str) -> None:
    with pytest.raises(StartupError, match="no such folder, and not a hub id") as caught:
        hub.resolve_model(name)
    assert caught.value.param == "model"


def test_a_revision_of_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="revision is 'main'"):
        hub.resolve_model(str(tmp_path), revision="main")


def test_an_id_out_of_reach_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tests run with the hub switched off."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    with pytest.raises(StartupError, match="could not be fetched from the hub") as caught:
        hub.resolve_model("penstock-tests/absent", on_progress=lambda done, total: None)
    assert "\n" not in caught.value.message


def test_only_data_files_are_fetched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: dict[str, Any] = {}

    def fetch(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hub.resolve_model("org/name", revision="abc") == tmp_path
    assert (asked["name"], asked["revision"]) == ("org/name", "abc")
    assert all(pattern.endswith((".safetensors", ".json", ".jinja")) for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "chat_template.jinja",
        f"{ADDITIONAL_TEMPLATES}/tool_use.jinja",
        "tokenizer.json",
    ],
)
def test_every_file_that_is_read_is_fetched(name: str) -> None:
    assert any(fnmatch(name, pattern) for pattern in hub.ALLOWED_FILES)


@pytest.mark.parametrize("name", ["modeling_x.py", "pytorch_model.bin", f"{ADDITIONAL_TEMPLATES}/x.py"])
def test_no_code_is_fetched(name: str) -> None:
    assert not any(fnmatch(name, pattern) for pattern in hub.ALLOWED_FILES)


def test_fetched_bytes_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def fetch(_: str, *, tqdm_class: Any, **__: Any) -> str:
        with tqdm_class(total=10, unit="B", name="x") as bar:
            bar.update(10)
            bar.refresh()
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    hub.resolve_model("org/name", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (10, 10)


def test_a_config_larger_than_the_limit_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.models.config.MAX_CONFIG_BYTES", 4)
    (tmp_path / "config.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match="larger than the limit of 4 bytes"):
        read_json_config(tmp_path / "config.json")


def test_the_embedded_model_loads() -> None:
    loaded = load_model(embedded_path())
    assert loaded.architecture == "LlamaForCausalLM"
    assert loaded.max_model_len == 4096
    assert loaded.weights_bytes <= 20_000_000
