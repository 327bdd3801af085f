"""The model author's sampling is used where the client says nothing, and checked like a client's."""

import json
from pathlib import Path

import pytest

from penstock.core.errors import CheckpointError
from penstock.core.params import SamplingParams
from penstock.text.generation_defaults import read_default_sampling


def test_a_checkpoint_without_the_file_or_with_nulls_suggests_nothing(tmp_path: Path) -> None:
    assert read_default_sampling(tmp_path) == SamplingParams()
    (tmp_path / "generation_config.json").write_text('{"temperature": null, "eos_token_id": [1]}')
    assert read_default_sampling(tmp_path) == SamplingParams()


def test_the_suggestions_are_read(tmp_path: Path) -> None:
    values = {
        "temperature": 0.6,
        "top_p": 0.9,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "do_sample": True,
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(values))
    expected = SamplingParams(temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.05)
    assert read_default_sampling(tmp_path) == expected


@pytest.mark.parametrize(("field", "value"), [("top_p", 7), ("temperature", "hot"), ("top_k", 1.5)])
def test_a_bad_suggestion_is_refused_by_file_and_field(tmp_path: Path, field: str, value: object) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({field: value}))
    with pytest.raises(CheckpointError, match=f"generation_config.json: .*{field}"):
        read_default_sampling(tmp_path)
