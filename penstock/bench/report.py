"""A run as JSON and as text: the record that is kept, and the table that a person reads.

`record_of` makes the record of one run, `print_summary` the table; `write_json` is for every benchmark. No
prompt, answer or key is ever in them.
"""

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from penstock.bench.client import RequestRecord
from penstock.bench.load import LoadResult
from penstock.bench.machine import environment
from penstock.bench.measure import Distribution, Metric, Summary
from penstock.bench.slo import gaps_s
from penstock.bench.target import Target
from penstock.core.errors import StartupError

SCHEMA: Final = 1
DIGITS: Final = 6
"""Significant ones in JSON: more than any clock gives."""
TITLES: Final[dict[Metric, str]] = {
    "ttft": "TTFT: to the first text",
    "tpot": "TPOT: per token after it",
    "itl": "ITL: between texts",
    "e2el": "E2EL: whole request",
}


def record_of(
    benchmark: str,
    *,
    target: Target,
    workload: Mapping[str, object],
    summary: Summary,
    server: Mapping[str, object],
    notes: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
    requests: LoadResult | None = None,
) -> dict[str, object]:
    """Everything that is kept of a run.

    Args:
        benchmark: its name.
        target: the server; its key is left out.
        workload: what was sent, in numbers and words.
        summary: the figures.
        server: what the server says about itself.
        notes: what was found out on the way.
        metadata: the caller's own words.
        requests: a row for each of its requests is added; None adds none.
    """
    record: dict[str, object] = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "environment": environment(),
        "server": {"base_url": target.base_url, "endpoint": target.route, "model": target.model, **server},
        "workload": dict(workload),
        "results": summary_fields(summary),
        "warnings": summary.warnings(),
        "notes": list(notes),
        "metadata": dict(metadata or {}),
    }
    if requests is not None:
        record["requests"] = [request_fields(request) for request in requests.records]
    return record


def summary_fields(summary: Summary) -> dict[str, object]:
    """The figures under the names of the field, times in milliseconds."""
    client = summary.client
    return {
        "status": summary.status,
        "detail": summary.detail,
        "duration_s": rounded(summary.duration_s),
        "num_prompts": summary.num_requests,
        "num_sent": summary.num_sent,
        "completed": summary.num_ok,
        "failures": summary.failures,
        "first_failures": summary.first_failures,
        "error_rate": rounded(summary.error_rate),
        "total_input_tokens": summary.num_prompt_tokens,
        "cached_input_tokens": summary.num_cached_tokens,
        "total_output_tokens": summary.num_output_tokens,
        "tokens_per_piece": rounded(summary.tokens_per_piece),
        "answers_without_usage": summary.num_counted_by_pieces,
        "request_throughput": rounded(summary.request_throughput),
        "output_throughput": rounded(summary.output_throughput),
        "total_token_throughput": rounded(summary.total_throughput),
        "request_goodput": None if summary.goodput is None else rounded(summary.goodput),
        "goodput_slos": [str(slo) for slo in summary.slos],
        "num_good": summary.num_good if summary.slos else None,
        "max_concurrent_requests": summary.max_in_flight,
        "num_held": summary.num_held,
        **{f"{metric}_ms": distribution_fields(found) for metric, found in summary.metrics.items()},
        "client": {
            "cpu_s": rounded(client.cpu_s),
            "cpu_share": rounded(client.cpu_share),
            "lateness_ms": _or_none(client.lateness_ms),
            "loop_delay_ms": _or_none(client.loop_delay_ms),
        },
    }


def distribution_fields(found: Distribution) -> dict[str, float]:
    """`{"num": ..., "mean": ..., "p50": ...}` in milliseconds."""
    return {
        "num": found.num_values,
        "mean": rounded(found.mean_ms),
        "std": rounded(found.std_ms),
        "min": rounded(found.min_ms),
        **{f"p{percentile:g}": rounded(value) for percentile, value in found.percentiles_ms.items()},
        "max": rounded(found.max_ms),
    }


def _or_none(found: Distribution | None) -> dict[str, float] | None:
    return None if found is None else distribution_fields(found)


def request_fields(record: RequestRecord) -> dict[str, object]:
    """A row of one request; times in seconds after the start, gaps in milliseconds."""
    return {
        "index": record.index,
        "start_s": rounded(record.start_s),
        "sent_s": rounded(record.sent_s),
        "end_s": rounded(record.end_s),
        "ttft_ms": None if record.ttft_s is None else rounded(record.ttft_s * 1e3),
        "e2el_ms": rounded(record.e2el_s * 1e3) if record.is_ok else None,
        "itl_ms": [rounded(gap * 1e3) for gap in gaps_s(record)],
        "input_tokens": record.num_prompt_tokens,
        "cached_tokens": record.num_cached_tokens,
        "output_tokens": record.num_output_tokens,
        "output_tokens_asked": record.num_output_tokens_asked,
        "finish_reason": record.finish_reason,
        "failure": None if record.failure is None else asdict(record.failure),
    }


