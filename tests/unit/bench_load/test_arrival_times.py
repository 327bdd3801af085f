"""Arrival times: exact for what is exact, by distribution for what is drawn, the same for the same seed."""

import math

import numpy as np
import pytest

from penstock.bench.arrivals import Arrivals, arrival_times
from penstock.core.errors import InvalidParameterError

NUM = 20_000


def _times(arrivals: Arrivals, *, num: int = NUM, seed: int = 0) -> np.ndarray:
    return arrival_times(arrivals, num_requests=num, rng=np.random.default_rng(seed))


def test_without_a_rate_all_are_due_at_once() -> None:
    assert _times(Arrivals(), num=4).tolist() == [0, 0, 0, 0]


def test_a_constant_rate_is_evenly_spaced_from_zero() -> None:
    times = _times(Arrivals(request_rate=4, kind="constant"), num=5)
    assert times.tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])


def test_bursts_come_together_and_keep_the_mean_rate() -> None:
    times = _times(Arrivals(request_rate=2, kind="bursts", burst_size=3), num=7)
    assert times.tolist() == pytest.approx([0, 0, 0, 1.5, 1.5, 1.5, 3.0])


@pytest.mark.parametrize("kind", ["poisson", "gamma"])
@pytest.mark.parametrize("rate", [0.5, 40.0])
def test_drawn_arrivals_have_the_rate(kind: str, rate: float) -> None:
    gaps = np.diff(_times(Arrivals(request_rate=rate, kind=kind)))  # type: ignore[arg-type]
    # the mean of 20,000 exponential gaps is within 4 standard errors (4 / sqrt(20,000) = 2.8 %)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=0.029)
    assert gaps.min() >= 0


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 9.0])
def test_burstiness_is_the_shape_of_the_gaps(burstiness: float) -> None:
    gaps = np.diff(_times(Arrivals(request_rate=10, kind="gamma", burstiness=burstiness)))
    # 5 %: about four standard errors of the deviation of the burstiest of the three
    assert gaps.std() / gaps.mean() == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)


def test_poisson_counts_have_a_variance_that_equals_their_mean() -> None:
    times = _times(Arrivals(request_rate=50, kind="poisson"))
    counts = np.bincount(times.astype(int))[:-1]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.3)


def test_the_same_seed_gives_the_same_times_and_another_does_not() -> None:
    arrivals = Arrivals(request_rate=3)
    assert _times(arrivals, num=50).tolist() == _times(arrivals, num=50).tolist()
    assert _times(arrivals, num=50).tolist() != _times(arrivals, num=50, seed=1).tolist()


def test_times_never_go_back() -> None:
    for arrivals in (
        Arrivals(request_rate=9, kind="gamma", burstiness=0.05),
        Arrivals(request_rate=9, kind="bursts", burst_size=7),
    ):
        assert (np.diff(_times(arrivals)) >= 0).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"request_rate": 0}, "request_rate is 0, it must be above 0"),
        ({"request_rate": -1.0}, "request_rate is -1.0"),
        ({"request_rate": math.nan}, "request_rate is nan"),
        ({"request_rate": 1e7}, "at most 1000000"),
        ({"request_rate": 1, "burstiness": 2.0}, "only gamma has one"),
        ({"request_rate": 1, "kind": "gamma", "burstiness": 0}, "burstiness is 0"),
        ({"request_rate": 1, "burst_size": 2}, "only bursts has one"),
        ({"request_rate": 1, "kind": "bursts", "burst_size": 0}, "burst_size is 0"),
        ({"kind": "constant"}, "request_rate is inf, it must be finite"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(options: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidParameterError, match=words):
        Arrivals(**options)  # type: ignore[arg-type]
