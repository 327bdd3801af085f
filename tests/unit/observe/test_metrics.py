"""Metrics: exact values from exact events, bounded labels, a page that is current."""

from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from penstock.core.ids import ModelName, RequestId
from penstock.core.ports import RequestRecord
from penstock.core.text import FinishReason
from penstock.core.tokens import StepStats
from penstock.observe.catalogue import METRICS, PREFIX, Kind, markdown
from penstock.observe.metrics import Metrics
from tests.fakes.manual_clock import ManualClock

MODEL = ModelName("m")
STEP = StepStats(
    step_time_s=0.5,
    num_seqs=3,
    num_batched_tokens=12,
    num_prompt_tokens=10,
    num_generated_tokens=2,
    num_prefix_query_tokens=20,
    num_prefix_hit_tokens=16,
    num_preemptions=1,
    num_running=3,
    num_waiting=4,
    num_waiting_tokens=40,
    num_blocks=10,
    num_blocks_free=3,
    num_blocks_cached=2,
    num_blocks_owned=5,
    num_slots_owned=80,
    num_slots_used=60,
)
RECORD = RequestRecord(
    request_id=RequestId("r"),
    model=MODEL,
    tenant_id="t",
    prompt_tokens=7,
    cached_tokens=3,
    completion_tokens=5,
    finish_reason=FinishReason.STOP,
    error_code=None,
    ttft_s=0.2,
    tpot_s=0.15,
    e2e_s=1.0,
    tokens_per_s=5.0,
    queue_wait_s=0.05,
    batch_size=2,
    kv_usage=0.1,
    num_preemptions=0,
    inference_s=0.9,
)


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def metrics(clock) -> Metrics:
    return Metrics([MODEL], clock=clock)


