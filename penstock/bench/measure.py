"""Records to figures: percentiles, throughput, goodput, errors by kind, and what to beware of. Pure.

The words are those of the field (`docs/glossary.md`): TTFT to the first piece of text, ITL each gap between
pieces, TPOT (E2EL - TTFT) / (tokens - 1) one per request, E2EL to the last event. Only answered and checked
requests count in latencies and throughput; the others are counted by kind of failure.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.bench.client import RequestRecord
from penstock.bench.load import LoadResult, Status
from penstock.bench.slo import Slo, gaps_s, is_good
from penstock.core.errors import InvalidParameterError

Metric = Literal["ttft", "tpot", "itl", "e2el"]
METRICS: Final[tuple[Metric, ...]] = ("ttft", "tpot", "itl", "e2el")
DEFAULT_PERCENTILES: Final = (50.0, 90.0, 99.0)
BUSY_CPU_SHARE: Final = 0.7
"""Of a core: beyond it the loop queues behind itself, and what it measures is partly its own."""
LATE_MS: Final = 20.0
"""A 99th percentile of lateness or loop delay beyond it shows in the figures."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Figures of one metric, in milliseconds."""

    num_values: int
    mean_ms: float
    std_ms: float
    min_ms: float
    max_ms: float
    percentiles_ms: dict[float, float]
    """By percentile, 0 to 100, e.g. 99.0; linear interpolation between neighbours."""

    def percentile_ms(self, percentile: float) -> float:
        """One of the percentiles that were asked for."""
        return self.percentiles_ms[percentile]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientFigures:
    """The load generator's own part."""

    cpu_s: float
    cpu_share: float
    """Of one core."""
    lateness_ms: Distribution | None
    """How late requests went out; None if none was sent."""
    loop_delay_ms: Distribution | None
    """How late the loop's own probes ran; None for a run too short to have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What a run says."""

    status: Status
    detail: str
    duration_s: float
    num_requests: int
    """In the workload."""
    num_sent: int
    num_ok: int
    """Answered, and the checks held."""
    failures: dict[str, int]
    """By kind, most frequent first; `cancelled` are those in flight when the run was stopped."""
    error_rate: float
    """Failed over ended, from 0 to 1; cancelled ones are in neither."""
    first_failures: dict[str, str]
    """By kind, the message of the first."""
    num_prompt_tokens: int
    """As the server counted, answered requests only."""
    num_cached_tokens: int
    """Prompt tokens that the server had in its prefix cache; 0 if it does not say."""
    num_output_tokens: int
    num_pieces: int
    tokens_per_piece: float
    """Above 1 the server sends several tokens at a time, and ITL is the gap between such groups."""
    num_counted_by_pieces: int
    """Answered requests whose tokens were not counted by the server."""
    request_throughput: float
    """Answered requests per second."""
    output_throughput: float
    """Generated tokens per second."""
    total_throughput: float
    """Prompt and generated tokens per second."""
    goodput: float | None
    """Requests per second that kept every objective; None if none was stated."""
    slos: tuple[Slo, ...]
    num_good: int
    max_in_flight: int
    num_held: int
    metrics: dict[Metric, Distribution]
    """Without those that have no value."""
    client: ClientFigures

    def warnings(self) -> list[str]:
        """What a reader must know before believing the figures; empty if nothing."""
        return _warnings(self)


def check_percentiles(percentiles: Sequence[float]) -> tuple[float, ...]:
    """The percentiles in order, each once.

    Raises:
        InvalidParameterError: none, or one outside [0, 100].
    """
    if not percentiles or any(not 0 <= percentile <= 100 for percentile in percentiles):
        told = ",".join(f"{percentile:g}" for percentile in percentiles)
        raise InvalidParameterError(
            f"metric_percentiles is {told!r}, it must be numbers from 0 to 100", param="metric_percentiles"
        )
    return tuple(sorted(set(percentiles)))


def distribution(
    values_s: Sequence[float] | NDArray[np.float64], *, percentiles: Sequence[float] = DEFAULT_PERCENTILES
) -> Distribution | None:
    """Figures of values in seconds; None if there are none."""
    if not len(values_s):
        return None
    values_ms = np.asarray(values_s, dtype=np.float64) * 1e3
    found = np.percentile(values_ms, percentiles)
    return Distribution(
        num_values=len(values_ms),
        mean_ms=float(values_ms.mean()),
        std_ms=float(values_ms.std()),
        min_ms=float(values_ms.min()),
        max_ms=float(values_ms.max()),
        percentiles_ms={
            percentile: float(value) for percentile, value in zip(percentiles, found, strict=True)
        },
    )


