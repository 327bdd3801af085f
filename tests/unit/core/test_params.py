"""One check of sampling parameters for every door: limits are named, extremes that overflow are not legal."""

import math

import pytest

from penstock.core.errors import InvalidParameterError
from penstock.core.params import SamplingParams, validate_sampling


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 0),
        ("n", 9),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", math.nan),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_k", -2),
        ("min_p", 1.5),
        ("presence_penalty", -2.5),
        ("frequency_penalty", math.inf),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 11.0),
        ("seed", 2**63),
        ("stop", ("a",) * 5),
        ("stop", ("",)),
        ("stop", ("x" * 65,)),
        ("stop_token_ids", (1,) * 129),
        ("stop_token_ids", (100,)),
        ("logit_bias", dict.fromkeys(range(301), 0.0)),
        ("logit_bias", {1: 101.0}),
        ("logit_bias", {100: 1.0}),
        ("logprobs", 21),
        ("max_tokens", 0),
        ("min_tokens", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidParameterError, match=field) as caught:
        validate_sampling(SamplingParams(**{field: value}), vocab_size=100)
    assert caught.value.param == field


def test_min_tokens_may_not_exceed_max_tokens() -> None:
    with pytest.raises(InvalidParameterError, match="min_tokens"):
        validate_sampling(SamplingParams(min_tokens=5, max_tokens=4))


def test_the_limits_themselves_are_legal() -> None:
    validate_sampling(
        SamplingParams(
            n=8,
            temperature=2,
            top_p=1,
            top_k=-1,
            min_p=1,
            repetition_penalty=0.01,
            seed=-(2**63),
            logprobs=20,
        )
    )


def test_a_temperature_whose_inverse_would_overflow_is_greedy() -> None:
    assert SamplingParams(temperature=1e-40).is_greedy
    assert SamplingParams(temperature=0).is_greedy
    assert not SamplingParams(temperature=0.01).is_greedy
