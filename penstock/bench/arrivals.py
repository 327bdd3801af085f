"""When requests arrive: times from a rate and a seed. Not how many run at once (`load`)."""

import math
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import InvalidParameterError

ArrivalKind = Literal["poisson", "gamma", "constant", "bursts"]
KINDS: Final[tuple[ArrivalKind, ...]] = ("poisson", "gamma", "constant", "bursts")
MAX_RATE: Final = 1e6
"""Requests a second; beyond it the intended times are closer than the clock tells apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests are spread over time.

    Raises:
        InvalidParameterError: a value is out of its range, or does not go with the kind.
    """

    request_rate: float = math.inf
    """Mean requests per second, above 0; infinite sends all at once."""
    kind: ArrivalKind = "poisson"
    burstiness: float = 1.0
    """Shape of the gamma distribution of gaps, above 0: 1 is Poisson, less is burstier, more is evener."""
    burst_size: int = 1
    """Requests that arrive together, at least 1; with `bursts` only."""

    def __post_init__(self) -> None:
        if not 0 < self.request_rate <= MAX_RATE and self.request_rate != math.inf:
            raise _wrong("request_rate", self.request_rate, f"above 0 and at most {MAX_RATE:.0f}, or inf")
        if not (math.isfinite(self.burstiness) and self.burstiness > 0):
            raise _wrong("burstiness", self.burstiness, "above 0 and finite")
        if self.burst_size < 1:
            raise _wrong("burst_size", self.burst_size, "at least 1")
        self._check_kind()

    def _check_kind(self) -> None:
        if self.burstiness != 1.0 and self.kind != "gamma":
            raise _wrong("burstiness", self.burstiness, f"1 with arrivals {self.kind}: only gamma has one")
        if self.burst_size != 1 and self.kind != "bursts":
            raise _wrong("burst_size", self.burst_size, f"1 with arrivals {self.kind}: only bursts has one")
        if math.isinf(self.request_rate) and self.kind != "poisson":
            raise _wrong("request_rate", "inf", f"finite with arrivals {self.kind}")

    @property
    def is_all_at_once(self) -> bool:
        """No rate was asked for."""
        return math.isinf(self.request_rate)


def _wrong(param: str, value: object, limit: str) -> InvalidParameterError:
    return InvalidParameterError(f"{param} is {value}, it must be {limit}", param=param)


def arrival_times(arrivals: Arrivals, *, num_requests: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Seconds after the start at which each request is due, never going back; the first is due at 0.

    Args:
        arrivals: how they are spread.
        num_requests: at least 1.
        rng: source of randomness; the same state gives the same times.

    Returns:
        [num_requests] float64.

    **Source:** gamma gaps with shape b and mean 1/rate have a coefficient of variation of 1/sqrt(b), so that
    b = 1 is the exponential distribution: a Poisson process.
    """
    if arrivals.is_all_at_once:
        return np.zeros(num_requests)
    if arrivals.kind == "bursts":
        burst_idx = np.arange(num_requests) // arrivals.burst_size
        return np.asarray(burst_idx * (arrivals.burst_size / arrivals.request_rate), dtype=np.float64)
    gaps = _gaps(arrivals, num_gaps=num_requests - 1, rng=rng)
    return np.cumsum(np.insert(gaps, 0, 0.0), dtype=np.float64)


def _gaps(arrivals: Arrivals, *, num_gaps: int, rng: np.random.Generator) -> NDArray[np.float64]:
    mean_s = 1.0 / arrivals.request_rate
    if arrivals.kind == "constant":
        return np.full(num_gaps, mean_s)
    if arrivals.kind == "poisson":
        return rng.exponential(mean_s, size=num_gaps)
    shape = arrivals.burstiness
    return rng.gamma(shape, mean_s / shape, size=num_gaps)
