"""The first k tokens of a row, without sorting it, equal the first k of the sorted row."""

import numpy as np
import pytest

from penstock.engine.sampling.vocabulary import column_sums, softmax_weights, top_candidates


def sorted_ids(logits, k):
    return np.array([np.lexsort((np.arange(len(row)), -row))[:k] for row in logits])


def test_order_is_by_logit_and_then_by_lowest_id():
    logits = np.array([[1, 3, 2, 3, -np.inf, 3]], np.float32)
    found = top_candidates(logits, k=5)
    assert found.ids.tolist() == [[1, 3, 5, 2, 0]]
    assert found.values.tolist() == [[3, 3, 3, 2, 1]]


def test_minus_zero_and_zero_are_equal_logits():
    assert top_candidates(np.array([[-0.0, 0.0, -0.0]], np.float32), k=3).ids.tolist() == [[0, 1, 2]]


def test_k_is_cut_to_the_vocabulary():
    assert top_candidates(np.zeros((2, 3), np.float32), k=10).num == 3


@pytest.mark.parametrize("vocab_size", [1000, 40_000, 40_001])
@pytest.mark.parametrize("levels", [3, 40, None])
def test_candidates_equal_the_sorted_row_with_many_ties_in_small_and_large_vocabularies(vocab_size, levels):
    """40,000 is above the size from which only the best blocks are looked into; 40,001 has a part block."""
    rng = np.random.default_rng(vocab_size)
    logits = rng.standard_normal((2, vocab_size)).astype(np.float32)
    if levels is not None:
        logits = np.round(logits * levels) / levels
    logits[0, -1] = 99.0
    found = top_candidates(logits, k=100)
    assert (found.ids == sorted_ids(logits, 100)).all()
    assert (found.values == np.take_along_axis(logits, found.ids, axis=1)).all()


def test_all_logits_equal_gives_the_lowest_ids_in_a_large_vocabulary():
    assert top_candidates(np.zeros((1, 70_000), np.float32), k=128).ids[0].tolist() == list(range(128))


def test_weights_are_the_softmax_at_a_temperature_and_columns_sum_them():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((3, 70)) * 4).astype(np.float32)
    temperatures = np.array([1.0, 0.5, 2.0])
    weights = softmax_weights(logits, highest=logits.max(axis=1), temperatures=temperatures)
    exact = np.exp((logits.astype(np.float64) - logits.max(axis=1, keepdims=True)) / temperatures[:, None])
    assert weights.shape == (3, 96)
    assert (weights[:, 70:] == 0).all()
    np.testing.assert_allclose(weights[:, :70], exact, rtol=1e-5)
    np.testing.assert_allclose(column_sums(weights).sum(axis=1), exact.sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(column_sums(weights)[:, 1], weights[:, 1::3].sum(axis=1), rtol=1e-6)
