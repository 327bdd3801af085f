"""The checkpoint maker: exact sizes, a full vocabulary, sane logits, the same bytes for the same seed."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from penstock.models.loader import load_model
from tests.oracle.paged_driver import PagedDriver
from tools.make_checkpoint.__main__ import main
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES, tensor_plans
from tools.make_checkpoint.tokenizer import make_tokenizer

TINY = [name for name in SHAPES if name.startswith("tiny-")]


@pytest.mark.parametrize("name", TINY)
def test_a_tiny_checkpoint_loads_here_and_in_transformers_with_equal_sane_logits(
    name: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    make_checkpoint(tmp_path, SHAPES[name], dtype="float32")
    tokens = [5, 300, 77, 501]
    loaded = load_model(tmp_path)
    got = PagedDriver(loaded).step([("a", tokens)])["a"]
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    assert 0.2 < got.std() < 5


def test_bfloat16_logits_are_finite(tmp_path: Path) -> None:
    loaded = load_model(make_checkpoint(tmp_path, SHAPES["tiny-llama"]))
    logits = PagedDriver(loaded).step([("a", list(range(60)))])["a"]
    assert logits.isfinite().all()


def test_shards_respect_their_limit_and_hold_the_same_numbers(tmp_path: Path) -> None:
    limit = 60_000
    make_checkpoint(tmp_path / "one", SHAPES["tiny-qwen2"])
    make_checkpoint(tmp_path / "many", SHAPES["tiny-qwen2"], max_shard_bytes=limit)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 1
    headroom = 4096  # the header
    largest = max(plan.num_elements * 2 for plan in tensor_plans(SHAPES["tiny-qwen2"]))
    assert all(path.stat().st_size <= max(limit, largest) + headroom for path in shards)
    logits = [PagedDriver(load_model(tmp_path / name)).step([("a", [3, 4])])["a"] for name in ("one", "many")]
    assert torch.equal(logits[0], logits[1])


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    files = []
    for i, seed in enumerate((1, 1, 2)):
        folder = make_checkpoint(tmp_path / str(i), SHAPES["tiny-llama"], seed=seed)
        files.append((folder / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("vocab_size", [259, 512, 4001])
def test_every_id_of_the_vocabulary_is_some_text(vocab_size: int) -> None:
    tokenizer = make_tokenizer(vocab_size)
    assert tokenizer.get_vocab_size() == vocab_size
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(vocab_size))
    text = "def hello(): return 'Grüße, 世界'\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_large_vocabularies_are_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tools.make_checkpoint.tokenizer.TRAINED_SIZE", 700)
    tokenizer = make_tokenizer(20_000)
    assert tokenizer.get_vocab_size() == 20_000
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(20_000))


def test_the_chat_template_and_end_ids_fit_the_tokenizer(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, SHAPES["tiny-llama"])
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert [tokenizer.id_to_token(i) for i in generation["eos_token_id"]] == ["<|im_end|>", "<|endoftext|>"]
    assert (
        "<|im_start|>assistant"
        in json.loads((tmp_path / "tokenizer_config.json").read_text())["chat_template"]
    )


def test_flags_change_a_named_shape(tmp_path: Path) -> None:
    flags = "--layers 1 --hidden-size 32 --vocab-size 300 --no-tied --dtype float32 --architecture mistral --window 16"
    assert main(["tiny-llama", str(tmp_path), *flags.split(), "--max-shard-size", "1MB"]) == 0
    loaded = load_model(tmp_path)
    assert loaded.architecture == "MistralForCausalLM"
    assert loaded.model.layer_windows == (16,)
    assert loaded.config.shape.vocab_size == 300
    assert not loaded.config.shape.tie_word_embeddings


def test_a_shape_that_cannot_be_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny-llama", str(tmp_path), "--vocab-size", "100"]) == 2
    assert "vocab_size is 100, it must be at least 259" in capsys.readouterr().err
    with pytest.raises(ValueError, match="kv_heads must divide heads"):
        replace(SHAPES["tiny-llama"], kv_heads=3)
