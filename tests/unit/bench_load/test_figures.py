"""Figures: percentiles as numpy has them, totals by hand, goodput, errors by kind, and the warnings."""

from array import array

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.bench.client import Failure, RequestRecord
from penstock.bench.load import ClientCost, LoadResult
from penstock.bench.measure import check_percentiles, distribution, metric_values_s, summarize
from penstock.bench.slo import parse_slos
from penstock.bench.workload import from_lists
from penstock.core.errors import InvalidParameterError


def make_record(
    index: int,
    *,
    pieces_s: list[float],
    start_s: float = 0.0,
    num_tokens: int | None = None,
    failure: Failure | None = None,
    counted_by: str = "usage",
    sent_s: float | None = None,
) -> RequestRecord:
    return RequestRecord(
        index=index,
        num_output_tokens_asked=len(pieces_s),
        start_s=start_s,
        sent_s=start_s if sent_s is None else sent_s,
        end_s=pieces_s[-1] if pieces_s else start_s,
        last_s=pieces_s[-1] if pieces_s else start_s,
        pieces_s=array("d", pieces_s),
        num_prompt_tokens=10,
        num_output_tokens=len(pieces_s) if num_tokens is None else num_tokens,
        counted_by=counted_by,  # type: ignore[arg-type]
        finish_reason="length",
        failure=failure,
    )


def make_result(*records: RequestRecord, duration_s: float = 4.0, **options: object) -> LoadResult:
    cost = ClientCost(cpu_s=0.4, cpu_share=0.1, loop_delays_s=(0.001, 0.002))
    known: dict[str, object] = {"status": "complete", "cost": cost, **options}
    workload = from_lists([[1]] * max(1, len(records)), output_lens=[1] * max(1, len(records)))
    return LoadResult(workload=workload, records=records, duration_s=duration_s, **known)  # type: ignore[arg-type]


@given(
    values=st.lists(st.floats(0, 1e3), min_size=1, max_size=60),
    percentiles=st.lists(st.floats(0, 100), min_size=1, max_size=4, unique=True),
)
def test_percentiles_are_those_of_numpy(values: list[float], percentiles: list[float]) -> None:
    found = distribution(values, percentiles=percentiles)
    assert found is not None
    expected = np.percentile(np.asarray(values) * 1e3, percentiles)
    assert list(found.percentiles_ms.values()) == pytest.approx(expected.tolist())
    assert found.min_ms <= found.mean_ms * (1 + 1e-9)
    assert found.num_values == len(values)


def test_no_values_have_no_figures() -> None:
    assert distribution([]) is None


def test_ttft_itl_tpot_and_e2el_by_hand() -> None:
    record = make_record(0, start_s=1.0, pieces_s=[1.5, 1.6, 1.9, 2.0], num_tokens=6)
    assert metric_values_s([record], metric="ttft") == pytest.approx([0.5])
    assert metric_values_s([record], metric="itl") == pytest.approx([0.1, 0.3, 0.1])
    assert metric_values_s([record], metric="tpot") == pytest.approx(
        [0.1]
    )  # 0.5 s for 5 tokens after the first
    assert metric_values_s([record], metric="e2el") == pytest.approx([1.0])


def test_an_answer_of_one_token_has_no_tpot_and_one_without_text_no_ttft() -> None:
    assert metric_values_s([make_record(0, pieces_s=[1.0])], metric="tpot") == []
    assert metric_values_s([make_record(0, pieces_s=[], num_tokens=3)], metric="ttft") == []


def test_totals_count_answered_requests_only() -> None:
    refused = make_record(2, pieces_s=[0.1], failure=Failure(kind="http_429", message="full"))
    cut = make_record(3, pieces_s=[0.1, 0.2], failure=Failure(kind="cut_off", message="gone"))
    stopped = make_record(4, pieces_s=[], failure=Failure(kind="cancelled", message="stop"))
    good = [make_record(0, pieces_s=[1.0, 2.0]), make_record(1, pieces_s=[1.0, 2.0, 3.0])]
    summary = summarize(make_result(*good, refused, cut, refused, stopped))
    assert (summary.num_ok, summary.num_output_tokens, summary.num_prompt_tokens) == (2, 5, 20)
    assert summary.failures == {"http_429": 2, "cut_off": 1, "cancelled": 1}
    assert summary.first_failures["http_429"] == "full"
    assert summary.error_rate == pytest.approx(3 / 5), "cancelled requests are neither good nor bad"
    assert summary.request_throughput == pytest.approx(0.5)
    assert summary.output_throughput == pytest.approx(1.25)
    assert summary.total_throughput == pytest.approx(6.25)
    assert summary.metrics["e2el"].num_values == 2


