"""`penstock bench serve` and `penstock bench sweep`: the flags, and what becomes of them.

Flags bear the names of `vllm bench serve` where it has one. Exit codes: 0 all answered and checked, 1 some
requests failed, 2 a flag or the trace is wrong, 4 the server cannot be measured, 5 it died in mid-run, 130
stopped by Ctrl-C. In the last two cases what was measured until then is shown and saved.
"""

import asyncio
import math
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
from cyclopts import Parameter
from rich.console import Console

from penstock.bench.arrivals import ArrivalKind, Arrivals
from penstock.bench.lengths import parse_lengths
from penstock.bench.load import Status, loop_factory
from penstock.bench.machine import machine_words
from penstock.bench.measure import METRICS, Metric, Summary, check_percentiles
from penstock.bench.plots import Picture, draw_run, draw_sweep, require_matplotlib, save_figure
from penstock.bench.recipe import Recipe
from penstock.bench.report import print_summary, result_name, write_json
from penstock.bench.serve import ServeOptions, measure, prepare, record, title_of, warm_up
from penstock.bench.slo import parse_slos
from penstock.bench.sweep import Sweep, SweepOver, SweepPlan, print_sweep, run_sweep, sweep_record
from penstock.bench.target import Route, Target, TargetError
from penstock.bench.trace import TimeUnit, TraceRequest, read_trace
from penstock.bench.workload import MAX_REQUESTS
from penstock.cli.bench_options import check_file, make_folder
from penstock.cli.setting import Range, setting
from penstock.core.errors import InvalidParameterError, PenstockError, RequestError

EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_TARGET: Final = 4
EXIT_BY_STATUS: Final[dict[Status, int]] = {"complete": 0, "server_died": 5, "interrupted": 130}
DEFAULT_NUM_PROMPTS: Final = 100


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class TargetFlags:
    """Which server, and what is asked of it."""

    base_url: Annotated[
        str, Parameter(name=["--base-url", "--url"], help="Address of the server; /v1 is added.")
    ] = "http://127.0.0.1:8000"
    endpoint: Annotated[
        Literal["completions", "chat", "/v1/completions", "/v1/chat/completions"],
        setting("Route that is asked."),
    ] = "completions"
    model: Annotated[str | None, setting("Name of the model; otherwise the server's only one.")] = None
    api_key: Annotated[str | None, Parameter(help="Key for the server.", env_var="PENSTOCK_API_KEY")] = None
    ignore_eos: Annotated[
        bool, setting("Ask that answers have their full length, and check that they do.")
    ] = False
    temperature: Annotated[float, setting("0 always takes the likeliest.", allowed=Range(low=0, high=2))] = (
        0.0
    )
    extra_body: Annotated[str | None, setting("JSON object with more fields of every request.")] = None
    request_timeout_s: Annotated[
        float, setting("Seconds after which a request has failed.", allowed=Range(low=0.001, high=86_400))
    ] = 600.0
    ready_check_timeout_sec: Annotated[
        float,
        setting("Seconds to wait for a server that is not there yet.", allowed=Range(low=0, high=86_400)),
    ] = 0.0


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PromptFlags:
    """What the requests are like."""

    num_prompts: Annotated[
        int | None,
        setting("Requests; otherwise 100, or all of a trace.", allowed=Range(low=1, high=MAX_REQUESTS)),
    ] = None
    dataset_name: Annotated[
        Literal["random", "trace"], setting("Random lengths, or those of a trace file.")
    ] = "random"
    dataset_path: Annotated[
        Path | None, setting("Trace: JSONL with timestamp, input_length, output_length, hash_ids.")
    ] = None
    trace_time_unit: Annotated[TimeUnit, setting("Unit of `timestamp` in the trace.")] = "ms"
    trace_speed: Annotated[
        float, setting("2 replays a trace twice as fast.", allowed=Range(low=0.001, high=1_000_000))
    ] = 1.0
    random_input_len: Annotated[
        str, setting("Prompt tokens: N, uniform:LOW:HIGH, normal:MEAN:STD or lognormal:MEDIAN:SIGMA.")
    ] = "128"
    random_output_len: Annotated[str, setting("Answer tokens, in the same forms.")] = "128"
    random_range_ratio: Annotated[
        float, setting("A plain N becomes uniform from N(1-r) to N(1+r).", allowed=Range(low=0, high=0.999))
    ] = 0.0
    random_prefix_len: Annotated[
        int, setting("Tokens that prompts share at their start.", allowed=Range(low=0, high=1 << 20))
    ] = 0
    num_prefixes: Annotated[
        int, setting("Different shared starts, taken in turn.", allowed=Range(low=1, high=MAX_REQUESTS))
    ] = 1
    prompt_format: Annotated[
        Literal["auto", "ids", "text"],
        setting("Token ids or text; auto sends ids if the route and the server take them."),
    ] = "auto"
    random_token_ids: Annotated[
        str | None, setting("LOW:HIGH, half-open range of token ids; otherwise the tokenizer's, or 300:4000.")
    ] = None
    tokenizer: Annotated[
        Path | None, setting("Folder of the model's tokenizer: more token ids, texts of exact length.")
    ] = None
    seed: Annotated[int, setting("Seed of everything drawn.", allowed=Range(low=0, high=1 << 62))] = 0
    num_warmups: Annotated[
        int, setting("Requests before those that count.", allowed=Range(low=0, high=10_000))
    ] = 4


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PaceFlags:
    """When they are sent."""

    request_rate: Annotated[
        float, setting("Requests per second, an open loop; inf sends as --max-concurrency allows.")
    ] = math.inf
    arrivals: Annotated[
        ArrivalKind | None,
        setting("How an open loop spreads them; otherwise poisson, or gamma if --burstiness is not 1."),
    ] = None
    burstiness: Annotated[
        float,
        setting("Shape of gamma gaps: 1 is Poisson, less is burstier.", allowed=Range(low=1e-3, high=1e6)),
    ] = 1.0
    burst_size: Annotated[
        int,
        setting(
            "Requests that come together, with --arrivals bursts.", allowed=Range(low=1, high=MAX_REQUESTS)
        ),
    ] = 1
    max_concurrency: Annotated[
        int | None, setting("Most requests in flight; alone, a closed loop.", allowed=Range(low=1, high=4096))
    ] = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class ReportFlags:
    """What is told, and where it is kept."""

    goodput: Annotated[
        list[str],
        Parameter(consume_multiple=True, negative="", help="Objectives in ms, e.g. ttft:200 tpot:50."),
    ] = field(default_factory=list)
    percentile_metrics: Annotated[str, setting("Metrics to tell, of ttft,tpot,itl,e2el.")] = ",".join(METRICS)
    metric_percentiles: Annotated[str, setting("Percentiles to tell.")] = "50,90,99"
    save_result: Annotated[bool, setting("Write the result as JSON.")] = False
    save_detailed: Annotated[bool, setting("Write a row for each request too; implies --save-result.")] = (
        False
    )
    result_dir: Annotated[Path, setting("Folder for results and pictures.")] = Path()
    result_filename: Annotated[str | None, setting("Name of the JSON; otherwise made of model and time.")] = (
        None
    )
    label: Annotated[str | None, setting("Word for the file name, in place of the model.")] = None
    metadata: Annotated[
        list[str], Parameter(consume_multiple=True, negative="", help="KEY=VALUE to keep in the JSON.")
    ] = field(default_factory=list)
    plot: Annotated[bool, setting("Draw a picture (PNG) beside the JSON; needs penstock[bench].")] = False
    progress: Annotated[bool, setting("Show how it goes on standard error.")] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadFlags:
    """All the flags of a load."""

    target: TargetFlags
    prompts: PromptFlags
    pace: PaceFlags
    report: ReportFlags


def serve(
    *,
    target: TargetFlags | None = None,
    prompts: PromptFlags | None = None,
    pace: PaceFlags | None = None,
    report: ReportFlags | None = None,
) -> int:
    """Put load on an OpenAI-compatible server and measure it."""
    report = report or ReportFlags()
    flags = LoadFlags(
        target=target or TargetFlags(),
        prompts=prompts or PromptFlags(),
        pace=pace or PaceFlags(),
        report=report,
    )
    return ended(lambda: _serve(flags))


