"""Lengths: each form of the flag draws what it says, within its limits, the same for the same seed."""

import numpy as np
import pytest

from penstock.bench.lengths import MAX_LENGTH, Lengths, parse_lengths
from penstock.core.errors import InvalidParameterError


def _draw(text: str, *, num: int = 5000, range_ratio: float = 0.0) -> np.ndarray:
    lengths = parse_lengths(text, param="random_input_len", range_ratio=range_ratio)
    return lengths.draw(num, rng=np.random.default_rng(3))


def test_a_number_is_that_number() -> None:
    assert set(_draw("77")) == {77}


def test_uniform_reaches_both_ends() -> None:
    assert set(_draw("uniform:3:6")) == {3, 4, 5, 6}


def test_normal_has_its_mean_and_stays_in_its_limits() -> None:
    drawn = _draw("normal:100:20:60:120")
    assert drawn.min() >= 60
    assert drawn.max() <= 120
    assert np.median(drawn) == pytest.approx(100, abs=2)


def test_lognormal_has_its_median_and_a_long_tail() -> None:
    drawn = _draw("lognormal:100:0.8")
    assert np.median(drawn) == pytest.approx(100, rel=0.05)
    assert drawn.max() > 500
    assert drawn.min() >= 1


def test_the_range_ratio_spreads_a_number_as_in_vllm() -> None:
    drawn = _draw("100", range_ratio=0.1)
    assert (drawn.min(), drawn.max()) == (90, 110)


def test_the_words_of_a_distribution_read_back_the_same() -> None:
    for text in ("5", "uniform:3:6", "normal:100:20:60:120", "lognormal:64:0.5:4:200"):
        assert str(parse_lengths(text, param="x")) == text


@pytest.mark.parametrize(
    "text",
    ["", "x", "-1", "1.5", "uniform:3", "uniform:6:3", "normal:1", "normal:0:1", "normal:9:-1", "zipf:1:2"],
)
def test_another_form_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(InvalidParameterError, match="random_input_len is .* it must be N, uniform:LOW:HIGH"):
        parse_lengths(text, param="random_input_len")


def test_lengths_are_bounded() -> None:
    with pytest.raises(InvalidParameterError, match=str(MAX_LENGTH)):
        parse_lengths(str(MAX_LENGTH + 1), param="x")
    with pytest.raises(InvalidParameterError, match="finite"):
        Lengths(kind="normal", first=float("nan"), second=1.0)


def test_a_ratio_does_not_go_with_a_range() -> None:
    with pytest.raises(InvalidParameterError, match="random_range_ratio is 0.5, it must be 0 with"):
        parse_lengths("uniform:3:6", param="x", range_ratio=0.5)
