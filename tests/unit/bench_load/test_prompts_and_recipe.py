"""Prompts and workloads: exact lengths, shared where they are meant to be, the same for the same seed."""

from pathlib import Path

import pytest

import penstock
from penstock.bench.arrivals import Arrivals
from penstock.bench.lengths import constant, uniform
from penstock.bench.prompts import (
    DEFAULT_TOKEN_IDS,
    OWN,
    WORDS,
    Segment,
    TokenIdWriter,
    WordWriter,
    one_token_words,
    token_id_writer,
)
from penstock.bench.recipe import Recipe, make_warmup, make_workload
from penstock.bench.workload import MAX_REQUESTS, from_lists
from penstock.core.errors import InvalidParameterError
from penstock.text.tokenizer import Tokenizer

IDS = TokenIdWriter(seed=0)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(Path(penstock.__file__).parent / "models" / "embedded")


def test_lengths_of_prompts_are_prefix_and_own_part() -> None:
    recipe = Recipe(
        num_requests=20, input_lens=uniform(3, high=9), prefix_len=5, output_lens=uniform(1, high=4)
    )
    workload = make_workload(recipe, writer=IDS)
    assert all(len(r.prompt) == r.num_prompt_tokens for r in workload.requests)
    assert {r.num_prompt_tokens for r in workload.requests} <= set(range(8, 15))
    assert {r.num_output_tokens for r in workload.requests} <= set(range(1, 5))


def test_prefixes_are_shared_in_turn_and_nothing_else_is() -> None:
    recipe = Recipe(num_requests=6, input_lens=constant(16), prefix_len=16, num_prefixes=2)
    prompts = [request.prompt for request in make_workload(recipe, writer=IDS).requests]
    assert len({prompt[:16] for prompt in prompts}) == 2
    assert prompts[0][:16] == prompts[2][:16] == prompts[4][:16]
    assert len({prompt[16:] for prompt in prompts}) == 6


def test_the_same_seed_gives_the_same_workload_and_another_does_not() -> None:
    recipe = Recipe(num_requests=9, input_lens=uniform(3, high=90), arrivals=Arrivals(request_rate=3))
    assert make_workload(recipe, writer=IDS) == make_workload(recipe, writer=IDS)
    other = make_workload(recipe, writer=IDS.with_seed(1))
    again = make_workload(recipe, writer=IDS)
    assert all(a.prompt != b.prompt for a, b in zip(other.requests, again.requests, strict=True))


def test_warm_up_prompts_share_no_start_with_measured_ones() -> None:
    recipe = Recipe(num_requests=8, input_lens=constant(32), prefix_len=16)
    measured = {request.prompt[:8] for request in make_workload(recipe, writer=IDS).requests}
    warm = make_warmup(recipe, writer=IDS, num_requests=3)
    assert len(warm.requests) == 3
    assert all(len(request.prompt) == 48 for request in warm.requests)
    assert not measured & {request.prompt[:8] for request in warm.requests}


def test_a_rate_makes_an_open_loop_and_none_a_closed_one() -> None:
    assert not make_workload(Recipe(num_requests=2), writer=IDS).is_open_loop
    assert make_workload(Recipe(num_requests=2, arrivals=Arrivals(request_rate=2)), writer=IDS).is_open_loop


def test_token_ids_stay_in_their_range_and_leave_special_ones_out(tokenizer: Tokenizer) -> None:
    low, high = DEFAULT_TOKEN_IDS
    drawn = IDS.write([Segment(key=(OWN, 0), num_tokens=5000)])
    assert low <= min(drawn)
    assert max(drawn) < high
    wide = token_id_writer(seed=0, tokenizer=tokenizer, low=0).write(
        [Segment(key=(OWN, 0), num_tokens=50_000)]
    )
    assert max(wide) < tokenizer.vocab_size
    assert not {i for i in wide if i} & tokenizer.table.special_ids


@pytest.mark.parametrize(("low", "high"), [(5, 5), (-1, 4), (0, 1 << 20)])
def test_a_range_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, low: int, high: int) -> None:
    with pytest.raises(InvalidParameterError, match=f"random_token_ids is {low}:{high}"):
        token_id_writer(seed=0, tokenizer=tokenizer, low=low, high=high)


def test_words_that_are_one_token_make_texts_of_exact_length(tokenizer: Tokenizer) -> None:
    writer = WordWriter(seed=0, words=one_token_words(tokenizer))
    for num_tokens in (1, 7, 200):
        text = writer.write([Segment(key=(OWN, 1), num_tokens=num_tokens)])
        assert len(tokenizer.encode(text, add_special_tokens=False)) == num_tokens


def test_words_are_scaled_by_what_the_server_counts() -> None:
    writer = WordWriter(seed=0, tokens_per_word=1.25, num_extra_tokens=10)
    assert len(writer.write([Segment(key=(OWN, 0), num_tokens=110)]).split()) == 80
    assert len(writer.write([Segment(key=(OWN, 0), num_tokens=5)]).split()) == 1


def test_the_word_list_has_no_word_twice() -> None:
    assert len(set(WORDS)) == len(WORDS)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_requests": 0}, "num_prompts is 0"),
        ({"num_requests": MAX_REQUESTS + 1}, f"1 to {MAX_REQUESTS}"),
        ({"prefix_len": -1}, "random_prefix_len is -1"),
        ({"num_prefixes": 0}, "num_prefixes 0"),
        ({"output_lens": constant(0)}, "random_output_len is 0, it must be at least 1"),
        ({"input_lens": constant(0)}, "random_input_len is 0, it must be at least 1"),
    ],
)
def test_a_recipe_out_of_its_limits_is_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        Recipe(**options)  # type: ignore[arg-type]


def test_explicit_lists_become_a_workload() -> None:
    workload = from_lists(
        [[1, 2, 3], "some text"], output_lens=[4, 5], arrival_s=[0.0, 1.5], max_concurrency=3
    )
    assert workload.is_open_loop
    assert [r.prompt for r in workload.requests] == [(1, 2, 3), "some text"]
    assert (workload.num_prompt_tokens, workload.num_output_tokens, workload.max_concurrency) == (3, 9, 3)
    assert not from_lists([[1]], output_lens=[1]).is_open_loop


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        (([[1]], [1, 2], None), "1 prompts, 2 output lengths"),
        (([[1], [2]], [1, 1], [1.0, 0.5]), "times go back"),
        (([], [], None), "0 requests"),
        (([[1]], [100_000_001], None), "tokens in all"),
    ],
)
def test_wrong_lists_are_refused(
    lists: tuple[list[list[int]], list[int], list[float] | None], words: str
) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        from_lists(lists[0], output_lens=lists[1], arrival_s=lists[2])
