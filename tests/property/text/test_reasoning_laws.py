"""Thoughts are told from answers whatever way the text is cut, and nothing but the tags is lost."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.reasoning import REASONING_STYLES, ReasoningParser, ReasoningStyle

STYLES = {**REASONING_STYLES, "tags": ReasoningStyle(start="((", end="))")}
PARTS = st.sampled_from(["a", " ", "\n", "\n\n", "<", "</", "think", "[THINK", "(", ")", "b c"])
styles = pytest.mark.parametrize("name", sorted(STYLES))


def read(style, pieces, *, is_inside):
    parser = ReasoningParser(style, is_inside=is_inside)
    parts = [*map(parser.push, pieces), parser.finish()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts), parser.cursor.num_scanned


@styles
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_cut_gives_what_the_whole_gives_in_linear_time(name, data):
    style = STYLES[name]
    tags = st.sampled_from([style.start, style.end])
    text = "".join(data.draw(st.lists(PARTS | tags, max_size=12)))
    is_inside = data.draw(st.booleans())
    reasoning, content, _ = read(style, [text], is_inside=is_inside)
    cut = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cut], [*cut, len(text)], strict=True)]
    assert read(style, pieces, is_inside=is_inside)[:2] == (reasoning, content)
    single = read(style, list(text), is_inside=is_inside)
    assert single[:2] == (reasoning, content)
    assert single[2] <= (len(style.end) + len(style.start) + 6) * (len(text) + 1)


@styles
def test_a_thought_is_what_stands_between_the_tags(name):
    style = STYLES[name]
    text = f"{style.start}\nhm < 3\n{style.end}\n\nSo: 4 {style.end}"
    assert read(style, [text], is_inside=False)[:2] == ("hm < 3", f"So: 4 {style.end}")
    assert read(style, [text.removeprefix(style.start)], is_inside=True)[:2] == (
        "hm < 3",
        f"So: 4 {style.end}",
    )


@styles
def test_an_answer_without_a_thought_is_left_alone_and_an_open_thought_takes_all(name):
    style = STYLES[name]
    assert read(style, [" \nNo tags."], is_inside=False)[:2] == ("", " \nNo tags.")
    assert read(style, [f"{style.start}and so on"], is_inside=False)[:2] == ("and so on", "")
    assert read(style, ["and so on"], is_inside=True)[:2] == ("and so on", "")


def test_whether_an_answer_begins_inside_is_told_by_the_prompts_end():
    optional, always = STYLES["qwen3"], STYLES["deepseek_r1"]
    assert optional.is_inside("assistant\n<think>\n")
    assert not optional.is_inside("assistant\n")
    assert not optional.is_inside("assistant\n<think>\n\n</think>\n\n")
    assert always.is_inside("assistant\n")
    assert not always.is_inside("assistant\n<think>\n\n</think>\n\n")
