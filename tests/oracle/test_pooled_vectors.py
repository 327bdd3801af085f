"""Vectors and class scores through the whole engine equal those of `transformers`.

Prompts come in chunks of five tokens, next to answers that are being generated, into a small pool.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest, Pooling
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.models.registry import ARCHITECTURES, CLASSIFIERS
from tests.oracle.checkpoints import FAMILIES, randomise, tiny_model

VOCAB_SIZE = 97
NUM_LABELS = 3
TOLERANCE = 5e-5
"""As for logits: numbers of order 1, rounded in float32 some tens of operations deep."""
PROMPTS = (
    [3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43],
    [7],
    [3, 14, 15, 92, 65, 35, 89, 79, 5, 6],
)
"""The last begins like the first, so that its first blocks are found in the cache."""
NO_TOKENS = SamplingParams(max_tokens=0)


def make_core(
    path: Path, *, kernels: str = "reference", dtype: str = "auto", block_size: int = 4, **more: Any
) -> EngineCore:
    return build_core(
        EngineConfig(
            model_path=str(path),
            dtype=dtype,
            kernels=kernels,
            num_threads=1,
            scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=5),
            kv=KvConfig(block_size=block_size, num_blocks=64),
            max_model_len=48,
            **more,
        )
    )


def pooled(core: EngineCore, *poolings: Pooling, is_generating: bool = False) -> dict[str, torch.Tensor]:
    """Every prompt with every pooling, by `kind prompt`; ids of one kind are unique."""
    for pooling in poolings:
        for index, prompt in enumerate(PROMPTS):
            core.add(
                EngineRequest(
                    request_id=RequestId(f"{pooling.kind} {index}"),
                    prompt_token_ids=prompt,
                    params=NO_TOKENS,
                    pooling=pooling,
                )
            )
    if is_generating:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        core.add(EngineRequest(request_id=RequestId("text"), prompt_token_ids=[4, 5], params=params))
    found: dict[str, torch.Tensor] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            if delta.pooled is not None:
                assert delta.stats is not None
                found[delta.request_id] = torch.tensor(delta.pooled)
    assert len(found) == len(PROMPTS) * len(poolings)
    return found


def classifier(family: str, **sizes: Any) -> Any:  # transformers has no common type
    """A tiny random classifier of a family."""
    config = FAMILIES[family](VOCAB_SIZE)
    for name, value in sizes.items():
        setattr(config, name, value)
    config.num_labels = NUM_LABELS
    config._attn_implementation = "eager"
    model = transformers.AutoModelForSequenceClassification.from_config(config).eval()
    randomise(model, seed=1)
    return model


@pytest.mark.parametrize("family", list(FAMILIES))
def test_mean_and_last_hidden_states_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """After the final norm, whatever the chunks and with a text being generated beside."""
    oracle = tiny_model(family, vocab_size=VOCAB_SIZE)
    oracle.save_pretrained(tmp_path)
    found = pooled(make_core(tmp_path), Pooling("mean"), Pooling("last"), is_generating=True)
    for index, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            hidden = oracle.base_model(torch.tensor([prompt])).last_hidden_state[0]
        for kind, expected in (("mean", hidden.mean(dim=0)), ("last", hidden[-1])):
            torch.testing.assert_close(found[f"{kind} {index}"], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_every_family_has_its_classifier() -> None:
    assert set(CLASSIFIERS.values()) == set(ARCHITECTURES)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_class_scores_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    """Of the last token, by `score.weight`, with the labels of the config in their order."""
    oracle = classifier(family)
    oracle.config.id2label = {2: "good", 0: "bad", 1: "so so"}
    oracle.save_pretrained(tmp_path)
    core = make_core(tmp_path)
    assert core.info.labels == ("bad", "so so", "good")
    assert core.info.vocab_size == VOCAB_SIZE
    found = pooled(core, Pooling("classify"))
    for index, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(found[f"classify {index}"], expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_logits_of_chosen_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    oracle = tiny_model("qwen3", vocab_size=VOCAB_SIZE)
    oracle.save_pretrained(tmp_path)
    found = pooled(make_core(tmp_path), Pooling("logits", (9, 4)))
    for index, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0, -1, [9, 4]]
        torch.testing.assert_close(found[f"logits {index}"], expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_the_native_kernels_record_a_classifier(quantization: str, tmp_path: Path) -> None:
    """The head has few rows and stays as it is; what differs is what rounding makes."""
    oracle = classifier("llama", head_dim=32)
    oracle.save_pretrained(tmp_path)
    core = make_core(tmp_path, kernels="native", dtype="bfloat16", block_size=16, quantization=quantization)
    assert core.info.execution == "recorded"
    found = pooled(core, Pooling("classify"), Pooling("mean"))
    for index, prompt in enumerate(PROMPTS):
        with torch.inference_mode():
            expected = oracle(torch.tensor([prompt])).logits[0]
        error = (found[f"classify {index}"] - expected).abs().max()
        assert error < 0.15 * expected.abs().max().clamp(min=1.0)
