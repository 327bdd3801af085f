"""Guesses from the text: what followed the longest run of last tokens where it was before."""

import random

from penstock.core.ids import SequenceId
from penstock.engine.scheduler.drafting import Wanted
from penstock.engine.spec.ngram import MAX_INDEXED_PER_STEP, NgramIndex, NgramProposer


def guesses(text, *, low=2, high=4, num=3):
    index = NgramIndex(num_min=low, num_max=high, num_tokens=len(text))
    index.extend(text, end=len(text))
    return index.propose(text, num_tokens=num)


def obvious(text, *, low, high, num):
    """The longest run wins, then the latest; a search over everything."""
    for length in range(high, low - 1, -1):
        for end in range(len(text) - 1, length - 1, -1):
            if text[end - length : end] == text[len(text) - length :]:
                out = list(text)
                for _ in range(num):
                    out.append(out[end])
                    end += 1
                return out[len(text) :]
    return []


def test_it_continues_as_the_text_went_on_before():
    assert guesses([5, 6, 7, 8, 9, 1, 5, 6]) == [7, 8, 9]


def test_the_longest_match_wins_over_the_latest():
    assert guesses([1, 2, 3, 50, 9, 2, 3, 60, 1, 2, 3], num=1) == [50]


def test_the_latest_wins_among_equals():
    assert guesses([2, 3, 50, 2, 3, 60, 2, 3], num=1) == [60]


def test_a_short_period_is_carried_on():
    assert guesses([4, 7, 8, 7, 8, 7, 8], num=5) == [7, 8, 7, 8, 7]


def test_less_than_the_least_match_gives_nothing():
    assert guesses([1, 2, 3, 4, 3], low=2) == []
    assert guesses([], low=1) == []
    assert guesses([1], low=1) == []


def test_it_finds_what_a_search_over_everything_finds():
    rng = random.Random(1)
    for _ in range(300):
        text = [rng.randrange(3) for _ in range(rng.randint(1, 30))]
        low = rng.randint(1, 4)
        high = rng.randint(low, 6)
        assert guesses(text, low=low, high=high, num=4) == obvious(text, low=low, high=high, num=4)


def test_an_index_grown_token_by_token_is_the_index_of_the_whole():
    rng = random.Random(2)
    text = [rng.randrange(4) for _ in range(60)]
    index = NgramIndex(num_min=2, num_max=5, num_tokens=8)
    for end in range(1, len(text) + 1):
        index.extend(text, end=end)
        assert index.propose(text[:end], num_tokens=4) == guesses(text[:end], low=2, high=5, num=4)


def test_a_step_indexes_a_bounded_number_of_tokens_and_carries_on_in_the_next():
    proposer = NgramProposer(num_min=2, num_max=4, num_tokens_max=2)
    long = [1, 2, 3] * MAX_INDEXED_PER_STEP
    wanted = [Wanted(SequenceId(1), long, 2), Wanted(SequenceId(2), [1, 2, 1, 2], 2)]
    assert proposer.propose(wanted) == [[], []]
    num_steps = 1
    while not all(found := proposer.propose(wanted)):
        num_steps += 1
    assert num_steps == 3
    assert found == [[1, 2], [1, 2]]


def test_a_forgotten_sequence_holds_nothing():
    proposer = NgramProposer(num_min=2, num_max=4, num_tokens_max=2)
    proposer.propose([Wanted(SequenceId(1), [1, 2, 1, 2], 2)])
    assert proposer.num_bytes > 0
    proposer.forget(SequenceId(1))
    proposer.forget(SequenceId(7))
    assert proposer.num_bytes == 0
