"""Every family computes the logits that `transformers` computes, in chunks and mixed batches over blocks."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penstock.models.loader import load_model
from tests.oracle.checkpoints import FAMILIES, VARIANTS, tiny_model
from tests.oracle.paged_driver import PagedDriver, run_schedule

VOCAB_SIZE = 97
TOLERANCE = 5e-5
"""Logits are of order 1 to 10; both sides round in float32, some tens of operations deep."""
MAX_MODEL_LEN = {"phi3-longrope-short": 64}
"""LongRoPE's factors follow the longest context that is served; the oracle's follow the sequence."""
LENGTHS = {"a": 23, "b": 17, "c": 11}
SCHEDULE = [
    {"a": 7, "b": 10},
    {"b": 1, "a": 13, "c": 9},
    {"a": 1, "b": 1, "c": 1},
    {"c": 1, "a": 1, "b": 4},
    {"b": 1, "a": 1},
]
"""Prompts in chunks, decodes beside prefills, a chunk that continues a prefix, orders that change."""


def tokens_by_name(seed: int = 0) -> dict[str, list[int]]:
    rng = random.Random(seed)
    return {name: [rng.randrange(3, VOCAB_SIZE) for _ in range(length)] for name, length in LENGTHS.items()}


@pytest.mark.parametrize("family", [*FAMILIES, *VARIANTS])
def test_logits_of_chunked_mixed_batches_equal_those_of_transformers(family: str, tmp_path: Path) -> None:
    """The oracle sees each sequence whole and alone; ours comes in pieces, with neighbours, out of order."""
    oracle = tiny_model(family, vocab_size=VOCAB_SIZE)
    oracle.save_pretrained(tmp_path)
    sequences = tokens_by_name()
    with torch.inference_mode():
        expected = {name: oracle(torch.tensor([tokens])).logits[0] for name, tokens in sequences.items()}
    for kernels in ("reference", "eager"):
        max_len = MAX_MODEL_LEN.get(family)
        loaded = load_model(tmp_path, dtype="auto", kernels=kernels, device="cpu", max_model_len=max_len)
        assert loaded.dtype == torch.float32
        got = run_schedule(PagedDriver(loaded), sequences, SCHEDULE)
        for name in sequences:
            torch.testing.assert_close(
                got[name],
                expected[name],
                atol=TOLERANCE,
                rtol=TOLERANCE,
                msg=lambda m, name=name, kernels=kernels: f"{kernels} {name}: {m}",
            )


def test_gpt2_of_old_exports_without_prefix_and_with_mask_buffers(tmp_path: Path) -> None:
    """As the first releases on the hub are stored."""
    oracle = tiny_model("gpt2", vocab_size=VOCAB_SIZE)
    oracle.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    renamed = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file({**renamed, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, tmp_path / "model.safetensors")
    tokens = tokens_by_name()["a"]
    driver = PagedDriver(load_model(tmp_path))
    with torch.inference_mode():
        expected = oracle(torch.tensor([tokens])).logits[0]
    torch.testing.assert_close(driver.step([("a", tokens)])["a"], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_reference_logits_do_not_depend_on_batch_or_chunks(family: str, tmp_path: Path) -> None:
    """Bit for bit: the same sequence alone and whole, or in pieces with neighbours."""
    tiny_model(family, vocab_size=VOCAB_SIZE).save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype="float32", kernels="reference", device="cpu")
    sequences = tokens_by_name(1)
    mixed = run_schedule(PagedDriver(loaded, seed=3), sequences, SCHEDULE)
    for name, tokens in sequences.items():
        alone = run_schedule(PagedDriver(loaded), {name: tokens}, [{name: len(tokens)}])
        assert torch.equal(alone[name], mixed[name])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_bfloat16_runs_and_stays_near_float32(family: str, tmp_path: Path) -> None:
    """Rounding to 8 bits of mantissa moves logits by some percent of their spread, not more."""
    tiny_model(family, vocab_size=VOCAB_SIZE, head_dim=32).save_pretrained(tmp_path)
    sequences = tokens_by_name(2)
    logits = {}
    for dtype, kernels in (("float32", "eager"), ("bfloat16", "eager"), ("bfloat16", "native")):
        loaded = load_model(tmp_path, dtype=dtype, kernels=kernels, device="cpu")
        assert loaded.execution == ("recorded" if kernels == "native" else "op by op")
        driver = PagedDriver(loaded, block_size=16 if kernels == "native" else 4)
        logits[dtype, kernels] = torch.cat(list(run_schedule(driver, sequences, SCHEDULE).values()))
    exact = logits.pop(("float32", "eager"))
    for got in logits.values():
        assert got.dtype == torch.float32
        assert (got - exact).square().mean().sqrt() < 0.1 * exact.std()
