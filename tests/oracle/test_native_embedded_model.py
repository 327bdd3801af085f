"""The embedded model on every instruction set, and what quantization costs it."""

from functools import cache
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig
from penstock.kernels.cpu import _native
from penstock.kernels.quantization import NO_QUANTIZATION, Quantization
from penstock.models.embedded_model import embedded_path
from tools.embedded.quantized import Scorer, load_native

PAGE = Path(__file__).parent / "held_out_page.txt"
"""From 03454.txt, the book that the model was never trained on."""
QUESTION = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
ANSWER = "The capital of France is Paris."
SHORT = 2
"""Tokens asked of the emulated tiles, which are slow."""


def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(embedded_path() / "tokenizer.json"))


def answer(*, num_tokens: int, isa: str, **options: object) -> str:
    config = EngineConfig(
        model_path=str(embedded_path()),
        kernels="native",
        isa=isa,
        num_threads=2,
        max_model_len=128,
        kv=KvConfig(num_blocks=64),
        warmup=False,
        **options,  # type: ignore[arg-type]  # as the tests write them
    )
    core = build_core(config)
    assert core.info.kernels_detail == f"{isa}, 2 threads"
    assert core.info.execution == "recorded"
    words = tokenizer()
    prompt = words.encode(QUESTION, add_special_tokens=False).ids
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    core.add(EngineRequest(request_id=RequestId("q"), prompt_token_ids=prompt, params=params))
    tokens: list[int] = []
    while core.has_work:
        tokens += [token for delta in core.step().deltas for token in delta.token_ids]
    return words.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("isa", _native.supported_isas())
def test_the_embedded_model_answers_on_every_instruction_set(isa: str) -> None:
    is_slow = isa == "amx_emulated"
    text = answer(num_tokens=SHORT if is_slow else 12, isa=isa)
    assert ANSWER.startswith(text.strip()) if is_slow else text.strip().startswith(ANSWER)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
@pytest.mark.parametrize(
    "options",
    [
        {"quantization": "int8"},
        {"quantization": "int8", "quantization_activations": "bf16"},
        {"quantization": "int4", "quantization_group_size": 32},
        {"quantization": "int4", "quantization_activations": "bf16"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_the_embedded_model_answers_when_quantized(isa: str, options: dict[str, object]) -> None:
    if isa not in _native.supported_isas():
        pytest.skip("this CPU does not run it")
    assert answer(num_tokens=12, isa=isa, **options).strip().startswith(ANSWER)


@cache
def perplexity(rule: Quantization) -> float:
    ids = tokenizer().encode(PAGE.read_text(encoding="utf-8"), add_special_tokens=False).ids
    return Scorer(load_native(embedded_path(), rule)).perplexity(torch.tensor(ids))


@pytest.mark.parametrize(
    ("rule", "most_rise"),
    [(Quantization(method="int8"), 0.01), (Quantization(method="int4", group_size=32), 0.06)],
    ids=["int8", "int4"],
)
def test_quantization_costs_the_embedded_model_little(rule: Quantization, most_rise: float) -> None:
    """Perplexity on a page; the whole book's figures stand in the model card."""
    assert perplexity(rule) < (1 + most_rise) * perplexity(NO_QUANTIZATION)
