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

from tools.embedded.answers import greedy_texts
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
    asked = groups(Tokenizer.from_file(str(model / "tokenizer.json")), seed=seed, count=count)
    texts = iter(
        greedy_texts(model, [one for group in asked.values() for one in group], max_tokens=ANSWER_TOKENS)
    )
    right = {name: sum(next(texts) == one.expected.strip() for one in group) for name, group in asked.items()}
    return {name: f"{right[name]}/{len(group)}" for name, group in asked.items()}


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
