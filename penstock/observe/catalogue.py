"""The table of all metrics: name, kind, labels, buckets, meaning, and OpenTelemetry's name where it has one.

`metrics` serves exactly this table and `docs/metrics.md` is generated from it.
"""

import enum
from dataclasses import dataclass
from typing import Final

PREFIX: Final = "penstock_"
_MODEL: Final = ("model_name",)

_SHORT_S: Final = (
    0.0005,
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
    20.0,
    40.0,
    80.0,
)
_HOST_S: Final = (0.00005, 0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5)
_FIRST_S: Final = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
)
_LONG_S: Final = (
    0.01,
    0.05,
    0.1,
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
)
_COUNTS: Final = (
    1.0,
    2.0,
    4.0,
    8.0,
    16.0,
    32.0,
    64.0,
    128.0,
    256.0,
    512.0,
    1024.0,
    2048.0,
    4096.0,
    8192.0,
    16384.0,
)
_TOKENS: Final = (
    1.0,
    2.0,
    5.0,
    10.0,
    20.0,
    50.0,
    100.0,
    200.0,
    500.0,
    1000.0,
    2000.0,
    5000.0,
    10000.0,
    20000.0,
    50000.0,
    100000.0,
)


class Kind(enum.Enum):
    """What Prometheus makes of it."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One metric."""

    name: str
    """Without the prefix; base units, `_total` for counters."""
    kind: Kind
    help: str
    labels: tuple[str, ...] = _MODEL
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, without infinity."""
    otel: str = ""
    """Name among OpenTelemetry's GenAI metrics, if there is one."""


def _counter(name: str, text: str, *, labels: tuple[str, ...] = _MODEL, otel: str = "") -> Spec:
    return Spec(name=name, kind=Kind.COUNTER, help=text, labels=labels, otel=otel)


def _gauge(name: str, text: str, *, labels: tuple[str, ...] = _MODEL) -> Spec:
    return Spec(name=name, kind=Kind.GAUGE, help=text, labels=labels)


def _histogram(name: str, text: str, *, buckets: tuple[float, ...], otel: str = "") -> Spec:
    return Spec(name=name, kind=Kind.HISTOGRAM, help=text, buckets=buckets, otel=otel)


