"""Figures and ratios from records made by hand."""

import pytest

from penstock.bench.client import Failure, RequestRecord
from penstock.bench.compare.comparison import Standing, ratios
from penstock.bench.compare.figures import Observation, advantage, figures, quantile
from penstock.bench.compare.scenarios import Draw, Scenario, make_scenario
from penstock.bench.workload import LoadRequest, from_lists


def record(index: int, times_s: list[float], *, start_s: float = 0.0, prompt: int = 10) -> RequestRecord:
    made = RequestRecord(
        index=index, num_output_tokens_asked=len(times_s), start_s=start_s, num_prompt_tokens=prompt
    )
    made.pieces_s.extend(times_s)
    made.num_output_tokens = len(times_s)
    made.last_s = made.end_s = times_s[-1]
    return made


def test_a_single_stream_has_a_prefill_and_a_decode_rate():
    scenario = make_scenario("single", draw=Draw(vocab_size=5000))
    seen = Observation(records=(record(0, [0.5, 0.6, 0.7, 0.8]),), duration_s=0.8)
    found = figures(scenario, seen)
    assert found["prefill_tokens_per_s"] == pytest.approx(10 / 0.5)
    assert found["decode_tokens_per_s"] == pytest.approx(10.0)
    assert found["output_tokens_per_s"] == pytest.approx(5.0)
    assert (found["ttft_p50_ms"], found["itl_p50_ms"]) == pytest.approx((500, 100))


def test_gaps_around_a_late_prompt():
    """Between its sending at 1.0 and its first token at 2.0 one stream waited 0.9 s, the other 0.3 s."""
    load = from_lists([[1], [2]], output_lens=[4, 4])
    late = LoadRequest(prompt=(3,), num_prompt_tokens=1, num_output_tokens=1)
    scenario = Scenario(name="long", load=load, late=late, late_after_tokens=1)
    streams = (record(0, [0.8, 0.9, 1.8, 2.5]), record(1, [0.7, 0.9, 1.2, 1.3]))
    seen = Observation(records=streams, duration_s=2.5, late=record(2, [2.0], start_s=1.0))
    found = figures(scenario, seen)
    assert found["usual_itl_p50_ms"] == pytest.approx(150)
    assert found["gap_max_ms"] == pytest.approx(900)
    assert found["late_ttft_ms"] == pytest.approx(1000)


def test_quantiles_interpolate():
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5
    assert quantile([7.0], 0.99) == 7.0
    assert quantile([], 0.5) is None


@pytest.mark.parametrize(
    ("name", "ours", "theirs", "expected"),
    [
        ("output_tokens_per_s", 200.0, 100.0, 2.0),
        ("ttft_p50_ms", 50.0, 100.0, 2.0),
        ("client_cpu_share", 1.0, 2.0, None),
        ("gap_max_ms", 0.0, 100.0, None),
    ],
)
def test_above_one_is_better_whatever_the_figure(name, ours, theirs, expected):
    assert advantage(name, ours=ours, theirs=theirs) == expected


def standing(name: str, precision: str, speeds: list[float]) -> Standing:
    made = Standing(name=name, precision=precision, contender=None)
    made.rounds["mixed"] = [{"output_tokens_per_s": speed} for speed in speeds]
    return made


def test_ratios_are_taken_round_by_round_and_at_the_same_precision():
    rows = ratios(
        [
            standing("penstock", "int8", [100.0, 300.0, 200.0]),
            standing("vllm", "int8", [50.0, 100.0]),
            standing("vllm", "bf16", [1.0]),
        ]
    )
    assert [(row["peer"], row["precision"], row["figure"]) for row in rows] == [
        ("vllm", "int8", "output_tokens_per_s")
    ]
    assert (rows[0]["median"], rows[0]["min"], rows[0]["max"], rows[0]["rounds"]) == (2.5, 2.0, 3.0, 2)


def test_failures_are_counted_and_the_first_is_told():
    bad = record(0, [0.1])
    bad.failure = Failure(kind="timeout", message="too late")
    seen = Observation(records=(bad, record(1, [0.1])), duration_s=1.0)
    assert (seen.num_failed, seen.first_failure) == (1, "timeout: too late")
