"""Laws of every tool-call parser: cutting the text changes nothing, nothing is lost, nothing else is called."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.tool_parsers import TOOL_PARSERS
from tests.unit.text.spelled_calls import SPELLINGS, read, read_whole, spell

NAMES = ("get_weather", "f", "add-2")
PROPERTIES = {"s_a": {"type": "string"}, "s_b": {"type": "string"}, "v_a": {}, "v_b": {}}
SCHEMAS = {name: {"type": "object", "properties": PROPERTIES} for name in NAMES}
WORDS = st.text(st.sampled_from('abc{}[]<>"\\:,;\n |_/`=()\u4f60\U0001f600'), max_size=12)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**6), 10**6)
    | st.floats(allow_nan=False, allow_infinity=False, width=32)
    | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)
OTHERS = VALUES.filter(lambda value: not isinstance(value, str))
ARGUMENTS = st.fixed_dictionaries({}, optional={"s_a": WORDS, "s_b": WORDS, "v_a": OTHERS, "v_b": OTHERS})
CALLS = st.lists(st.tuples(st.sampled_from(NAMES), ARGUMENTS), min_size=1, max_size=3)
parsers = pytest.mark.parametrize("name", sorted(TOOL_PARSERS))


def cut(text, sizes):
    begin, pieces = 0, []
    for size in sizes:
        pieces.append(text[begin : begin + size])
        begin += size
    return [*pieces, text[begin:]]


@st.composite
def broken_texts(draw, name):
    """What a model might write: parts of the format, calls, and all of it damaged somewhere."""
    calls = st.tuples(st.sampled_from((*NAMES, "unknown")), ARGUMENTS)
    call = calls.map(lambda each: spell(name, [each]))
    parts = st.sampled_from(SPELLINGS[name].parts) | WORDS | call
    text = "".join(draw(st.lists(parts, max_size=6)))
    if text and draw(st.booleans()):
        place = draw(st.integers(0, len(text) - 1))
        text = text[:place] + draw(st.sampled_from(["", "x", '"', "\n"])) + text[place + 1 :]
    return text


@parsers
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_cut_gives_what_the_whole_gives(name, data):
    text = data.draw(broken_texts(name))
    sizes = data.draw(st.lists(st.integers(0, 5), max_size=60))
    is_parallel = data.draw(st.booleans())
    whole = read_whole(name, text, SCHEMAS, is_parallel=is_parallel)
    assert read(name, cut(text, sizes), SCHEMAS, is_parallel=is_parallel).shown == whole.shown
    assert read(name, list(text), SCHEMAS, is_parallel=is_parallel).shown == whole.shown
    assert {call.name for call in whole.calls} <= set(NAMES)
    assert is_parallel or len(whole.calls) <= 1


@parsers
@settings(max_examples=80, deadline=None)
@given(calls=CALLS)
def test_well_formed_calls_come_back_as_they_were(name, calls):
    found = read_whole(name, spell(name, calls), SCHEMAS)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == calls
    assert found.content == ""


@parsers
@settings(max_examples=80, deadline=None)
@given(text=WORDS.filter(lambda text: not text.isspace()), arguments=ARGUMENTS)
def test_without_tools_all_of_the_text_is_content(name, text, arguments):
    spelled = text + spell(name, [("unknown", arguments)])
    found = read_whole(name, spelled, SCHEMAS)
    assert found.content == spelled
    assert found.calls == []


@parsers
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_work_is_linear_in_the_text(name, data):
    """Counted in characters looked at, with the text coming character by character."""
    text = data.draw(broken_texts(name)) * 8
    longest = max(len(marker) for marker in (*SPELLINGS[name].parts, "x"))
    found = read(name, list(text), SCHEMAS)
    assert found.num_scanned <= (longest + 4) * (len(text) + 1)
