"""The logprobs of a prompt's own tokens are those of transformers, however the prompt is cut into chunks."""

from pathlib import Path

import pytest
import torch

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from tests.oracle.checkpoints import tiny_checkpoint

VOCAB = 101
PROMPT = [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43]
NUM_TOP = 3


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def expected(path: Path) -> torch.Tensor:
    """[len(PROMPT) - 1, VOCAB]: logprobs of what follows each token but the last."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        logits = model(torch.tensor([PROMPT]), use_cache=False).logits[0, :-1]
    return logits.double().log_softmax(-1)


def run(path: Path, *, chunk: int, **params: object) -> list[TokenDelta]:
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=chunk),
        kv=KvConfig(block_size=4, num_blocks=64),
        max_model_len=48,
        warmup=False,
    )
    core = build_core(config)
    deltas: list[TokenDelta] = []
    for request_id in ("first", "second"):  # the second finds the first one's blocks
        sampling = SamplingParams(temperature=0, ignore_eos=True, prompt_logprobs=NUM_TOP, **params)
        core.add(EngineRequest(request_id=RequestId(request_id), prompt_token_ids=PROMPT, params=sampling))
        while core.has_work:
            deltas.extend(core.step().deltas)
    assert core.memory().kv_bytes_owned == 0
    return deltas


def check(delta: TokenDelta, expected: torch.Tensor) -> None:
    assert delta.prompt_logprobs is not None
    first, *rest = delta.prompt_logprobs
    assert first is None
    assert len(rest) == len(PROMPT) - 1
    for row, token_id, told in zip(expected, PROMPT[1:], rest, strict=True):
        assert told is not None
        assert told.sampled.token_id == token_id
        # both compute in float32, in another order
        assert told.sampled.logprob == pytest.approx(float(row[token_id]), abs=1e-5)
        assert told.sampled.rank == 1 + int((row > row[token_id]).sum())
        top = row.topk(NUM_TOP)
        assert [each.token_id for each in told.top] == top.indices.tolist()
        assert [each.logprob for each in told.top] == pytest.approx(top.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("chunk", [4, 5, 64])
def test_prompt_logprobs_equal_transformers(path: Path, expected: torch.Tensor, chunk: int) -> None:
    """Told once for a request, with the first delta of its first answer."""
    told = [delta for delta in run(path, chunk=chunk, max_tokens=4, n=2) if delta.prompt_logprobs]
    assert [(delta.request_id, delta.index) for delta in told] == [("first", 0), ("second", 0)]
    for delta in told:
        check(delta, expected)


def test_a_request_may_ask_for_nothing_but_prompt_logprobs(path: Path, expected: torch.Tensor) -> None:
    """It ends with its prompt, with one delta for each answer and no token."""
    deltas = run(path, chunk=5, max_tokens=0, n=2)
    assert [(d.request_id, d.index, d.finish_reason) for d in deltas] == [
        (request_id, index, FinishReason.LENGTH) for request_id in ("first", "second") for index in (0, 1)
    ]
    assert not any(delta.token_ids for delta in deltas)
    for delta in deltas:
        if delta.index == 0:
            check(delta, expected)
        assert (delta.stats is not None) == (delta.index == 1)
