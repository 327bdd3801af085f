"""From what was seen of one scenario to its figures, the same for every contender, and ratios of them."""

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from penstock.bench.client import RequestRecord
from penstock.bench.compare.scenarios import Scenario

MORE_IS_BETTER: Final = frozenset({"output_tokens_per_s", "decode_tokens_per_s", "prefill_tokens_per_s"})
LESS_IS_BETTER: Final = frozenset(
    {
        "ttft_p50_ms",
        "itl_p50_ms",
        "itl_p99_ms",
        "e2el_p50_ms",
        "gap_max_ms",
        "late_ttft_ms",
        "start_s",
        "memory_mib",
    }
)
"""Figures that a ratio is made of; above 1 always means that Penstock does better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """What became of one scenario at one contender; times are seconds after its start."""

    records: tuple[RequestRecord, ...]
    """Of `scenario.load`."""
    duration_s: float
    late: RequestRecord | None = None
    client_cpu_share: float = 0.0
    """Of one core, taken by the client; 0 for a contender that is driven in its own process."""

    @property
    def num_failed(self) -> int:
        """Requests without a good answer, the late one among them."""
        return sum(not record.is_ok for record in self.records) + (
            self.late is not None and not self.late.is_ok
        )

    @property
    def first_failure(self) -> str | None:
        """Kind and message of the first failed request."""
        all_records = self.records if self.late is None else (*self.records, self.late)
        failure = next((record.failure for record in all_records if record.failure is not None), None)
        return None if failure is None else f"{failure.kind}: {failure.message}"


def quantile(values: Sequence[float], q: float) -> float | None:
    """Linear interpolation between the two nearest values; None if there are none."""
    ordered = sorted(values)
    if not ordered:
        return None
    place = (len(ordered) - 1) * q
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def figures(scenario: Scenario, seen: Observation, *, bound_s: float | None = None) -> dict[str, float]:
    """Every figure that the scenario has; times in milliseconds unless the name says otherwise.

    Args:
        scenario: what was asked.
        seen: what became of it.
        bound_s: least time in which the machine could answer it (`bound`), if that is known.
    """
    num_output = sum(record.num_output_tokens for record in seen.records)
    found: dict[str, float | None] = {
        "wall_s": seen.duration_s,
        "num_requests": float(len(seen.records)),
        "num_failed": float(seen.num_failed),
        "output_tokens": float(num_output),
        "output_tokens_per_s": num_output / seen.duration_s if seen.duration_s > 0 else None,
        "client_cpu_share": seen.client_cpu_share,
        "bound_s": bound_s,
        "of_bound": bound_s / seen.duration_s if bound_s is not None and seen.duration_s > 0 else None,
        **_latencies(seen.records),
    }
    if len(seen.records) == 1 and seen.late is None:
        found |= _single_stream(seen.records[0])
    if scenario.late is not None and seen.late is not None:
        found |= _around_late(seen.records, seen.late)
    return {name: round(value, 4) for name, value in found.items() if value is not None}


def _latencies(records: Sequence[RequestRecord]) -> dict[str, float | None]:
    ttft = [record.ttft_s * 1e3 for record in records if record.ttft_s is not None]
    gaps = [gap * 1e3 for record in records for gap in _gaps(record.pieces_s)]
    e2el = [record.e2el_s * 1e3 for record in records if record.is_ok]
    return {
        "ttft_p50_ms": quantile(ttft, 0.5),
        "ttft_p99_ms": quantile(ttft, 0.99),
        "itl_p50_ms": quantile(gaps, 0.5),
        "itl_p99_ms": quantile(gaps, 0.99),
        "e2el_p50_ms": quantile(e2el, 0.5),
        "e2el_p99_ms": quantile(e2el, 0.99),
    }


def _gaps(times_s: Iterable[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times_s)]


def _single_stream(record: RequestRecord) -> dict[str, float | None]:
    """Prompt tokens over TTFT, and the rate of the tokens after the first."""
    ttft_s, tpot_s = record.ttft_s, record.tpot_s
    return {
        "prefill_tokens_per_s": record.num_prompt_tokens / ttft_s if ttft_s else None,
        "decode_tokens_per_s": 1 / tpot_s if tpot_s else None,
    }


def _around_late(records: Sequence[RequestRecord], late: RequestRecord) -> dict[str, float | None]:
    """How the running streams fared between the late request's sending and its first token.

    A gap counts as one of those if it ends after the sending and begins before the first token.
    """
    first_s = late.pieces_s[0] if late.pieces_s else late.last_s
    usual, during = [], []
    for record in records:
        for before_s, after_s in itertools.pairwise(record.pieces_s):
            if after_s < late.start_s:
                usual.append((after_s - before_s) * 1e3)
            elif before_s < first_s:
                during.append((after_s - before_s) * 1e3)
    return {
        "usual_itl_p50_ms": quantile(usual, 0.5),
        "gap_max_ms": max(during, default=None),
        "gap_p50_ms": quantile(during, 0.5),
        "late_ttft_ms": None if late.ttft_s is None else late.ttft_s * 1e3,
    }


def advantage(name: str, *, ours: float, theirs: float) -> float | None:
    """How many times better ours is; None for figures that are not compared, or are 0."""
    if ours <= 0 or theirs <= 0:
        return None
    if name in MORE_IS_BETTER:
        return ours / theirs
    return theirs / ours if name in LESS_IS_BETTER else None


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most of the rounds."""
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
        "rounds": len(values),
    }
