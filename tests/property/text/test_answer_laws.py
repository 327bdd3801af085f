"""One answer: how its tokens are grouped into steps changes nothing but where the deltas are cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason
from penstock.core.tokens import TokenDelta
from penstock.text.answer import Answer
from penstock.text.stop_strings import StopAutomaton
from tests.unit.text.tiny_vocabularies import make_tokenizer

TOKENIZER = make_tokenizer("byte-level")
IDS = st.lists(
    st.sampled_from(TOKENIZER.encode("hello he lo \u4f60 ol\U0001f600", add_special_tokens=True)), max_size=25
)
STOPS = st.lists(st.sampled_from(["lo", "o h", "hello", "\u4f60 o", " ", "llo hel"]), max_size=4, unique=True)


def run(ids, sizes, params):
    answer = Answer(
        TOKENIZER,
        request_id="r",
        index=0,
        params=params,
        automaton=StopAutomaton(params.stop) if params.stop else None,
        at_start=True,
    )
    deltas, begin = [], 0
    for size in [*sizes, len(ids)]:
        deltas.append(answer.push(TokenDelta("r", 0, tuple(ids[begin : begin + size]))))
        begin += size
    deltas.append(answer.push(TokenDelta("r", 0, finish_reason=FinishReason.LENGTH)))
    return answer, [delta for delta in deltas if delta is not None]


@settings(max_examples=250, deadline=None)
@given(
    ids=IDS,
    sizes=st.lists(st.integers(0, 4), max_size=25),
    stops=STOPS,
    min_tokens=st.integers(0, 6),
    include=st.booleans(),
)
def test_grouping_changes_neither_text_nor_end_nor_bill(ids, sizes, stops, min_tokens, include):
    params = SamplingParams(stop=tuple(stops), min_tokens=min_tokens, include_stop_str_in_output=include)
    answer, deltas = run(ids, sizes, params)
    single, expected = run(ids, [1] * len(ids), params)
    assert "".join(delta.text for delta in deltas) == "".join(delta.text for delta in expected)
    assert answer.num_tokens == single.num_tokens
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (
        expected[-1].finish_reason,
        expected[-1].stop_reason,
    )
    billed = [token_id for delta in deltas for token_id in delta.token_ids]
    assert billed == ids[: answer.num_tokens]
    assert [delta.finish_reason is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
