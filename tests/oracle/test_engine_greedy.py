"""Every family through the whole engine: chunked prefill and mixed batches give transformers' greedy tokens."""

from pathlib import Path

import pytest
import torch

from tests.oracle.checkpoints import FAMILIES, tiny_checkpoint
from tests.oracle.greedy_engine import MAX_TOKENS, PROMPTS, greedy_answers

VOCAB = 101


def transformers_greedy(path: Path, prompt: list[int]) -> list[int]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    tokens = list(prompt)
    with torch.inference_mode():
        for _ in range(MAX_TOKENS):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_transformers(family: str, tmp_path: Path) -> None:
    path = tiny_checkpoint(family, tmp_path / family, vocab_size=VOCAB)
    expected = {str(index): transformers_greedy(path, prompt) for index, prompt in enumerate(PROMPTS)}
    assert greedy_answers(path, dtype="float32") == expected