def metric_values_s(records: Sequence[RequestRecord], *, metric: Metric) -> list[float]:
    """Every value of a metric over the answered requests, in seconds, in the order of the records."""
    answered = [record for record in records if record.is_ok]
    if metric == "itl":
        return [gap for record in answered for gap in gaps_s(record)]
    if metric == "e2el":
        return [record.e2el_s for record in answered]
    found = (record.ttft_s if metric == "ttft" else record.tpot_s for record in answered)
    return [value for value in found if value is not None]


def summarize(
    result: LoadResult,
    *,
    slos: Sequence[Slo] = (),
    metrics: Sequence[Metric] = METRICS,
    percentiles: Sequence[float] = DEFAULT_PERCENTILES,
) -> Summary:
    """The figures of a run, whole or partial.

    Args:
        result: of `run_load`.
        slos: objectives that goodput is counted by; empty for none.
        metrics: those to be given.
        percentiles: in [0, 100], see `check_percentiles`.
    """
    answered = [record for record in result.records if record.is_ok]
    num_good = sum(is_good(record, slos=slos) for record in answered)
    num_output_tokens = sum(record.num_output_tokens for record in answered)
    num_prompt_tokens = sum(record.num_prompt_tokens for record in answered)
    num_pieces = sum(len(record.pieces_s) for record in answered)
    found = {
        metric: distribution(metric_values_s(answered, metric=metric), percentiles=percentiles)
        for metric in metrics
    }
    per_s = 1.0 / result.duration_s if result.duration_s > 0 else 0.0
    failures = _failures(result.records)
    return Summary(
        status=result.status,
        detail=result.detail,
        duration_s=result.duration_s,
        num_requests=len(result.workload.requests),
        num_sent=len(result.records),
        num_ok=len(answered),
        failures=failures,
        error_rate=_error_rate(failures, num_ok=len(answered)),
        first_failures=_first_failures(result.records),
        num_prompt_tokens=num_prompt_tokens,
        num_cached_tokens=sum(record.num_cached_tokens for record in answered),
        num_output_tokens=num_output_tokens,
        num_pieces=num_pieces,
        tokens_per_piece=num_output_tokens / num_pieces if num_pieces else 0.0,
        num_counted_by_pieces=sum(record.counted_by == "pieces" for record in answered),
        request_throughput=len(answered) * per_s,
        output_throughput=num_output_tokens * per_s,
        total_throughput=(num_prompt_tokens + num_output_tokens) * per_s,
        goodput=num_good * per_s if slos else None,
        slos=tuple(slos),
        num_good=num_good,
        max_in_flight=result.max_in_flight,
        num_held=result.num_held,
        metrics={metric: figures for metric, figures in found.items() if figures is not None},
        client=_client_figures(result),
    )


def _client_figures(result: LoadResult) -> ClientFigures:
    return ClientFigures(
        cpu_s=result.cost.cpu_s,
        cpu_share=result.cost.cpu_share,
        lateness_ms=distribution([record.lateness_s for record in result.records]),
        loop_delay_ms=distribution(result.cost.loop_delays_s),
    )


def _failures(records: Sequence[RequestRecord]) -> dict[str, int]:
    counts = Counter(record.failure.kind for record in records if record.failure is not None)
    return dict(counts.most_common())


def _first_failures(records: Sequence[RequestRecord]) -> dict[str, str]:
    found: dict[str, str] = {}
    for record in records:
        if record.failure is not None:
            found.setdefault(record.failure.kind, record.failure.message)
    return found


def _error_rate(failures: dict[str, int], *, num_ok: int) -> float:
    num_failed = sum(failures.values()) - failures.get("cancelled", 0)
    return num_failed / (num_failed + num_ok) if num_failed else 0.0


def _warnings(summary: Summary) -> list[str]:
    client = summary.client
    found: list[str] = []
    if client.cpu_share > BUSY_CPU_SHARE:
        found.append(
            f"the client used {client.cpu_share:.0%} of a core: it is near its own limit, "
            "the server may be faster than these figures"
        )
    for figures, what in (
        (client.lateness_ms, "requests went out late"),
        (client.loop_delay_ms, "the client's loop ran late"),
    ):
        p99_ms = figures.percentile_ms(99.0) if figures is not None else 0.0
        if p99_ms > LATE_MS:
            found.append(f"{what}: p99 {p99_ms:.0f} ms, which is in the latencies")
    if summary.num_held:
        found.append(f"{summary.num_held} requests were due while max_concurrency were in flight, and waited")
    if summary.num_counted_by_pieces:
        found.append(
            f"the server sent no usage for {summary.num_counted_by_pieces} answers: "
            "their tokens are counted by pieces of text, their lengths could not be checked"
        )
    return found