def sweep(
    *,
    over: Annotated[SweepOver, setting("What grows: users of a closed loop, or the rate.")] = "concurrency",
    loads: Annotated[str, setting("Users, or requests per second, rising.")] = "1,2,4,8,16,32,64,128,256",
    min_gain: Annotated[
        float,
        setting(
            "Share of added load that must become throughput, else saturated.",
            allowed=Range(low=0.001, high=0.999),
        ),
    ] = 0.1,
    min_good: Annotated[
        float,
        setting("Share of requests that must keep --goodput.", allowed=Range(low=0.001, high=1)),
    ] = 0.9,
    arrivals: Annotated[ArrivalKind | None, setting("As for `bench serve`; with --over rate.")] = None,
    burstiness: Annotated[
        float, setting("As for `bench serve`; with --over rate.", allowed=Range(low=1e-3, high=1e6))
    ] = 1.0,
    burst_size: Annotated[
        int,
        setting("As for `bench serve`; with --over rate.", allowed=Range(low=1, high=MAX_REQUESTS)),
    ] = 1,
    target: TargetFlags | None = None,
    prompts: PromptFlags | None = None,
    report: ReportFlags | None = None,
) -> int:
    """Raise the load on a server until it is saturated, and draw the curve."""
    try:
        plan = SweepPlan(
            over=over,
            loads=_numbers(loads, param="loads"),
            num_requests=prompts.num_prompts if prompts else None,
            min_gain=min_gain,
            min_good=min_good,
        )
        is_rate = over == "rate"
        pace = PaceFlags(
            request_rate=plan.loads[0] if is_rate else math.inf,
            arrivals=arrivals,
            burstiness=burstiness,
            burst_size=burst_size,
        )
        flags = LoadFlags(
            target=target or TargetFlags(),
            prompts=prompts or PromptFlags(),
            pace=pace,
            report=report or ReportFlags(),
        )
        _check_sweep(flags)
    except RequestError as error:
        return _failed(error, code=EXIT_USAGE)
    return ended(lambda: _sweep(flags, plan=plan))


def _check_sweep(flags: LoadFlags) -> None:
    if flags.prompts.dataset_name == "trace":
        raise InvalidParameterError("dataset_name is trace, a sweep sets the times itself: use bench serve")
    if flags.report.save_detailed:
        raise InvalidParameterError(
            "save_detailed is set, a sweep keeps no rows of requests: use bench serve"
        )


async def _sweep(flags: LoadFlags, *, plan: SweepPlan) -> int:
    options = serve_options(flags)
    outputs = Outputs.of(flags.report)
    console, is_shown = Console(stderr=True), flags.report.progress
    prepared = await prepare(options)
    await warm_up(options, prepared=prepared, console=console, is_shown=is_shown)
    found = await run_sweep(options, plan=plan, prepared=prepared, console=console, is_shown=is_shown)
    target = prepared.target
    title = f"{target.model} at {target.request_url}: sweep over {plan.over}"
    print_sweep(Console(), sweep=found, title=title, notes=prepared.notes)
    kept = sweep_record(found, options=options, prepared=prepared, metadata=outputs.metadata)
    path = outputs.path("sweep", model=target.model)
    outputs.save(kept, path=path)
    if outputs.is_drawn:
        lengths = f"prompts {options.recipe.input_lens}, answers {options.recipe.output_lens}"
        subtitle = f"{title}, {lengths}\n{machine_words()}"
        outputs.draw(draw_sweep(found, subtitle=subtitle), path=path)
    return sweep_exit_code(found)


def sweep_exit_code(found: Sweep) -> int:
    """Failed requests beyond saturation are what a sweep looks for: only an early end is no success."""
    if found.reason == "errors":
        return EXIT_FAILED
    return EXIT_BY_STATUS[found.points[-1].summary.status]


async def _serve(flags: LoadFlags) -> int:
    options = serve_options(flags)
    outputs = Outputs.of(flags.report)
    console = Console(stderr=True)
    prepared = await prepare(options)
    await warm_up(options, prepared=prepared, console=console, is_shown=flags.report.progress)
    measured = await measure(options, prepared=prepared, console=console, is_shown=flags.report.progress)
    title = title_of(options, prepared=prepared)
    print_summary(Console(), summary=measured.summary, title=title, notes=(*prepared.notes, *measured.notes))
    kept = record(
        options,
        prepared=prepared,
        measured=measured,
        metadata=outputs.metadata,
        is_detailed=flags.report.save_detailed,
    )
    path = outputs.path("serve", model=prepared.target.model)
    outputs.save(kept, path=path)
    if outputs.is_drawn:
        subtitle = f"{title}\n{machine_words()}"
        outputs.draw(draw_run(measured.result, title="penstock bench serve", subtitle=subtitle), path=path)
    return exit_code(measured.summary)


