"""A draft model with other tokens is refused at start, by what differs."""

import json

import pytest

from penstock.core.errors import CheckpointError, StartupError
from penstock.engine.config import EngineConfig, SpeculativeConfig, read_speculative, validate_engine_config
from penstock.engine.spec.vocabulary import check_same_tokens


def folder(path, vocab, added=()):
    path.mkdir()
    tokens = [{"id": token_id, "content": text} for token_id, text in added]
    (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocab}, "added_tokens": tokens}))
    return path


def test_equal_tokens_pass_however_they_are_written(tmp_path):
    ours = folder(tmp_path / "a", {"x": 0, "y": 1}, added=[(2, "<end>")])
    theirs = folder(tmp_path / "b", {"x": 0, "y": 1, "<end>": 2})
    check_same_tokens(ours, target=theirs)


def test_the_first_token_that_differs_is_named(tmp_path):
    ours, theirs = folder(tmp_path / "a", {"x": 0, "y": 1}), folder(tmp_path / "b", {"x": 0, "z": 1})
    with pytest.raises(StartupError, match="token 1 is 'y'.*'z'"):
        check_same_tokens(ours, target=theirs)


def test_a_broken_file_is_an_error_of_the_checkpoint(tmp_path):
    ours, theirs = folder(tmp_path / "a", {"x": 0}), folder(tmp_path / "b", {"x": 0})
    (ours / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError):
        check_same_tokens(ours, target=theirs)


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"method": "eagle"}, "method"),
        ({"method": "ngram", "depth": 3}, "depth"),
        ({}, "method"),
        ({"method": "ngram", "num_speculative_tokens": "many"}, "num_speculative_tokens"),
    ],
)
def test_a_wrong_key_is_refused_by_name(given, word):
    with pytest.raises(StartupError, match=word):
        read_speculative(given)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (SpeculativeConfig(method="ngram", num_speculative_tokens=33), "num_speculative_tokens"),
        (SpeculativeConfig(method="ngram", prompt_lookup_min=5, prompt_lookup_max=4), "prompt_lookup_min"),
        (SpeculativeConfig(method="ngram", model="x"), "model"),
        (SpeculativeConfig(method="draft_model"), "model"),
        (SpeculativeConfig(method="draft_model", model="x", prompt_lookup_min=2), "prompt_lookup_min"),
    ],
)
def test_a_config_out_of_range_is_refused_by_name(config, word):
    with pytest.raises(StartupError, match=word):
        validate_engine_config(EngineConfig(model_path="x", speculative=config))
