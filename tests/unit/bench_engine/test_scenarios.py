"""Workloads of the comparison: exact lengths, the same ids for everybody in a round, others in the next."""

import pytest

from penstock.bench.compare.scenarios import NAMES, Draw, make_scenario, read_vocab_size
from penstock.core.errors import CheckpointError, InvalidParameterError

VOCAB = 150_000


def prompts(name: str, **draw) -> list[tuple[int, ...]]:
    scenario = make_scenario(name, draw=Draw(vocab_size=VOCAB, **draw))
    return [request.prompt for request in scenario.load.requests]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_and_round_give_the_same_prompts(name):
    assert prompts(name, seed=3, round_idx=1) == prompts(name, seed=3, round_idx=1)


@pytest.mark.parametrize("name", NAMES)
def test_another_round_has_other_ids_and_the_same_lengths(name):
    """So that no prefix cache carries one round into the next."""
    first, second = prompts(name, round_idx=0), prompts(name, round_idx=1)
    assert [len(p) for p in first] == [len(p) for p in second]
    assert not {p[:8] for p in first} & {p[:8] for p in second}


def test_the_lengths_are_those_of_the_page():
    def sizes(name):
        load = make_scenario(name, draw=Draw(vocab_size=VOCAB)).load
        return [(r.num_prompt_tokens, r.num_output_tokens) for r in load.requests], load.max_concurrency

    assert sizes("single") == ([(128, 128)], None)
    assert sizes("prefill") == ([(512, 4)], None)
    assert sizes("shared") == ([(544, 64)] * 64, None)
    mixed, _ = sizes("mixed")
    assert len(mixed) == 64
    assert all(32 <= prompt <= 512 and 16 <= answer <= 256 for prompt, answer in mixed)
    http, users = sizes("http-8")
    assert (len(http), users) == (24, 8)
    assert all(64 <= prompt <= 256 and answer == 64 for prompt, answer in http)


def test_shared_prompts_begin_alike_and_end_apart():
    found = prompts("shared")
    assert len({p[:512] for p in found}) == 1
    assert len({p[512:] for p in found}) == 64


def test_the_long_prompt_comes_among_eight_streams():
    scenario = make_scenario("long", draw=Draw(vocab_size=VOCAB))
    assert scenario.late is not None
    assert (len(scenario.load.requests), scenario.late.num_prompt_tokens) == (8, 4096)
    assert (scenario.longest, scenario.num_streams, scenario.late_after_tokens) == (4104, 9, 20)


@pytest.mark.parametrize("vocab_size", [512, 4096, 150_000])
def test_ids_are_ordinary_ones_of_any_vocabulary(vocab_size):
    """Neither single bytes at its start where there is room, nor the special tokens at its end."""
    draw = Draw(vocab_size=vocab_size)
    ids = draw.ids(draw.rng("x"), 2000)
    assert 0 < min(ids) < max(ids) < vocab_size * 9 // 10
    assert max(ids) < 60_000


def test_an_unknown_name_is_told_with_those_that_are_known():
    with pytest.raises(InvalidParameterError, match="'mixt'.*single, prefill, mixed"):
        make_scenario("mixt", draw=Draw(vocab_size=VOCAB))


def test_the_vocabulary_is_read_from_the_config(tmp_path):
    (tmp_path / "config.json").write_text('{"text_config": {"vocab_size": 77}}')
    assert read_vocab_size(tmp_path) == 77
    (tmp_path / "config.json").write_text('{"vocab": 77}')
    with pytest.raises(CheckpointError, match="vocab_size"):
        read_vocab_size(tmp_path)
