"""The stop-string search: exact small cases, and time that grows with the text alone."""

import time

import pytest

from penstock.text.stop_strings import StopAutomaton, StopSearch


def search(*strings, include=False):
    return StopSearch(StopAutomaton(strings), include_stop_str_in_output=include)


def test_text_that_may_begin_a_stop_string_waits_for_the_next_piece():
    found = search("END")
    assert found.push("the E") == "the "
    assert found.push("N") == ""
    assert found.push("E") == "EN"
    assert found.push("ND!") == ""
    assert found.matched == "END"


def test_the_earliest_start_wins_though_another_ends_first():
    found = search("bc", "abcd")
    assert found.push("xabc") == "x"
    assert found.matched is None
    assert found.push("d") == ""
    assert found.matched == "abcd"


def test_the_one_that_ended_first_counts_once_the_longer_one_fails():
    found = search("bc", "abcd")
    found.push("xabc")
    assert found.push("e") == "a"
    assert found.matched == "bc"


def test_of_two_that_start_together_the_shorter_wins():
    found = search("abc", "ab", include=True)
    assert found.push("xabc") == "xab"
    assert found.matched == "ab"


def test_finish_shows_what_was_held():
    found = search("END")
    assert found.push("EN") + found.finish() == "EN"
    assert found.matched is None


@pytest.mark.parametrize("size", [1, 4, 1000])
def test_the_worst_text_takes_linear_time(size):
    """A quadratic search of this text would take minutes."""
    found = search("a" * 63 + "b", "a" * 62 + "c", "aa" * 20 + "d")
    num_chars = 200_000
    began_s = time.process_time()
    shown = "".join(found.push("a" * size) for _ in range(num_chars // size)) + found.finish()
    assert shown == "a" * num_chars
    assert time.process_time() - began_s < 5.0
