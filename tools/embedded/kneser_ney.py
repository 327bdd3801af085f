"""Interpolated modified Kneser-Ney n-gram model over token ids: the baseline for perplexity.

It is trained on the same 36 books with the same tokenizer as the embedded model and predicts
the same stream of the held-out book, each token once, over the closed vocabulary of the
tokenizer. An n-gram is packed into one int64, first token in the highest bits, so counting is
sorting and lookup is binary search.

Source: Chen and Goodman, An Empirical Study of Smoothing Techniques (1998), section 3.
"""

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tools.embedded import data
from tools.embedded.tokenizer import BOS, SPECIALS

Keys = NDArray[np.int64]
Floats = NDArray[np.float64]
DISCOUNTS_OF_TINY_DATA = (0.5, 1.0, 1.5)


def pack(ids: Keys, order: int, bits: int) -> Keys:
    """Keys of all n-grams in stream order; with 4 bits, tokens (1, 2) become 0x12."""
    num_grams = len(ids) - order + 1
    keys = np.zeros(num_grams, dtype=np.int64)
    for offset in range(order):
        keys = (keys << bits) | ids[offset : offset + num_grams]
    return keys


def discounts(counts: Keys) -> Floats:
    """Amounts taken from counts 0, 1, 2 and 3 or more, from the counts of counts."""
    n1, n2, n3, n4 = (int((counts == value).sum()) for value in (1, 2, 3, 4))
    if min(n1, n2, n3, n4) == 0:
        return np.array((0.0, *DISCOUNTS_OF_TINY_DATA))
    y = n1 / (n1 + 2 * n2)
    return np.array((0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3))


def find(sorted_keys: Keys, wanted: Keys) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Place of each wanted key and whether it is there; a missing key's place is arbitrary."""
    places = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return places, sorted_keys[places] == wanted


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """One order of the model: discounted n-grams and the weight each history leaves over."""

    keys: Keys  # sorted
    probabilities: Floats  # (count - discount) / total of the history, per key
    histories: Keys  # sorted
    leftover: Floats  # weight of the next lower order, per history


def build_level(keys: Keys, counts: Keys, bits: int) -> Level:
    """Discount sorted n-grams with their (raw or continuation) counts."""
    histories, starts = np.unique(keys >> bits, return_index=True)
    sizes = np.diff(np.append(starts, len(keys)))
    totals = np.add.reduceat(counts, starts)
    taken = discounts(counts)[np.minimum(counts, 3)]
    return Level(
        keys=keys,
        probabilities=(counts - taken) / np.repeat(totals, sizes),
        histories=histories,
        leftover=np.add.reduceat(taken, starts) / totals,
    )


def count_grams(ids: Keys, order: int, bits: int, *, is_highest: bool) -> tuple[Keys, Keys]:
    """Sorted n-grams with raw counts, or with the number of distinct tokens before them."""
    if is_highest:
        keys, counts = np.unique(pack(ids, order, bits), return_counts=True)
    else:
        longer = np.unique(pack(ids, order + 1, bits))
        keys, counts = np.unique(longer & ((1 << bits * order) - 1), return_counts=True)
    return keys, counts.astype(np.int64)


class KneserNey:
    """The model; building sorts the stream once per order (seconds for four million tokens)."""

    def __init__(self, ids: Keys, *, order: int, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self.bits = max(1, (vocab_size - 1).bit_length())
        assert self.bits * order < 63
        self.levels = [
            build_level(*count_grams(ids, n, self.bits, is_highest=n == order), self.bits)
            for n in range(1, order + 1)
        ]

    def probabilities(self, ids: Keys) -> Floats:
        """Probability of each of `ids[1:]` given the tokens before it in `ids`."""
        likely = np.full(len(ids) - 1, 1.0 / self.vocab_size)
        for order, level in enumerate(self.levels, start=1):
            start = max(order - 1, 1)  # the first token that has a whole history
            keys = pack(ids, order, self.bits)[start - order + 1 :]
            likely[start - 1 :] = self._interpolate(level, keys, likely[start - 1 :])
        return likely

    def _interpolate(self, level: Level, keys: Keys, lower: Floats) -> Floats:
        """One order's estimate over the lower one; an unseen history leaves that as it is."""
        place, seen = find(level.keys, keys)
        history, history_seen = find(level.histories, keys >> self.bits)
        own = np.where(seen, level.probabilities[place], 0.0)
        return own + np.where(history_seen, level.leftover[history], 1.0) * lower

    def perplexity(self, ids: Keys) -> float:
        """Perplexity per token of `ids[1:]`."""
        return math.exp(-np.log(self.probabilities(ids)).mean())


def main() -> None:
    """Print the baseline's perplexity on the held-out book as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=Path("penstock/models/embedded"))
    parser.add_argument("--order", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures here as JSON")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_file(str(arguments.tokenizer / "tokenizer.json"))
    books = data.encode_books(tokenizer, arguments.corpus).astype(np.int64)
    held_out = data.encode_held_out(tokenizer, arguments.corpus).astype(np.int64)
    stream = np.append(np.int64(SPECIALS.index(BOS)), held_out)
    vocab_size = tokenizer.get_vocab_size()
    model = KneserNey(books, order=arguments.order, vocab_size=vocab_size)
    figures = {
        "order": arguments.order,
        "training_tokens": len(books),
        "held_out_tokens": len(held_out),
        "perplexity": model.perplexity(stream),
    }
    text = json.dumps(figures, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
