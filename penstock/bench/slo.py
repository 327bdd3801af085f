"""Service-level objectives: limits that a good request keeps; goodput counts those that keep all of them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, get_args

from penstock.bench.client import RequestRecord
from penstock.core.errors import InvalidParameterError

SloMetric = Literal["ttft", "tpot", "itl", "e2el"]
SLO_METRICS: Final[tuple[SloMetric, ...]] = get_args(SloMetric)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """One limit."""

    metric: SloMetric
    """`itl` is the longest gap of the request."""
    limit_ms: float
    """Above 0; a request that takes exactly this long keeps it."""

    def is_kept(self, record: RequestRecord) -> bool:
        """True if the answered request kept the limit; one it has no value of is kept."""
        value_s = _value_s(record, metric=self.metric)
        return value_s is None or value_s * 1e3 <= self.limit_ms

    def __str__(self) -> str:
        return f"{self.metric}:{self.limit_ms:g}"


def _value_s(record: RequestRecord, *, metric: SloMetric) -> float | None:
    if metric == "ttft":
        return record.ttft_s
    if metric == "tpot":
        return record.tpot_s
    if metric == "e2el":
        return record.e2el_s
    gaps = gaps_s(record)
    return max(gaps) if gaps else None


def gaps_s(record: RequestRecord) -> list[float]:
    """The times between pieces of text, one fewer than there are pieces."""
    return [late - early for early, late in itertools.pairwise(record.pieces_s)]


def is_good(record: RequestRecord, *, slos: Sequence[Slo]) -> bool:
    """Answered, checked, and every limit kept."""
    return record.is_ok and all(slo.is_kept(record) for slo in slos)


def parse_slos(words: Sequence[str]) -> tuple[Slo, ...]:
    """Read `ttft:200 tpot:50` (milliseconds), one word each.

    Raises:
        InvalidParameterError: another form, an unknown metric, one named twice, or a limit not above 0.
    """
    slos = tuple(_parse(word) for word in words)
    names = [slo.metric for slo in slos]
    if len(set(names)) != len(names):
        told = " ".join(words)
        raise InvalidParameterError(f"goodput is {told!r:.80}, a metric is named twice", param="goodput")
    return slos


def _parse(word: str) -> Slo:
    name, _, number = word.partition(":")
    metric = next((known for known in SLO_METRICS if known == name), None)
    try:
        limit_ms = float(number)
    except ValueError:
        limit_ms = 0.0
    if metric is None or not 0 < limit_ms < float("inf"):
        raise InvalidParameterError(
            f"goodput is {word!r:.80}, it must be METRIC:MILLISECONDS with one of {', '.join(SLO_METRICS)}",
            param="goodput",
        )
    return Slo(metric=metric, limit_ms=limit_ms)
