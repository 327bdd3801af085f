"""Prometheus metrics: a sink for engine events and HTTP events, and the text that `/metrics` shows.

vLLM's names with the prefix `penstock_`, base units, labels bounded by the catalog and by the tables in
the code: a client can never make a new time series. Events only add to plain numbers; prometheus-client turns
them into text when somebody asks. Not a decision maker: nothing reads these back.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from penstock.core.ids import ModelName
from penstock.core.ports import Clock, RequestRecord
from penstock.core.tokens import StepStats
from penstock.observe.catalogue import METRICS, PREFIX, Kind, Spec
from penstock.observe.memory import resident_bytes

_OTHER_MODEL: Final = ModelName("other")
_RATE_WINDOW_S: Final = 10.0
_MAX_LABELS: Final = 200
"""Most values of one bounded label; more are counted as `other`."""
_CODE_CHARS: Final = 64
_RENDERINGS_PER_S: Final = 10


@dataclass(slots=True)
class _Buckets:
    """A histogram: `counts[i]` observations at most `bounds[i]`, the last one unbounded."""

    bounds: tuple[float, ...]
    counts: list[int] = field(init=False)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        running, result = 0, []
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            running += count
            result.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(running)))
        return result


class _Rate:
    """Tokens per second over the last ten seconds, in buckets of a second; at most eleven of them."""

    def __init__(self) -> None:
        self._buckets: deque[tuple[int, int]] = deque(maxlen=int(_RATE_WINDOW_S) + 1)

    def add(self, count: int, *, now_s: float) -> None:
        second = int(now_s)
        if self._buckets and self._buckets[-1][0] == second:
            count += self._buckets.pop()[1]
        self._buckets.append((second, count))

    def value(self, *, now_s: float) -> float:
        recent = sum(count for second, count in self._buckets if second > now_s - _RATE_WINDOW_S - 1)
        return recent / _RATE_WINDOW_S


class _ModelNumbers:
    """All numbers of one model."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {
            spec.name: 0.0
            for spec in METRICS
            if spec.labels == ("model_name",) and spec.kind is not Kind.HISTOGRAM
        }
        self.buckets: dict[str, _Buckets] = {
            spec.name: _Buckets(spec.buckets) for spec in METRICS if spec.kind is Kind.HISTOGRAM
        }
        self.labelled: dict[str, dict[str, float]] = {
            spec.name: {} for spec in METRICS if len(spec.labels) == 2 and spec.labels[0] == "model_name"
        }
        self.rate = _Rate()
        self.itl = self.buckets["inter_token_latency_seconds"]


def _bump(counts: dict[str, float], label: str) -> None:
    if label not in counts and len(counts) >= _MAX_LABELS:
        label = "other"
    counts[label] = counts.get(label, 0.0) + 1


def _add_step(numbers: _ModelNumbers, stats: StepStats) -> None:
    """A step that computed something; there is also news of none, and of steps that found nothing to do."""
    numbers.values["engine_steps_total"] += 1
    numbers.buckets["iteration_tokens_total"].observe(stats.num_batched_tokens)
    numbers.buckets["batch_size"].observe(stats.num_seqs)
    numbers.buckets["step_time_seconds"].observe(stats.step_time_s)
    numbers.buckets["step_host_time_seconds"].observe(stats.host_time_s)


def _add_drafts(numbers: _ModelNumbers, stats: StepStats) -> None:
    numbers.values["spec_decode_num_drafts_total"] += stats.num_drafts
    numbers.values["spec_decode_num_draft_tokens_total"] += stats.num_draft_tokens
    numbers.values["spec_decode_num_accepted_tokens_total"] += sum(stats.num_accepted_tokens)
    by_position = numbers.labelled["spec_decode_num_accepted_tokens_per_pos_total"]
    for position, count in enumerate(stats.num_accepted_tokens):
        by_position[str(position)] = by_position.get(str(position), 0.0) + count


