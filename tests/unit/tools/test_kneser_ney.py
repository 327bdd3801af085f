"""The Kneser-Ney baseline, checked by hand and by its sums on tiny streams."""

import numpy as np
import pytest

from tools.embedded import kneser_ney
from tools.embedded.kneser_ney import KneserNey

# Tokens 0 1 0 1 2: the only bigrams are 01 (twice), 10 and 12.
STREAM = np.array([0, 1, 0, 1, 2], dtype=np.int64)


def test_pack_puts_the_first_token_in_the_highest_bits() -> None:
    """With 4 bits, (1, 2) is 0x12 and (2, 3) is 0x23."""
    assert kneser_ney.pack(np.array([1, 2, 3]), 2, 4).tolist() == [0x12, 0x23]


def test_lower_orders_count_distinct_predecessors() -> None:
    """Token 0 follows {1}, token 1 follows {0} and token 2 follows {1}: one predecessor each."""
    keys, counts = kneser_ney.count_grams(STREAM, 1, 2, is_highest=False)
    assert keys.tolist() == [0, 1, 2]
    assert counts.tolist() == [1, 1, 1]


def test_highest_order_counts_occurrences() -> None:
    """The bigram 01 occurs twice."""
    keys, counts = kneser_ney.count_grams(STREAM, 2, 2, is_highest=True)
    assert keys.tolist() == [0b0001, 0b0100, 0b0110]
    assert counts.tolist() == [2, 1, 1]


def test_bigram_probability_by_hand() -> None:
    """Tiny data discount 0.5 from a count of 1, so each step can be done on paper.

    Unigram: (1 - 0.5) / 3 + 1.5 / 3 * 1/4 = 7/24 for tokens 0, 1 and 2. After token 1, tokens
    0 and 2 came once each: (1 - 0.5) / 2 + (0.5 + 0.5) / 2 * 7/24 = 19/48.
    """
    model = KneserNey(STREAM, order=2, vocab_size=4)
    assert model.probabilities(np.array([1, 0])).tolist() == pytest.approx([19 / 48])


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_probabilities_sum_to_one_after_any_history(order: int) -> None:
    """Over the closed vocabulary, seen or unseen history alike."""
    vocab_size = 7
    rng = np.random.default_rng(3)
    model = KneserNey(rng.integers(0, 6, 400), order=order, vocab_size=vocab_size)
    for history in ([0, 1, 2, 3], [6, 6, 6, 6], [1, 6, 2, 5]):
        likely = [float(model.probabilities(np.array([*history, token]))[-1]) for token in range(vocab_size)]
        assert sum(likely) == pytest.approx(1.0)
        assert min(likely) > 0


def test_discounts_follow_the_counts_of_counts() -> None:
    """n1..n4 = 4, 2, 1, 1: Y = 4/8, D1 = 1 - 1/2, D2 = 2 - 3/4, D3 = 3 - 2."""
    counts = np.array([1, 1, 1, 1, 2, 2, 3, 4])
    assert kneser_ney.discounts(counts).tolist() == pytest.approx([0.0, 0.5, 1.25, 1.0])


def test_a_predictable_stream_has_low_perplexity() -> None:
    """A strict alternation is nearly certain under the model."""
    stream = np.array([0, 1] * 500)
    assert KneserNey(stream, order=3, vocab_size=4).perplexity(stream) < 1.05
