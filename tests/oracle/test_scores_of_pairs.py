"""Scores, classes and embeddings of texts, through tokenizer and engine, against `transformers`."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from penstock import LLM
from penstock.core.errors import InvalidParameterError
from tests.oracle.checkpoints import SIZES, randomise
from tests.unit.text.tiny_vocabularies import write_folder

TOLERANCE = 2e-5
"""Probabilities of logits that differ by some 1e-5."""
VOCAB_SIZE = 512
QUERY = "hello world"
DOCUMENTS = ["the quick brown fox", "stop here. The end of the story.", "x"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
"""The part of Qwen3's that matters here."""
BEFORE = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
    'provided. Note that the answer can only be "y" or "n".<|im_end|>\n<|im_start|>user\n'
)
AFTER = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
"""As the model card of Qwen3-Reranker has them, with our two words."""


def make_folder(path: Path, *, make: Any, num_labels: int = 2) -> Any:
    """A tiny random Qwen3 with a tokenizer; returns the `transformers` model, float32."""
    config = transformers.Qwen3Config(
        vocab_size=VOCAB_SIZE,
        **{**SIZES, "max_position_embeddings": 1024},
        head_dim=16,
        tie_word_embeddings=True,
    )
    config.num_labels = num_labels
    config._attn_implementation = "eager"
    model = make.from_config(config).eval()
    randomise(model, seed=2)
    model.tie_weights()
    model.save_pretrained(path)
    write_folder(path, "byte-level")
    return model


def open_llm(path: Path, **options: Any) -> LLM:
    return LLM(path, kernels="reference", num_threads=1, max_num_seqs=4, num_kv_blocks=256, **options)


def logits_of(model: Any, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits


def test_a_generative_model_scores_by_the_logits_of_two_words(tmp_path: Path) -> None:
    """In its chat template without thoughts, with the words of Qwen3-Reranker."""
    oracle = make_folder(tmp_path, make=transformers.AutoModelForCausalLM)
    (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words = [tokenizer.encode(word, add_special_tokens=False)[0] for word in ("n", "y")]
    with open_llm(tmp_path, score_yes_token="y", score_no_token="n") as llm:
        outputs = llm.score(QUERY, DOCUMENTS, instruction="find foxes")
        with pytest.raises(InvalidParameterError, match="cannot classify"):
            llm.classify(QUERY)
    for document, output in zip(DOCUMENTS, outputs, strict=True):
        pair = f"<Instruct>: find foxes\n<Query>: {QUERY}\n<Document>: {document}"
        token_ids = tokenizer.encode(BEFORE + pair + AFTER, add_special_tokens=False)
        expected = logits_of(oracle, token_ids)[-1, words].softmax(dim=0)[1]
        assert output.outputs.score == pytest.approx(float(expected), abs=TOLERANCE)
        assert output.num_prompt_tokens == len(token_ids)


@pytest.mark.parametrize("num_labels", [1, 2, 3])
def test_a_classifier_scores_pairs_as_the_tokenizer_joins_them(num_labels: int, tmp_path: Path) -> None:
    """One class: sigmoid; two: the softmax of the second; more: classes only."""
    oracle = make_folder(
        tmp_path, make=transformers.AutoModelForSequenceClassification, num_labels=num_labels
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    def probabilities(*texts: str) -> torch.Tensor:
        logits = logits_of(oracle, tokenizer(*texts)["input_ids"])
        return logits.sigmoid() if num_labels == 1 else logits.softmax(dim=0)

    with open_llm(tmp_path) as llm:
        (classes,) = llm.classify(QUERY)
        assert classes.outputs.labels == [f"LABEL_{i}" for i in range(num_labels)]
        assert classes.outputs.probs == pytest.approx(probabilities(QUERY).tolist(), abs=TOLERANCE)
        if num_labels > 2:
            with pytest.raises(InvalidParameterError, match="3 classes"):
                llm.score(QUERY, DOCUMENTS)
        else:
            for document, output in zip(DOCUMENTS, llm.score(QUERY, DOCUMENTS), strict=True):
                expected = float(probabilities(QUERY, document)[-1])
                assert output.outputs.score == pytest.approx(expected, abs=TOLERANCE)
        with pytest.raises(InvalidParameterError, match="cannot generate"):
            llm.generate(QUERY)


def test_an_embedding_checkpoint_without_a_head_and_with_its_own_pooling(tmp_path: Path) -> None:
    """As sentence-transformers saves one: no prefix, no head, `1_Pooling`; vectors of length 1."""
    oracle = make_folder(tmp_path, make=transformers.AutoModelForCausalLM).base_model
    oracle.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["Qwen3ForCausalLM"]}))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 48, "pooling_mode_mean_tokens": True})
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with open_llm(tmp_path) as llm:
        whole = llm.embed(DOCUMENTS)
        short = llm.embed(DOCUMENTS, dimensions=5)
        cut = llm.embed(DOCUMENTS, truncate_prompt_tokens=3, normalize=False, pooling_type="last")
    for i, document in enumerate(DOCUMENTS):
        token_ids = tokenizer(document)["input_ids"]
        with torch.inference_mode():
            hidden = oracle(torch.tensor([token_ids])).last_hidden_state[0]
        mean = hidden.mean(dim=0)
        unit = torch.nn.functional.normalize
        got = torch.tensor(whole[i].outputs.embedding)
        torch.testing.assert_close(got, unit(mean, dim=0), atol=TOLERANCE, rtol=TOLERANCE)
        got = torch.tensor(short[i].outputs.embedding)
        torch.testing.assert_close(got, unit(mean[:5], dim=0), atol=TOLERANCE, rtol=TOLERANCE)
        got = torch.tensor(cut[i].outputs.embedding)
        last = hidden[min(3, len(token_ids)) - 1]
        torch.testing.assert_close(got, last, atol=5 * TOLERANCE, rtol=5 * TOLERANCE)
