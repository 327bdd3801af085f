"""The stop-string search against a naive search of the whole text, however the text is cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.stop_strings import StopAutomaton, StopSearch

STOPS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=4)
CHUNKS = st.lists(st.text("abc", max_size=6), max_size=12)


def naive(text, stops, *, include, after=0):
    """Earliest start, then earliest end, of the occurrences that end after `after`."""
    found = [
        (begin, begin + len(stop))
        for stop in stops
        for begin in range(len(text))
        if text.startswith(stop, begin) and begin + len(stop) > after
    ]
    if not found:
        return text, None
    begin, end = min(found)
    return text[: end if include else begin], text[begin:end]


def search(chunks, stops, *, include, num_unarmed=0):
    found = StopSearch(StopAutomaton(stops), include_stop_str_in_output=include)
    shown = ""
    for count, chunk in enumerate(chunks):
        shown += found.push(chunk, is_armed=count >= num_unarmed)
        if found.matched is not None:
            return shown, found.matched
    return shown + found.finish(), found.matched


@settings(max_examples=300, deadline=None)
@given(chunks=CHUNKS, stops=STOPS, include=st.booleans())
def test_any_chunking_finds_what_a_search_of_the_whole_text_finds(chunks, stops, include):
    assert search(chunks, stops, include=include) == naive("".join(chunks), stops, include=include)


@settings(max_examples=150, deadline=None)
@given(chunks=CHUNKS, stops=STOPS, include=st.booleans(), num_unarmed=st.integers(0, 6))
def test_stop_strings_that_end_in_unarmed_text_do_not_count(chunks, stops, include, num_unarmed):
    after = len("".join(chunks[:num_unarmed]))
    expected = naive("".join(chunks), stops, include=include, after=after)
    assert search(chunks, stops, include=include, num_unarmed=num_unarmed) == expected


@settings(max_examples=150, deadline=None)
@given(chunks=CHUNKS, stops=STOPS)
def test_nothing_is_held_back_that_cannot_begin_a_stop_string(chunks, stops):
    """What is not shown yet starts with text that is a prefix of a stop string up to its end."""
    found = StopSearch(StopAutomaton(stops), include_stop_str_in_output=False)
    shown = taken = ""
    for chunk in chunks:
        taken += chunk
        shown += found.push(chunk)
        if found.matched is not None:
            return
        held = taken[len(shown) :]
        assert taken.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
