"""The detokenizer's laws, on every kind of vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.text.detokenizer import Detokenizer
from tests.unit.text.tiny_vocabularies import STYLES, make_tokenizer

TOKENIZERS = {style: make_tokenizer(style) for style in STYLES}
IDS = st.lists(st.integers(0, 519), max_size=20)
TEXT = st.text(st.sampled_from("ab hello\n\u00e9\u4f60\U0001f600\u0301 .\u2581"), max_size=20) | st.text(
    max_size=12
)

styles = pytest.mark.parametrize("style", STYLES)


def stream(tokenizer, ids, *, skip=False, at_start=True):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip, at_start=at_start)
    return "".join([detokenizer.push(token_id) for token_id in ids]) + detokenizer.flush()


@styles
@settings(max_examples=150, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_deltas_joined_are_the_whole_decode(style, ids, skip):
    tokenizer = TOKENIZERS[style]
    assert stream(tokenizer, ids, skip=skip) == tokenizer.decode(ids, skip_special_tokens=skip)


@styles
@settings(max_examples=100, deadline=None)
@given(ids=IDS, skip=st.booleans())
def test_without_the_start_rule_the_text_is_the_bytes_of_the_tokens(style, ids, skip):
    tokenizer = TOKENIZERS[style]
    kept = [i for i in ids if not (skip and tokenizer.is_special(i))]
    joined = b"".join(map(tokenizer.token_bytes, kept))
    assert stream(tokenizer, ids, skip=skip, at_start=False) == joined.decode("utf-8", "replace")


@styles
@settings(max_examples=150, deadline=None)
@given(text=TEXT, skip=st.booleans())
def test_valid_text_decodes_as_the_library_decodes_it(style, text, skip):
    tokenizer = TOKENIZERS[style]
    ids = tokenizer.encode(text, add_special_tokens=True)
    assert stream(tokenizer, ids, skip=skip) == tokenizer._backend.decode(ids, skip_special_tokens=skip)


@styles
@settings(max_examples=100, deadline=None)
@given(text=TEXT, cut=st.integers(0, 20))
def test_prompt_text_and_answer_text_join_to_the_text_of_both(style, text, cut):
    tokenizer = TOKENIZERS[style]
    ids = tokenizer.encode("a" + text, add_special_tokens=False)
    # A cut inside a character leaves broken bytes on both sides; the law is for whole characters.
    head, tail = ids[: cut + 1], ids[cut + 1 :]
    prompt, answer = tokenizer.decode(head), stream(tokenizer, tail, at_start=False)
    if "\ufffd" not in prompt + answer:
        assert prompt + answer == tokenizer.decode(ids)


@settings(max_examples=100, deadline=None)
@given(text=st.text(max_size=12))
def test_byte_level_text_survives_the_round_trip(text):
    tokenizer = TOKENIZERS["byte-level"]
    assert stream(tokenizer, tokenizer.encode(text, add_special_tokens=False)) == text


@styles
@settings(max_examples=50, deadline=None)
@given(ids=IDS)
def test_only_an_unfinished_character_is_held_back(style, ids):
    """After each token the shown text lacks at most the bytes of one character."""
    tokenizer = TOKENIZERS[style]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=False, at_start=False)
    shown = ""
    for count, token_id in enumerate(ids, start=1):
        shown += detokenizer.push(token_id)
        whole = b"".join(map(tokenizer.token_bytes, ids[:count]))
        assert any(whole[: len(whole) - held].decode("utf-8", "replace") == shown for held in range(4))