def samples(metrics: Metrics) -> dict[tuple, float]:
    text = metrics.exposition()[0].decode()
    return {
        (sample.name.removeprefix(PREFIX), *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(found: dict[tuple, float], name: str, **labels: str) -> float:
    return found[(name, *sorted({"model_name": MODEL, **labels}.items()))]


def test_a_step_moves_gauges_and_adds_to_counters(metrics):
    metrics.on_step(MODEL, STEP)
    metrics.on_step(MODEL, STEP)
    found = samples(metrics)
    assert of(found, "num_requests_running") == 3
    assert of(found, "num_requests_waiting") == 4
    assert of(found, "kv_cache_usage_perc") == 0.5
    assert of(found, "kv_cache_waste_ratio") == 0.25
    assert of(found, "kv_cache_owned_slot_seconds_total") == 80.0
    assert of(found, "kv_cache_used_slot_seconds_total") == 60.0
    assert of(found, "prefix_cache_queries_total") == 40
    assert of(found, "prefix_cache_hits_total") == 32
    assert of(found, "num_preemptions_total") == 2
    assert of(found, "generation_tokens_total") == 4
    assert of(found, "batch_size_count") == 2
    assert of(found, "iteration_tokens_total_sum") == 24
    assert of(found, "batch_size_bucket", le="2.0") == 0
    assert of(found, "batch_size_bucket", le="4.0") == 2


def test_a_request_gives_ttft_tpot_e2el_and_one_count_by_how_it_ended(metrics):
    metrics.on_request(RECORD)
    found = samples(metrics)
    assert of(found, "request_success_total", finished_reason="stop") == 1
    assert of(found, "prompt_tokens_total") == 7
    assert of(found, "time_to_first_token_seconds_sum") == 0.2
    assert of(found, "request_time_per_output_token_seconds_sum") == 0.15
    assert of(found, "e2e_request_latency_seconds_sum") == 1.0
    assert of(found, "request_queue_time_seconds_bucket", le="0.06") == 1
    assert of(found, "request_inference_time_seconds_sum") == 0.9


def test_a_request_without_a_token_has_no_first_token_time(metrics):
    metrics.on_request(msgspec.structs.replace(RECORD, ttft_s=None, tpot_s=None, completion_tokens=0))
    found = samples(metrics)
    assert of(found, "time_to_first_token_seconds_count") == 0
    assert of(found, "request_time_per_output_token_seconds_count") == 0


def test_a_refused_request_is_counted_and_spoils_no_histogram(metrics):
    refused = {"is_accepted": False, "finish_reason": FinishReason.ERROR, "error_code": "queue_full"}
    metrics.on_request(msgspec.structs.replace(RECORD, ttft_s=None, **refused))
    found = samples(metrics)
    assert of(found, "request_success_total", finished_reason="error") == 1
    counts = {key[0]: value for key, value in found.items() if key[0].endswith("_count")}
    assert counts
    assert set(counts.values()) == {0}


def test_a_value_on_a_bound_belongs_to_that_bucket(metrics):
    metrics.on_token_gap(MODEL, 0.01)
    found = samples(metrics)
    assert of(found, "inter_token_latency_seconds_bucket", le="0.005") == 0
    assert of(found, "inter_token_latency_seconds_bucket", le="0.01") == 1
    assert of(found, "inter_token_latency_seconds_bucket", le="+Inf") == 1


def test_tokens_per_second_look_back_ten_seconds(metrics, clock):
    for _ in range(10):
        metrics.on_step(MODEL, STEP)
        clock.advance(1)
    assert of(samples(metrics), "generation_tokens_per_second") == pytest.approx(2, rel=0.2)
    clock.advance(20)
    assert of(samples(metrics), "generation_tokens_per_second") == 0


def test_a_restart_is_counted_and_the_gauges_start_from_nothing(metrics):
    metrics.on_step(MODEL, STEP)
    metrics.on_engine_restart(MODEL, "died")
    found = samples(metrics)
    assert of(found, "engine_restarts_total", reason="died") == 1
    assert of(found, "num_requests_running") == 0
    assert of(found, "generation_tokens_total") == 2


def test_grammars_are_counted_by_what_came_of_them_and_only_compilations_are_timed(metrics):
    metrics.on_grammar(MODEL, "compiled", 0.3)
    metrics.on_grammar(MODEL, "cached", 0.0)
    metrics.on_step(MODEL, msgspec.structs.replace(STEP, num_forced_tokens=2))
    found = samples(metrics)
    assert of(found, "grammar_requests_total", outcome="compiled") == 1
    assert of(found, "grammar_requests_total", outcome="cached") == 1
    assert of(found, "grammar_compile_seconds_count") == 1
    assert of(found, "grammar_forced_tokens_total") == 2


def test_unknown_models_share_one_series(metrics):
    for index in range(1000):
        metrics.on_token_gap(ModelName(f"x{index}"), 0.1)
    names = {dict(key[1:]).get("model_name") for key in samples(metrics)}
    assert names - {None} == {"m", "other"}


def test_labels_are_bounded_whatever_is_sent(metrics):
    for index in range(1000):
        metrics.on_error(f"code{index}")
        metrics.on_http(route=f"/r{index}", status=200)
    found = samples(metrics)
    assert len(found) < 1500
    assert found[("errors_total", ("code", "other"))] == 800


def test_process_series(metrics):
    metrics.on_http(route="/health", status=200)
    metrics.on_connection_closed("slow_reader")
    found = samples(metrics)
    assert found[("http_requests_total", ("route", "/health"), ("status", "200"))] == 1
    assert found[("connections_closed_total", ("reason", "slow_reader"))] == 1
    assert found[("process_resident_memory_bytes",)] > 1_000_000


def test_scraping_without_measure_costs_ten_renderings_a_second(metrics, clock):
    for _ in range(10):
        metrics.exposition()
    metrics.on_error("xyzzy")
    assert b"xyzzy" not in metrics.exposition()[0]
    clock.advance(1)
    assert b"xyzzy" in metrics.exposition()[0]


def test_every_metric_of_the_table_is_served_and_nothing_else(metrics):
    text = metrics.exposition()[0].decode()
    served = {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")}
    assert served == {PREFIX + spec.name for spec in METRICS}


def test_names_follow_the_rules():
    for spec in METRICS:
        assert spec.name.endswith("_total") or spec.kind is not Kind.COUNTER, spec.name
        assert not spec.name.endswith("_total") or spec.kind is not Kind.GAUGE, spec.name
        assert list(spec.buckets) == sorted(set(spec.buckets))
        assert spec.help.endswith(".")


def test_the_page_is_current():
    page = Path(__file__).parents[3] / "docs" / "metrics.md"
    assert page.read_text() == markdown(), "run: python -m penstock.observe.catalogue > docs/metrics.md"