def rounded(value: float) -> float:
    """`value` to `DIGITS` significant digits."""
    return float(f"{value:.{DIGITS}g}")


def write_json(record: Mapping[str, object], *, path: Path) -> None:
    """Write a record; the folder is made if it is not there.

    Raises:
        StartupError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise StartupError(f"{path} cannot be written: {error.strerror}", param="result_dir") from None


def result_name(benchmark: str, *, model: str, label: str | None) -> str:
    """File name of a result: benchmark, model or label, time; without what a path must not have."""
    told = "".join(c if c.isalnum() or c in "-_." else "-" for c in (label or model.rsplit("/", 1)[-1]))
    return f"{benchmark}-{told}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def print_summary(console: Console, *, summary: Summary, title: str, notes: Sequence[str] = ()) -> None:
    """The table that a person reads."""
    console.print(f"[bold]{title}[/]", highlight=False, soft_wrap=True)
    if summary.status != "complete":
        state = f"NOT COMPLETE ({summary.status}: {summary.detail}): {summary.num_sent} of "
        console.print(f"{state}{summary.num_requests} requests were sent", style="red", highlight=False)
    console.print(_totals(summary))
    if summary.metrics:
        console.print(_latencies(summary))
    for kind, count in summary.failures.items():
        told = f"{count} x {kind}: {summary.first_failures[kind]}"
        console.print(told, style="red", markup=False, highlight=False, soft_wrap=True)
    for note in notes:
        console.print(f"note: {note}", style="dim", markup=False, highlight=False, soft_wrap=True)
    for warning in summary.warnings():
        told = f"warning: {warning}"
        console.print(told, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _totals(summary: Summary) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _total_rows(summary):
        table.add_row(name, value)
    return table


def _total_rows(summary: Summary) -> list[tuple[str, str]]:
    client = summary.client
    ended = summary.num_sent - summary.failures.get("cancelled", 0)
    rows = [
        ("requests", f"{summary.num_ok} of {ended} answered well, error rate {summary.error_rate:.1%}"),
        ("duration", f"{summary.duration_s:.2f} s, at most {summary.max_in_flight} in flight"),
        ("tokens", _token_words(summary)),
        ("requests/s", f"{summary.request_throughput:.2f}"),
        (
            "tokens/s",
            f"{summary.output_throughput:.1f} generated, {summary.total_throughput:.1f} with prompts",
        ),
    ]
    if summary.goodput is not None:
        slos = " ".join(str(slo) for slo in summary.slos)
        rows.append(("goodput", f"{summary.goodput:.2f} requests/s ({summary.num_good} keep {slos})"))
    if summary.tokens_per_piece > 1.01:  # fewer than one in a hundred are characters of two tokens
        rows.append(("pieces", f"{summary.tokens_per_piece:.2f} tokens each: ITL is the gap between pieces"))
    rows.append(("client", f"{client.cpu_s:.2f} s CPU, {client.cpu_share:.0%} of a core"))
    if client.lateness_ms is not None:
        late = client.lateness_ms
        rows.append(
            ("sent late", f"p50 {late.percentile_ms(50.0):.1f} ms, p99 {late.percentile_ms(99.0):.1f} ms")
        )
    return rows


def _token_words(summary: Summary) -> str:
    cached = f" ({summary.num_cached_tokens} from the prefix cache)" if summary.num_cached_tokens else ""
    return f"{summary.num_prompt_tokens} in{cached}, {summary.num_output_tokens} out"


def _latencies(summary: Summary) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("milliseconds")
    first = next(iter(summary.metrics.values()))
    names = ["mean", *(f"p{percentile:g}" for percentile in first.percentiles_ms), "max"]
    for name in names:
        table.add_column(name, justify="right")
    for metric, found in summary.metrics.items():
        values = [found.mean_ms, *found.percentiles_ms.values(), found.max_ms]
        table.add_row(TITLES[metric], *(told_ms(value) for value in values))
    return table


def told_ms(value_ms: float) -> str:
    """Milliseconds for a table: three digits at least, none after the point from 100 on."""
    if math.isnan(value_ms):
        return ""
    return f"{value_ms:.0f}" if value_ms >= 100 else f"{value_ms:.3g}" if value_ms < 10 else f"{value_ms:.1f}"
