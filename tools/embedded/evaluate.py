"""Measures an exported model: exact answers by kind, perplexity, and perplexity by position.

It loads the folder through `transformers` for the perplexity, so it also shows that the folder is complete,
and through the offline API for the answers. It prints one JSON document; `card.py` turns that into the card.
"""

import argparse
import itertools
import json
import math
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tools.embedded import data
from tools.embedded.answers import greedy_texts
from tools.embedded.instructions import EVAL_SEED, KINDS, Conversation, evaluation_set, make_conversation

WINDOW = 1024
STRIDE = 512
CONTEXT = 4096
POSITION_EDGES = (0, 128, 512, 1024, 2048, 3072, 4096)
NEW_TOKENS_MAX = 400


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """A model folder in memory, weights widened to float32."""

    model: Any  # Any: transformers' classes are untyped
    tokenizer: Any  # Any: as above

    def generate(self, prompt: str, *, num_tokens: int, seed: int | None = None) -> str:
        """Continue a rendered prompt; greedy without a seed, else temperature 0.8, top-p 0.95."""
        ids = self.tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
        options: dict[str, Any] = {"do_sample": False}
        if seed is not None:
            torch.manual_seed(seed)
            options = {"do_sample": True, "temperature": 0.8, "top_p": 0.95}
        out = self.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, **options
        )
        text: str = self.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text.strip()


def load(folder: Path) -> Loaded:
    """Load the folder as any user of `transformers` would."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train(mode=False)
    return Loaded(model=model, tokenizer=AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def token_losses(model: Any, ids: Tensor) -> Tensor:
    """Negative log likelihood in nats of `ids[1:]`, given what precedes in the row.

    Any: transformers' classes are untyped.
    """
    logits = model(ids[None]).logits[0, :-1].float()
    losses: Tensor = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return losses


def sliding_nats(model: Any, ids: Tensor) -> float:
    """Total nats of all `ids`, each counted once, with 512 to 1,023 tokens before it.

    Windows start at 0, 512, 1024, ...; all but the first count only their last 512 tokens.
    Any: transformers' classes are untyped.
    """
    bos = torch.tensor([model.config.bos_token_id])
    stream = torch.cat((bos, ids))
    total = 0.0
    for start in range(0, max(1, len(stream) - STRIDE), STRIDE):
        window = stream[start : start + WINDOW]
        losses = token_losses(model, window)
        total += losses[0 if start == 0 else STRIDE - 1 :].sum().item()
    return total


def perplexity(loaded: Loaded, ids: Tensor) -> float:
    """Perplexity per token of the held-out book."""
    return math.exp(sliding_nats(loaded.model, ids) / len(ids))


def perplexity_by_position(loaded: Loaded, ids: Tensor, *, num_windows: int) -> dict[str, float]:
    """Perplexity of tokens by how far into a 4,096-token window they stand."""
    columns = []
    for number in range(num_windows):
        window = ids[number * CONTEXT : (number + 1) * CONTEXT]
        columns.append(token_losses(loaded.model, window))
    mean = torch.stack(columns).mean(0)
    return {
        f"{low}-{high}": math.exp(mean[low : high - 1].mean().item())
        for low, high in itertools.pairwise(POSITION_EDGES)
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A question with what the model said."""

    question: Conversation
    text: str

    @property
    def is_exact(self) -> bool:
        """Whether the answer is the expected one, spaces at the ends aside."""
        return self.text == self.question.expected.strip()


def answer_rates(answers: list[Answer]) -> dict[str, str]:
    """Exact answers of each kind and in all, as `right/asked`."""
    right: dict[str, int] = defaultdict(int)
    asked: dict[str, int] = defaultdict(int)
    for answer in answers:
        for name in (answer.question.kind, "all"):
            asked[name] += 1
            right[name] += answer.is_exact
    return {name: f"{right[name]}/{asked[name]}" for name in (*KINDS, "all") if asked[name]}


def trained_questions(count: int) -> list[Conversation]:
    """Questions of the training split but another stream, to tell memory from skill."""
    return [make_conversation(999, i, kind=KINDS[i % len(KINDS)]) for i in range(count)]


def evaluate_answers(model: Path, count: int, *, seed: int, show_wrong: bool) -> dict[str, str]:
    """Ask the first `count` held-out questions of a seed, greedily and in one batch."""
    questions = evaluation_set(seed=seed, count=count)
    texts = greedy_texts(model, questions, max_tokens=NEW_TOKENS_MAX)
    answers = [Answer(question=one, text=text) for one, text in zip(questions, texts, strict=True)]
    for answer in answers:
        if show_wrong and not answer.is_exact:
            asked = answer.question.messages[-2]["content"]
            print(f"[{answer.question.kind}] {asked!r}\n  want {answer.question.expected!r}")
            print(f"  got  {answer.text!r}", flush=True)
    return answer_rates(answers)


def main() -> None:
    """Evaluate from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--seed", type=int, default=EVAL_SEED, help="of the questions")
    parser.add_argument("--tokens", type=int, default=0, help="of the book; 0 means all")
    parser.add_argument("--long-windows", type=int, default=8)
    parser.add_argument("--show-wrong", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    loaded = load(arguments.model)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    held_out = data.encode_held_out(tokenizer, arguments.corpus)
    ids = torch.from_numpy(held_out).long()
    ids = ids[: arguments.tokens] if arguments.tokens else ids
    figures: dict[str, Any] = {  # Any: JSON values of several types
        "questions": evaluate_answers(
            arguments.model, arguments.questions, seed=arguments.seed, show_wrong=arguments.show_wrong
        ),
        "held_out_tokens": len(ids),
        "perplexity": perplexity(loaded, ids),
        "perplexity_by_position": perplexity_by_position(
            loaded, torch.from_numpy(held_out).long(), num_windows=arguments.long_windows
        ),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
