"""Trains the byte-level BPE of the embedded model and writes it with its chat template.

Text is never lower-cased or normalised and digits stand alone, so encoding and decoding are
exact inverses. Books and generated conversations are counted together.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.embedded import corpus
from tools.embedded.instructions import TRAIN_SEED, make_conversation

VOCAB_SIZE = 4096
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
TURN_START, TURN_END = "<|im_start|>", "<|im_end|>"
SPECIALS = (BOS, EOS, PAD, TURN_START, TURN_END)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
NUM_CONVERSATIONS = 20_000

CHAT_TEMPLATE = Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def _texts(corpus_dir: Path) -> Iterator[str]:
    """The training books by paragraph, then the contents of generated conversations."""
    for book in corpus.training_books(corpus_dir):
        yield from book.splitlines(keepends=True)
    for index in range(NUM_CONVERSATIONS):
        conversation = make_conversation(TRAIN_SEED, index)
        yield from (message["content"] for message in conversation.messages)


def train_tokenizer(corpus_dir: Path) -> Tokenizer:
    """Learn the merges; takes about a minute."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(TAGS),
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(corpus_dir), trainer)
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in TAGS])
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """The contents of `tokenizer_config.json`. Any: a JSON document."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "additional_special_tokens": [TURN_START, TURN_END],
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "chat_template": CHAT_TEMPLATE,
    }


def main() -> None:
    """Train and save into the output folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(arguments.corpus)
    tokenizer.save(str(arguments.output / "tokenizer.json"), pretty=False)
    text = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False) + "\n"
    (arguments.output / "tokenizer_config.json").write_text(text, encoding="utf-8")
    print(f"{tokenizer.get_vocab_size()} tokens")


if __name__ == "__main__":
    main()