class Metrics:
    """Implements `core.ports.EngineEvents` and the server's `HttpEvents`; one per process.

    Called from the event loop only; no call blocks, raises or allocates without bound.
    """

    def __init__(self, models: Sequence[ModelName], *, clock: Clock) -> None:
        """Make the series of `models`; events of any other name count as model `other`."""
        self._clock = clock
        self._models = {name: _ModelNumbers() for name in models}
        self._process: dict[str, dict[tuple[str, ...], float]] = {
            spec.name: {} for spec in METRICS if not spec.labels or spec.labels[0] != "model_name"
        }
        self._text = b""
        self._rendered_second = -1
        self._num_rendered = 0
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def _of(self, model: ModelName) -> _ModelNumbers:
        numbers = self._models.get(model)
        if numbers is None:
            numbers = self._models.setdefault(_OTHER_MODEL, _ModelNumbers())
        return numbers

    def on_step(self, model: ModelName, stats: StepStats) -> None:
        """After each engine step."""
        numbers = self._of(model)
        values = numbers.values
        values["num_requests_running"] = stats.num_running
        values["num_requests_waiting"] = stats.num_waiting
        values["num_tokens_waiting"] = stats.num_waiting_tokens
        values["kv_cache_usage_perc"] = stats.num_blocks_owned / max(1, stats.num_blocks)
        values["kv_cache_blocks"] = stats.num_blocks
        values["kv_cache_blocks_owned"] = stats.num_blocks_owned
        values["kv_cache_blocks_cached"] = stats.num_blocks_cached
        values["kv_cache_waste_ratio"] = _waste(stats)
        values["kv_cache_owned_slot_seconds_total"] += stats.num_slots_owned * stats.step_time_s
        values["kv_cache_used_slot_seconds_total"] += stats.num_slots_used * stats.step_time_s
        values["prompt_tokens_computed_total"] += stats.num_prompt_tokens
        values["prefix_cache_queries_total"] += stats.num_prefix_query_tokens
        values["prefix_cache_hits_total"] += stats.num_prefix_hit_tokens
        values["out_of_memory_total"] += stats.num_out_of_memory
        values["kv_offload_hits_total"] += stats.num_offload_hit_tokens
        values["kv_offload_saved_bytes_total"] += stats.offload_saved_bytes
        values["kv_offload_loaded_bytes_total"] += stats.offload_loaded_bytes
        values["kv_offload_time_seconds_total"] += stats.offload_time_s
        values["kv_offload_used_bytes"] = stats.offload_used_bytes
        values["num_preemptions_total"] += stats.num_preemptions
        values["generation_tokens_total"] += stats.num_generated_tokens
        values["grammar_forced_tokens_total"] += stats.num_forced_tokens
        values["lora_adapters_running"] = stats.num_adapters_running
        values["lora_adapters_waiting"] = stats.num_adapters_waiting
        if stats.num_drafts:
            _add_drafts(numbers, stats)
        if stats.num_seqs:
            _add_step(numbers, stats)
        numbers.rate.add(stats.num_generated_tokens, now_s=self._clock.monotonic())

    def on_token_gap(self, model: ModelName, gap_s: float) -> None:
        """Between two deltas of one answer."""
        self._of(model).itl.observe(gap_s)

    def on_request(self, record: RequestRecord) -> None:
        """Once per request, at its end."""
        numbers = self._of(record.model)
        numbers.values["prompt_tokens_total"] += record.prompt_tokens
        numbers.values["prompt_tokens_cached_total"] += record.cached_tokens
        numbers.values["tool_calls_total"] += record.num_tool_calls
        _bump(numbers.labelled["request_success_total"], record.finish_reason.value)
        if record.adapter:
            _bump(numbers.labelled["lora_requests_total"], record.adapter)
        if record.is_accepted:
            _observe(numbers.buckets, record)

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        """When an engine process died or hung and is started again; its gauges start from nothing."""
        numbers = self._of(model)
        _bump(numbers.labelled["engine_restarts_total"], reason)
        for spec in METRICS:
            if spec.kind is Kind.GAUGE and spec.labels == ("model_name",):
                numbers.values[spec.name] = 0.0

    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None:
        """When a request's grammar is compiled, found in the cache or refused."""
        numbers = self._of(model)
        _bump(numbers.labelled["grammar_requests_total"], outcome)
        if compile_s:
            numbers.buckets["grammar_compile_seconds"].observe(compile_s)

    def on_http(self, *, route: str, status: int) -> None:
        """After each answer; `route` is a row of the route table."""
        self._add("http_requests_total", (route, str(status)))

    def on_error(self, code: str) -> None:
        """For each error told to a client."""
        self._add("errors_total", (code[:_CODE_CHARS],))

    def on_connection_closed(self, reason: str) -> None:
        """When a connection is cut by the server or left by the client."""
        self._add("connections_closed_total", (reason,))

    def _add(self, name: str, labels: tuple[str, ...]) -> None:
        counts = self._process[name]
        if labels not in counts and len(counts) >= _MAX_LABELS:
            labels = ("other",) * len(labels)
        counts[labels] = counts.get(labels, 0.0) + 1

    def exposition(self) -> tuple[bytes, str]:
        """All metrics as text, and its content type.

        Costs a few milliseconds; beyond ten readers in one second the text of that second's tenth is given.
        """
        second = int(self._clock.monotonic())
        if second != self._rendered_second:
            self._rendered_second, self._num_rendered = second, 0
        if self._num_rendered < _RENDERINGS_PER_S:
            self._num_rendered += 1
            self._text = generate_latest(self._registry)
        return self._text, CONTENT_TYPE_PLAIN_0_0_4

    def collect(self) -> Iterator[Metric]:
        """Families for prometheus-client; called when `/metrics` is read."""
        now_s = self._clock.monotonic()
        for numbers in self._models.values():
            numbers.values["generation_tokens_per_second"] = numbers.rate.value(now_s=now_s)
        self._process["process_resident_memory_bytes"][()] = float(resident_bytes())
        for spec in METRICS:
            yield self._family(spec)

    def _family(self, spec: Spec) -> Metric:
        name = PREFIX + spec.name
        if spec.kind is Kind.HISTOGRAM:
            family = HistogramMetricFamily(name, spec.help, labels=spec.labels)
            for model, numbers in self._models.items():
                buckets = numbers.buckets[spec.name]
                family.add_metric([model], buckets.cumulative(), buckets.total)
            return family
        kind = CounterMetricFamily if spec.kind is Kind.COUNTER else GaugeMetricFamily
        plain = kind(name, spec.help, labels=spec.labels)
        for labels, value in self._samples(spec):
            plain.add_metric(labels, value)
        return plain

    def _samples(self, spec: Spec) -> Iterator[tuple[tuple[str, ...], float]]:
        if spec.name in self._process:
            yield from self._process[spec.name].items()
            return
        for model, numbers in self._models.items():
            if spec.name in numbers.labelled:
                for label, value in numbers.labelled[spec.name].items():
                    yield (model, label), value
            else:
                yield (model,), numbers.values[spec.name]


def _observe(buckets: dict[str, _Buckets], record: RequestRecord) -> None:
    buckets["e2e_request_latency_seconds"].observe(record.e2e_s)
    buckets["request_queue_time_seconds"].observe(record.queue_wait_s)
    buckets["request_inference_time_seconds"].observe(record.inference_s)
    buckets["request_prompt_tokens"].observe(record.prompt_tokens)
    buckets["request_generation_tokens"].observe(record.completion_tokens)
    if record.ttft_s is not None:
        buckets["time_to_first_token_seconds"].observe(record.ttft_s)
    if record.tpot_s is not None:
        buckets["request_time_per_output_token_seconds"].observe(record.tpot_s)


def _waste(stats: StepStats) -> float:
    return 1.0 - stats.num_slots_used / stats.num_slots_owned if stats.num_slots_owned else 0.0
