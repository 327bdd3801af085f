"""What changes logits before the choice, against values worked out by hand."""

import numpy as np

from penstock.engine.sampling.constraints import add_bias, apply_bitmask, ban_tokens
from penstock.engine.sampling.penalties import penalise_presence_and_frequency, penalise_repetition

INF = np.inf


def row(*values):
    return np.array(values, np.float32)


def test_a_bitmask_forbids_every_token_whose_bit_is_zero_also_beyond_the_first_word():
    logits = np.zeros(35, np.float32)
    words = np.array([1 << 1 | 1 << 30, 1 << 2], np.uint32).view(np.int32)
    apply_bitmask(logits, mask=words)
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [1, 30, 34]


def test_the_highest_bit_of_a_word_counts_although_it_is_the_sign():
    logits = np.zeros(32, np.float32)
    apply_bitmask(logits, mask=np.array([-(2**31)], np.int32))
    assert np.flatnonzero(np.isfinite(logits)).tolist() == [31]


def test_banned_tokens_become_impossible_and_no_others_change():
    logits = row(1, 2, 3)
    ban_tokens(logits, token_ids=(0, 2))
    assert logits.tolist() == [-INF, 2, -INF]


def test_bias_is_added_and_cannot_bring_a_banned_token_back():
    logits = row(1, -INF, 3)
    add_bias(logits, logit_bias={0: 2.5, 1: 100.0})
    assert logits.tolist() == [3.5, -INF, 3]


def test_repetition_divides_positive_and_multiplies_negative_logits_once_however_often_seen():
    logits = row(2, -2, 0, 4, -INF)
    penalise_repetition(logits, token_ids=np.array([0, 1, 2, 0, 0, 4]), penalty=2.0)
    assert logits.tolist() == [1, -4, 0, 4, -INF]


def test_a_repetition_penalty_below_one_encourages():
    logits = row(2, -2)
    penalise_repetition(logits, token_ids=np.array([0, 1]), penalty=0.5)
    assert logits.tolist() == [4, -1]


def test_frequency_is_subtracted_each_time_and_presence_once():
    logits = row(1, 1, 1)
    penalise_presence_and_frequency(
        logits, token_ids=np.array([0, 2]), counts=row(1, 3), presence=0.5, frequency=0.25
    )
    assert logits.tolist() == [0.25, 1, -0.25]


def test_nothing_seen_means_nothing_changes():
    logits = row(1, 2)
    nothing = np.array([], np.int64)
    penalise_repetition(logits, token_ids=nothing, penalty=2.0)
    penalise_presence_and_frequency(logits, token_ids=nothing, counts=row(), presence=1, frequency=1)
    assert logits.tolist() == [1, 2]