def test_goodput_counts_those_that_keep_every_objective() -> None:
    records = [
        make_record(0, pieces_s=[0.1, 0.15, 0.20]),
        make_record(1, pieces_s=[0.3, 0.35, 0.40]),  # late first text
        make_record(2, pieces_s=[0.1, 0.3, 0.5]),  # slow after it
        make_record(3, pieces_s=[0.1, 0.12], failure=Failure(kind="cut_off", message="")),
    ]
    summary = summarize(make_result(*records), slos=parse_slos(["ttft:200", "tpot:60"]))
    assert summary.num_good == 1
    assert summary.goodput == pytest.approx(0.25)
    assert summarize(make_result(*records)).goodput is None


@pytest.mark.parametrize(
    ("metric", "value_ms"), [("ttft", 125.0), ("itl", 250.0), ("tpot", 187.5), ("e2el", 500.0)]
)
@pytest.mark.parametrize(("over_ms", "is_good"), [(0.0, True), (-0.5, False), (0.5, True)])
def test_each_objective_holds_up_to_its_limit(
    metric: str, value_ms: float, over_ms: float, is_good: bool
) -> None:
    word = f"{metric}:{value_ms + over_ms}"
    record = make_record(0, pieces_s=[0.125, 0.375, 0.5])
    limits = parse_slos([word])
    assert (summarize(make_result(record), slos=limits).num_good == 1) is is_good


@pytest.mark.parametrize(
    "words", [["ttft"], ["ttft:"], ["ttft:0"], ["ttft:-4"], ["ttft:inf"], ["x:3"], ["ttft:nan"]]
)
def test_a_wrong_objective_is_refused(words: list[str]) -> None:
    with pytest.raises(
        InvalidParameterError, match="it must be METRIC:MILLISECONDS with one of ttft, tpot, itl"
    ):
        parse_slos(words)


def test_an_objective_named_twice_is_refused() -> None:
    with pytest.raises(InvalidParameterError, match="named twice"):
        parse_slos(["ttft:1", "ttft:2"])


def test_percentiles_are_sorted_checked_and_told_once() -> None:
    assert check_percentiles([99, 50, 99]) == (50, 99)
    for wrong in ([], [-1], [101], [float("nan")]):
        with pytest.raises(InvalidParameterError, match="metric_percentiles"):
            check_percentiles(wrong)


def test_only_wanted_metrics_and_percentiles_are_given() -> None:
    result = make_result(make_record(0, pieces_s=[0.1, 0.2]))
    summary = summarize(result, metrics=("itl",), percentiles=(25.0, 99.9))
    assert list(summary.metrics) == ["itl"]
    assert list(summary.metrics["itl"].percentiles_ms) == [25.0, 99.9]


def test_a_quiet_run_has_no_warnings() -> None:
    assert summarize(make_result(make_record(0, pieces_s=[0.1, 0.2]))).warnings() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cost": ClientCost(cpu_s=3.0, cpu_share=0.75, loop_delays_s=())}, "the client used 75% of a core"),
        (
            {"cost": ClientCost(cpu_s=0, cpu_share=0, loop_delays_s=(0.5,))},
            "the client's loop ran late: p99 500 ms",
        ),
        ({"num_held": 3}, "3 requests were due while max_concurrency"),
    ],
)
def test_what_spoils_the_figures_is_told(options: dict[str, object], words: str) -> None:
    summary = summarize(make_result(make_record(0, pieces_s=[0.1, 0.2]), **options))
    assert any(words in warning for warning in summary.warnings())


def test_late_requests_and_missing_usage_are_told() -> None:
    late = make_record(0, pieces_s=[0.5, 0.6], sent_s=0.3, counted_by="pieces")
    warnings = summarize(make_result(late)).warnings()
    assert any("requests went out late: p99 300 ms" in warning for warning in warnings)
    assert any("no usage for 1 answers" in warning for warning in warnings)


def test_a_run_of_nothing_has_zeroes_and_no_division() -> None:
    summary = summarize(make_result(duration_s=0.0, status="interrupted", detail="stopped"))
    assert (summary.num_ok, summary.request_throughput, summary.metrics) == (0, 0.0, {})
    assert summary.client.lateness_ms is None