def ended(command: Callable[[], Coroutine[None, None, int]]) -> int:
    """Run a command in a loop of its own; an expected error becomes one line and an exit code."""
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            return runner.run(command())
    except TargetError as error:
        return _failed(error, code=TargetError.exit_code)
    except RequestError as error:
        return _failed(error, code=EXIT_USAGE)


def _failed(error: PenstockError, *, code: int) -> int:
    print(f"penstock: {error.message}", file=sys.stderr)
    return code


def exit_code(summary: Summary) -> int:
    """Of a run that was measured, in whole or in part."""
    code = EXIT_BY_STATUS[summary.status]
    return code or (EXIT_FAILED if summary.num_ok < summary.num_requests else 0)


def serve_options(flags: LoadFlags) -> ServeOptions:
    """The flags as the options of a measurement.

    Raises:
        InvalidParameterError: flags that are out of range or do not go together.
        StartupError: the trace cannot be used.
    """
    prompts, report = flags.prompts, flags.report
    recipe = _recipe(prompts, arrivals=_arrivals(flags.pace), max_concurrency=flags.pace.max_concurrency)
    return ServeOptions(
        target=_target(flags.target),
        recipe=recipe,
        prompt_format=prompts.prompt_format,
        tokenizer=_tokenizer_folder(prompts.tokenizer),
        token_ids=None if prompts.random_token_ids is None else _id_range(prompts.random_token_ids),
        num_warmups=prompts.num_warmups,
        ready_timeout_s=flags.target.ready_check_timeout_sec,
        slos=parse_slos(report.goodput),
        metrics=_metrics(report.percentile_metrics),
        percentiles=check_percentiles(_numbers(report.metric_percentiles, param="metric_percentiles")),
    )


def _target(flags: TargetFlags) -> Target:
    route: Route = "chat" if flags.endpoint.endswith(("chat", "chat/completions")) else "completions"
    return Target(
        base_url=flags.base_url,
        model=flags.model or "",
        route=route,
        api_key=flags.api_key,
        ignore_eos=flags.ignore_eos,
        temperature=flags.temperature,
        body=_json_object(flags.extra_body),
        timeout_s=flags.request_timeout_s,
    )


def _json_object(text: str | None) -> dict[str, object]:
    if text is None:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except msgspec.MsgspecError as error:
        raise InvalidParameterError(
            f"extra_body is {text!r:.80}, it must be a JSON object ({error})", param="extra_body"
        ) from None


def _arrivals(flags: PaceFlags) -> Arrivals:
    kind: ArrivalKind = "poisson" if flags.burstiness == 1.0 else "gamma"
    return Arrivals(
        request_rate=flags.request_rate,
        kind=flags.arrivals or kind,
        burstiness=flags.burstiness,
        burst_size=flags.burst_size,
    )


def _recipe(flags: PromptFlags, *, arrivals: Arrivals, max_concurrency: int | None) -> Recipe:
    trace = _trace(flags, arrivals=arrivals)
    ratio = flags.random_range_ratio
    return Recipe(
        num_requests=len(trace) or flags.num_prompts or DEFAULT_NUM_PROMPTS,
        input_lens=parse_lengths(flags.random_input_len, param="random_input_len", range_ratio=ratio),
        output_lens=parse_lengths(flags.random_output_len, param="random_output_len", range_ratio=ratio),
        prefix_len=flags.random_prefix_len,
        num_prefixes=flags.num_prefixes,
        arrivals=arrivals,
        max_concurrency=max_concurrency,
        seed=flags.seed,
        trace=trace,
    )


