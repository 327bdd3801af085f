"""The draft that comes with the embedded model: small, loadable, and of the same vocabulary."""

import json

import torch

from penstock.models.embedded_model import embedded_draft_path, embedded_path
from penstock.models.loader import load_model

BYTES_MAX = 3_000_000


def test_the_folder_of_the_draft_is_under_3_megabytes() -> None:
    """Weights and tokenizer together."""
    files = [path for path in embedded_draft_path().iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < BYTES_MAX


def test_the_draft_has_the_tokenizer_of_its_target() -> None:
    """Byte for byte, and the configurations agree on every id that ends or begins a text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (embedded_draft_path() / name).read_bytes() == (embedded_path() / name).read_bytes()
    draft, target = (
        json.loads((folder / "config.json").read_text(encoding="utf-8"))
        for folder in (embedded_draft_path(), embedded_path())
    )
    for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings"):
        assert draft[key] == target[key]


def test_the_draft_loads_as_any_model() -> None:
    """With the registry's Llama, in the checkpoint's dtype, cheaper than its target by far."""
    draft, target = (
        load_model(folder, kernels="eager") for folder in (embedded_draft_path(), embedded_path())
    )
    assert 5 * draft.num_parameters < target.num_parameters
    assert draft.dtype == target.dtype == torch.bfloat16
