"""The event stream: the same events however the bytes are cut, by the rules of the standard."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.event_stream import MAX_EVENT_BYTES, EventStream, EventTooLargeError


def _events(chunks: list[bytes]) -> list[bytes]:
    stream = EventStream()
    found = [data for chunk in chunks for data in stream.feed(chunk)]
    return found + stream.rest()


STREAMS = {
    "lf": (
        b'data: {"a": 1}\n\ndata: {"b": "x"}\n\ndata: [DONE]\n\n',
        [b'{"a": 1}', b'{"b": "x"}', b"[DONE]"],
    ),
    "crlf": (b"data: one\r\n\r\ndata: two\r\n\r\n", [b"one", b"two"]),
    "cr": (b"data: one\r\rdata: two\r\r", [b"one", b"two"]),
    "mixed": (b"data: one\r\n\ndata: two\n\r\ndata: three\n\n", [b"one", b"two", b"three"]),
    "comments": (b": ping\n\ndata: one\n\n:\n: pong\n\ndata: two\n\n", [b"one", b"two"]),
    "many lines": (b"data: one\ndata: two\n\n", [b"one\ntwo"]),
    "other fields": (b"event: token\nid: 7\ndata: one\nretry: 3\n\n", [b"one"]),
    "no space": (b"data:one\n\ndata:  two\n\n", [b"one", b" two"]),
    "no end": (b"data: one\n\ndata: [DONE]", [b"one", b"[DONE]"]),
    "empty": (b"", []),
    "blank lines": (b"\n\n\n\ndata: one\n\n\n\n", [b"one"]),
    "utf-8": ("data: ä€😀\n\ndata: ü\n\n".encode(), ["ä€😀".encode(), "ü".encode()]),
}


@pytest.mark.parametrize("name", STREAMS)
def test_events_do_not_depend_on_where_one_cut_falls(name: str) -> None:
    data, expected = STREAMS[name]
    for cut in range(len(data) + 1):
        assert _events([data[:cut], data[cut:]]) == expected, cut


@pytest.mark.parametrize("name", STREAMS)
def test_events_do_not_depend_on_the_size_of_the_chunks(name: str) -> None:
    data, expected = STREAMS[name]
    assert _events([data[i : i + 1] for i in range(len(data))]) == expected
    assert _events([data]) == expected


@given(
    texts=st.lists(st.text(alphabet='ab :{}"', min_size=1, max_size=8).map(lambda t: f"x{t}"), max_size=6),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    cuts=st.lists(st.integers(0, 120), max_size=5),
)
def test_any_texts_any_line_end_any_cuts(texts: list[str], end: str, cuts: list[int]) -> None:
    data = "".join(f"data: {text}{end}{end}" for text in texts).encode()
    places = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[a:b] for a, b in itertools.pairwise(places)]
    assert _events(chunks) == [text.encode() for text in texts]


def test_events_come_as_soon_as_they_are_whole() -> None:
    stream = EventStream()
    assert stream.feed(b"data: one\n") == []
    assert stream.feed(b"\ndata: tw") == [b"one"]
    assert stream.feed(b"o\r\n\r") == []
    assert stream.feed(b"\n") == [b"two"]


def test_an_event_without_an_end_is_refused_at_the_limit() -> None:
    stream = EventStream()
    stream.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    with pytest.raises(EventTooLargeError, match=str(MAX_EVENT_BYTES)):
        stream.feed(b"x")