def _trace(flags: PromptFlags, *, arrivals: Arrivals) -> tuple[TraceRequest, ...]:
    """The trace's requests; empty without a trace. Flags that would have no effect are refused by name."""
    defaults = PromptFlags()
    if flags.dataset_name == "random":
        _refuse_changed(
            flags, defaults, names=("dataset_path", "trace_time_unit", "trace_speed"), why="random"
        )
        return ()
    if flags.dataset_path is None:
        raise InvalidParameterError("dataset_name is trace, name its file with --dataset-path")
    names = (
        "random_input_len",
        "random_output_len",
        "random_range_ratio",
        "random_prefix_len",
        "num_prefixes",
    )
    _refuse_changed(flags, defaults, names=names, why="trace")
    if not arrivals.is_all_at_once:
        raise InvalidParameterError("request_rate is set, a trace has its own times: change --trace-speed")
    return read_trace(
        flags.dataset_path,
        unit=flags.trace_time_unit,
        speed=flags.trace_speed,
        num_requests=flags.num_prompts,
    )


def _refuse_changed(flags: PromptFlags, defaults: PromptFlags, *, names: Sequence[str], why: str) -> None:
    for name in names:
        value = getattr(flags, name)
        if value != getattr(defaults, name):
            raise InvalidParameterError(
                f"{name} is {value}, it has no effect with dataset_name {why}", param=name
            )


def _tokenizer_folder(folder: Path | None) -> Path | None:
    if folder is not None and not (folder / "tokenizer.json").is_file():
        raise InvalidParameterError(
            f"tokenizer is {str(folder)!r:.200}, there is no tokenizer.json in it", param="tokenizer"
        )
    return folder


def _id_range(text: str) -> tuple[int, int]:
    try:
        low, high = (int(number) for number in text.split(":"))
    except ValueError:
        raise InvalidParameterError(
            f"random_token_ids is {text!r:.80}, it must be LOW:HIGH", param="random_token_ids"
        ) from None
    return low, high


def _metrics(text: str) -> tuple[Metric, ...]:
    words = text.split(",")
    found = tuple(metric for metric in METRICS if metric in words)
    if len(found) != len(set(words)):
        raise InvalidParameterError(
            f"percentile_metrics is {text!r:.80}, it must be some of {','.join(METRICS)}",
            param="percentile_metrics",
        )
    return found


def _numbers(text: str, *, param: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(","))
    except ValueError:
        raise InvalidParameterError(
            f"{param} is {text!r:.80}, it must be numbers with commas between", param=param
        ) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where results go; made, and so checked, before anything is measured."""

    folder: Path
    filename: str | None
    label: str | None
    metadata: dict[str, str]
    is_saved: bool
    is_drawn: bool

    @classmethod
    def of(cls, flags: ReportFlags) -> "Outputs":
        """Check the flags and make the folder.

        Raises:
            InvalidParameterError: a word of --metadata is not KEY=VALUE.
            StartupError: nothing can be written there, or a picture is wanted and cannot be drawn.
        """
        is_saved = flags.save_result or flags.save_detailed
        if flags.plot:
            require_matplotlib()
        if is_saved or flags.plot:
            make_folder(flags.result_dir, param="result_dir")
        if flags.result_filename:
            check_file(flags.result_dir / flags.result_filename, param="result_filename")
        return cls(
            folder=flags.result_dir,
            filename=flags.result_filename,
            label=flags.label,
            metadata=_metadata(flags.metadata),
            is_saved=is_saved,
            is_drawn=flags.plot,
        )

    def path(self, benchmark: str, *, model: str) -> Path:
        """Of the JSON; the picture has the same name with `.png`."""
        return self.folder / (self.filename or result_name(benchmark, model=model, label=self.label))

    def save(self, kept: dict[str, object], *, path: Path) -> None:
        """Write the JSON if it is wanted."""
        if self.is_saved:
            write_json(kept, path=path)
            print(f"result: {path}")

    @staticmethod
    def draw(picture: Picture, *, path: Path) -> None:
        """Write the picture beside the JSON at `path`."""
        picture_path = path.with_suffix(".png")
        save_figure(picture, path=picture_path)
        print(f"picture: {picture_path}")


def _metadata(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        name, is_pair, value = word.partition("=")
        if not (name and is_pair):
            raise InvalidParameterError(f"metadata is {word!r:.80}, it must be KEY=VALUE", param="metadata")
        found[name] = value
    return found
