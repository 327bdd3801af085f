"""Exact answers to the harder forms: long records to repeat, and calls of tools that no conversation had.

All questions are held out. The model answers in one batch through the offline API; one JSON document is
printed, whose figures stand in the model card.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer

from penstock import LLM
from tools.embedded.answers import MAX_MODEL_LEN, Question, ask
from tools.embedded.data import prompt_text
from tools.embedded.instructions import EVAL_SEED, Conversation, make_conversation

ANSWER_TOKENS = 500
RECORD_SIZES = ((50, 99), (100, 149), (150, 199), (200, 249))


def stream(kind: str, seed: int) -> Iterator[Conversation]:
    """Held-out conversations of one kind, without end."""
    return (make_conversation(seed, index, split="eval", kind=kind) for index in itertools.count())


def is_lookup(asked: Conversation) -> bool:
    """Whether the tool asked for has a made-up name."""
    return asked.operands.startswith("tool_lookup:")


def groups(tokenizer: Tokenizer, *, seed: int, count: int) -> dict[str, list[Conversation]]:
    """`count` conversations for each line of the table."""
    chosen = {}
    for low, high in RECORD_SIZES:
        fitting = (
            one
            for one in stream("long_repeat", seed)
            if low <= len(tokenizer.encode(one.expected, add_special_tokens=False).ids) <= high
        )
        chosen[f"repeat, {low}-{high} tokens"] = list(itertools.islice(fitting, count))
    lookups = (one for one in stream("tools", seed) if is_lookup(one))
    chosen["tools, made-up names"] = list(itertools.islice(lookups, count))
    chosen["tools, many made-up names"] = list(itertools.islice(stream("new_tools", seed), count))
    return chosen


def rates(model: Path, *, seed: int, count: int) -> dict[str, str]:
    """Exact answers of each group as `right/asked`."""
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    measured = {}
    with LLM(model, max_num_seqs=64, max_model_len=MAX_MODEL_LEN, num_threads=1) as llm:
        for name, asked in groups(tokenizer, seed=seed, count=count).items():
            questions = [
                Question(text=prompt_text(one), temperature=0.0, max_tokens=ANSWER_TOKENS) for one in asked
            ]
            said = [tokenizer.decode(list(one.said)).strip() for one in ask(llm, tokenizer, questions)]
            right = sum(text == one.expected.strip() for text, one in zip(said, asked, strict=True))
            measured[name] = f"{right}/{len(asked)}"
    return measured


def main() -> None:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--seed", type=int, default=EVAL_SEED)
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    text = json.dumps(rates(arguments.model, seed=arguments.seed, count=arguments.count), indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
