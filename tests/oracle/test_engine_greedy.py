"""Every family through the whole engine: chunked prefill and mixed batches give transformers' greedy tokens."""

from pathlib import Path

import pytest
import torch

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from tests.oracle.checkpoints import FAMILIES, tiny_checkpoint

VOCAB = 101
PROMPTS = ([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43], [7], [3, 14, 15, 92, 65, 35, 89, 79, 1, 2])
MAX_TOKENS = 12


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
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=5),
        kv=KvConfig(block_size=4, num_blocks=64),
        max_model_len=48,
        warmup=False,
    )
    core = build_core(config)
    answers: dict[str, list[int]] = {}
    for index, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
        core.add(EngineRequest(request_id=RequestId(str(index)), prompt_token_ids=prompt, params=params))
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
    expected = {str(index): transformers_greedy(path, prompt) for index, prompt in enumerate(PROMPTS)}
    assert answers == expected