METRICS: Final[tuple[Spec, ...]] = (
    _gauge("num_requests_running", "Requests in the running batch."),
    _gauge("num_requests_waiting", "Requests that wait to be scheduled."),
    _gauge("num_tokens_waiting", "Tokens of the requests that wait."),
    _gauge("kv_cache_usage_perc", "KV blocks owned by requests over all blocks, 0 to 1."),
    _gauge("kv_cache_blocks", "KV blocks in the pool."),
    _gauge("kv_cache_blocks_owned", "KV blocks owned by requests."),
    _gauge("kv_cache_blocks_cached", "KV blocks kept for prefix hits and owned by nobody."),
    _gauge("kv_cache_waste_ratio", "Owned slots that hold no token over owned slots, after the last step."),
    _counter("kv_cache_owned_slot_seconds_total", "Token slots in owned blocks, times seconds."),
    _counter("kv_cache_used_slot_seconds_total", "Of those, slots that hold a token, times seconds."),
    _counter("prefix_cache_queries_total", "Prompt tokens looked up in the prefix tree."),
    _counter("prefix_cache_hits_total", "Prompt tokens found in the prefix tree."),
    _counter("out_of_memory_total", "Allocations that failed in a step; its work was done in smaller parts."),
    _counter("kv_offload_hits_total", "Tokens whose KV came back from host memory."),
    _counter("kv_offload_saved_bytes_total", "Bytes of KV copied from the pool to host memory."),
    _counter("kv_offload_loaded_bytes_total", "Bytes of KV copied from host memory to the pool."),
    _counter("kv_offload_time_seconds_total", "What these copies took."),
    _gauge("kv_offload_used_bytes", "Host memory that holds KV blocks."),
    _counter("num_preemptions_total", "Times that a request gave its blocks back and started again."),
    _counter("spec_decode_num_drafts_total", "Runs of guessed tokens that were verified."),
    _counter("spec_decode_num_draft_tokens_total", "Guessed tokens that were verified."),
    _counter("spec_decode_num_accepted_tokens_total", "Of those, tokens that stood."),
    _counter(
        "spec_decode_num_accepted_tokens_per_pos_total",
        "Guessed tokens that stood, by their place in the run, 0 to 31.",
        labels=("model_name", "position"),
    ),
    _counter(
        "prompt_tokens_total", "Prompt tokens of ended requests.", otel="gen_ai.client.token.usage{input}"
    ),
    _counter("prompt_tokens_cached_total", "Of those, tokens found in the prefix tree."),
    _counter("prompt_tokens_computed_total", "Prompt tokens that went through the model."),
    _counter("generation_tokens_total", "Tokens generated.", otel="gen_ai.client.token.usage{output}"),
    _counter(
        "grammar_forced_tokens_total", "Of those, tokens that a grammar forced: no step was made for them."
    ),
    _counter(
        "grammar_requests_total",
        "Requests with a grammar: compiled, found cached, or refused.",
        labels=("model_name", "outcome"),
    ),
    _histogram("grammar_compile_seconds", "Time to compile a grammar, or to refuse it.", buckets=_SHORT_S),
    _gauge("generation_tokens_per_second", "Tokens generated per second over the last ten seconds."),
    _counter("engine_steps_total", "Engine steps."),
    _gauge("lora_adapters_running", "Different LoRA adapters of running requests."),
    _gauge("lora_adapters_waiting", "Different LoRA adapters of which no request runs, but some wait."),
    _counter(
        "lora_requests_total",
        "Ended requests for a LoRA adapter, by its name; names beyond the first 200 are `other`.",
        labels=("model_name", "adapter"),
    ),
    _counter(
        "request_success_total",
        "Ended requests by how they ended: stop, length, tool_calls, error, cancelled, content_filter.",
        labels=("model_name", "finished_reason"),
    ),
    _counter("tool_calls_total", "Calls of tools in answers, whole or cut."),
    _counter(
        "engine_restarts_total",
        "Times that the engine process died or hung and was started again.",
        labels=("model_name", "reason"),
    ),
    _histogram(
        "time_to_first_token_seconds",
        "Request received to first non-empty token (TTFT).",
        buckets=_FIRST_S,
        otel="gen_ai.server.time_to_first_token",
    ),
    _histogram(
        "inter_token_latency_seconds", "Each gap between tokens of one answer (ITL).", buckets=_SHORT_S
    ),
    _histogram(
        "request_time_per_output_token_seconds",
        "(Last token - first token) / (tokens - 1) of an answer; one per request, the mean over n (TPOT).",
        buckets=_SHORT_S,
        otel="gen_ai.server.time_per_output_token",
    ),
    _histogram(
        "e2e_request_latency_seconds",
        "Request received to its end (E2EL).",
        buckets=_LONG_S,
        otel="gen_ai.server.request.duration",
    ),
    _histogram(
        "request_queue_time_seconds", "Arrival in the engine to the first scheduled step.", buckets=_FIRST_S
    ),
    _histogram(
        "request_inference_time_seconds",
        "First scheduled step to the end, by the engine's clock.",
        buckets=_LONG_S,
    ),
    _histogram("request_prompt_tokens", "Prompt tokens per request.", buckets=_TOKENS),
    _histogram("request_generation_tokens", "Generated tokens per request.", buckets=_TOKENS),
    _histogram(
        "iteration_tokens_total", "Tokens per engine step (a histogram, as at vLLM).", buckets=_COUNTS
    ),
    _histogram("batch_size", "Sequences per engine step.", buckets=_COUNTS),
    _histogram("step_time_seconds", "Time of an engine step.", buckets=_SHORT_S),
    _histogram(
        "step_host_time_seconds",
        "Time before an engine step in which nothing was computed: the host's part that no step hides.",
        buckets=_HOST_S,
    ),
    _counter("http_requests_total", "HTTP answers by route and status.", labels=("route", "status")),
    _counter("errors_total", "Errors told to clients, by code.", labels=("code",)),
    _counter(
        "connections_closed_total",
        "Connections cut by the server or left by the client in the middle, by reason.",
        labels=("reason",),
    ),
    _gauge("process_resident_memory_bytes", "Resident memory of the API process.", labels=()),
)


_HEAD: Final = """\
# Metrics

`GET /metrics` on the public port, in Prometheus' text format. Names are vLLM's with the prefix `penstock_`.
Labels are bounded: model names come from the catalog, routes from the route table. The last column is the
name among OpenTelemetry's GenAI metrics, where there is one.
This page is generated: `python -m penstock.observe.catalogue > docs/metrics.md`.

| name | kind | labels | meaning | OpenTelemetry |
|---|---|---|---|---|
"""


def markdown() -> str:
    """The page `docs/metrics.md`."""
    rows = [
        f"| `{PREFIX}{spec.name}` | {spec.kind.value} | {', '.join(spec.labels) or '-'} | {spec.help} | "
        f"{f'`{spec.otel}`' if spec.otel else '-'} |"
        for spec in METRICS
    ]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
