"""A byte-level BPE tokenizer of an exact vocabulary size, in which every id stands for some text.

It is trained on Python's own standard library; what is missing to a large vocabulary is filled with
merges of tokens that are there, at the lowest rank, so that they never change how text is cut.
"""

import json
import sysconfig
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tools.make_checkpoint.shapes import NUM_SPECIALS

SPECIALS: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TRAINED_SIZE: Final = 24_000
"""Tokens that come from text at most; more would only take longer."""
TEXT_BYTES: Final = 6_000_000
"""Text read for a vocabulary of `TRAINED_SIZE`; less for a smaller one."""
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def _texts(num_bytes: int) -> Iterator[str]:
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        if num_bytes <= 0:
            return
        text = path.read_text(encoding="utf-8", errors="ignore")
        num_bytes -= len(text)
        yield text


def _trained(size: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=min(size, TRAINED_SIZE),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(TEXT_BYTES * min(size, TRAINED_SIZE) // TRAINED_SIZE), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [(left, right) for left, right in model["merges"]]


def _fill(vocab: dict[str, int], merges: list[tuple[str, str]], size: int) -> None:
    """Add merges of two known words until the vocabulary has `size` tokens. Mutates both arguments."""
    words = [token for token in vocab if len(token) > 1 and token.isalpha() and token.isascii()]
    words += [token for token in vocab if len(token) == 1]
    for left, right in product(words, words):
        if len(vocab) >= size:
            return
        if left + right not in vocab:
            vocab[left + right] = len(vocab)
            merges.append((left, right))
    raise ValueError(f"vocab_size leaves {size - len(vocab)} ids without text; the limit is {len(vocab)}")


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Build the tokenizer.

    Args:
        vocab_size: exact number of ids, at least 256 and the specials, which are the last.

    Raises:
        ValueError: the vocabulary is too large to be filled.
    """
    size = vocab_size - NUM_SPECIALS
    vocab, merges = _trained(size)
    _fill(vocab, merges, size)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer


def write_tokenizer(folder: Path, *, vocab_size: int, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`.

    Args:
        folder: of the checkpoint.
        vocab_size: as in `make_tokenizer`.
        context: of the model, in tokens.
    """
    make_tokenizer(vocab_size).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIALS[0],
        "eos_token": SPECIALS[2],
        "pad_token": SPECIALS[0],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
