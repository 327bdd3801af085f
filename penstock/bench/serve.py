"""`penstock bench serve`: find the server, make the load, warm up, measure, report.

The commands of `cli` make `ServeOptions` and print; everything between is here, so that `sweep` can do it
again and again on one server.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final, Literal

from rich.console import Console

from penstock.bench import probe
from penstock.bench.client import RequestRecord
from penstock.bench.load import LoadResult, drive
from penstock.bench.measure import DEFAULT_PERCENTILES, METRICS, Metric, Summary, summarize
from penstock.bench.progress import live
from penstock.bench.prompts import PROBE, PromptWriter, Segment, WordWriter, one_token_words, token_id_writer
from penstock.bench.recipe import Recipe, make_warmup, make_workload
from penstock.bench.report import record_of
from penstock.bench.slo import Slo
from penstock.bench.target import Target, TargetError
from penstock.core.errors import InvalidParameterError
from penstock.text.tokenizer import Tokenizer

PromptFormat = Literal["auto", "ids", "text"]
PROBE_TOKENS: Final = 16
UNEXPECTED_CACHED: Final = 0.2
"""Share of prompt tokens that no cache should know: all prompts begin with the same chat template at most."""
SCALE_WORDS: Final = (8, 72)
"""Words of the two prompts that measure tokens per word; both fit any context."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """What a measurement is told.

    Raises:
        InvalidParameterError: options that do not go together.
    """

    target: Target
    """Its model may be empty: then the server must have exactly one."""
    recipe: Recipe = field(default_factory=Recipe)
    prompt_format: PromptFormat = "auto"
    """`auto`: token ids for completions if the server takes them, else text."""
    tokenizer: Path | None = None
    """Folder of the model's tokenizer: a wider range of token ids, texts of exact length."""
    token_ids: tuple[int, int] | None = None
    """Half-open range of random token ids; None is the tokenizer's, or 300 to 4000."""
    num_warmups: int = 4
    """Requests before the measured ones, at least 0."""
    ready_timeout_s: float = 0.0
    """How long to wait for a server that is not there yet."""
    slos: tuple[Slo, ...] = ()
    metrics: tuple[Metric, ...] = METRICS
    percentiles: tuple[float, ...] = DEFAULT_PERCENTILES

    def __post_init__(self) -> None:
        if self.target.route == "chat" and self.prompt_format == "ids":
            raise InvalidParameterError("prompt_format is ids, endpoint chat takes text only")
        if self.token_ids is not None and (self.prompt_format == "text" or self.target.route == "chat"):
            raise InvalidParameterError("random_token_ids is set, prompts are text here: it has no effect")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A server that was found, and how prompts are written for it."""

    target: Target
    """With its model."""
    writer: PromptWriter
    server: dict[str, object]
    """What it says about itself."""
    notes: tuple[str, ...]
    """What was found out, for the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run and its figures."""

    result: LoadResult
    summary: Summary
    notes: tuple[str, ...] = ()
    """What to know about the figures."""


async def prepare(options: ServeOptions) -> Prepared:
    """Find the server, choose the model, find out which prompts it takes.

    Raises:
        TargetError: the server or the model is not there, or a first short request fails.
        InvalidParameterError: the requests are longer than the model's context.
    """
    facts = await probe.find(options.target, ready_timeout_s=options.ready_timeout_s)
    model = probe.choose_model(facts, wanted=options.target.model or None)
    target = replace(options.target, model=model)
    _check_lengths(options.recipe, max_model_len=facts.max_model_len)
    tokenizer = None if options.tokenizer is None else Tokenizer.from_folder(options.tokenizer)
    notes: list[str] = []
    writer = await _writer(options, target=target, tokenizer=tokenizer, notes=notes)
    server: dict[str, object] = {"software": facts.software, "max_model_len": facts.max_model_len}
    return Prepared(target=target, writer=writer, server=server, notes=tuple(notes))


def _check_lengths(recipe: Recipe, *, max_model_len: int | None) -> None:
    """Refuse a load that the model cannot hold, if it says what it can hold."""
    if recipe.trace:
        longest = max(request.input_len + request.output_len for request in recipe.trace)
    elif recipe.input_lens.kind in {"constant", "uniform"} and recipe.output_lens.kind in {
        "constant",
        "uniform",
    }:
        longest = recipe.prefix_len + recipe.input_lens.high + recipe.output_lens.high
    else:
        return  # open-ended distributions are cut where the server cuts them, and counted as failures
    if max_model_len is not None and longest > max_model_len:
        raise InvalidParameterError(
            f"prompt and answer have up to {longest} tokens, max_model_len of the server is {max_model_len}",
            param="random_input_len",
        )


async def _writer(
    options: ServeOptions, *, target: Target, tokenizer: Tokenizer | None, notes: list[str]
) -> PromptWriter:
    """Token ids if they are wanted and taken; notes what was found out."""
    seed = options.recipe.seed
    if target.route == "completions" and options.prompt_format != "text":
        low, high = options.token_ids or (None, None)
        ids = token_id_writer(seed=seed, tokenizer=tokenizer, low=low, high=high)
        segment = Segment(key=(PROBE, 0), num_tokens=PROBE_TOKENS)
        record = await probe.ask_once(target, ids.write([segment]))
        if _are_ids_taken(record):
            return ids
        if options.prompt_format == "ids":
            raise TargetError(f"the server does not take token ids: {_why(record)}")
        notes.append(f"prompts are text: the server does not take token ids ({_why(record)})")
    return await _word_writer(target, seed=seed, tokenizer=tokenizer, notes=notes)


def _are_ids_taken(record: RequestRecord) -> bool:
    """Answered, and not read as something else: a server adds one token (BOS) at most."""
    is_counted = record.counted_by == "usage"
    return record.is_ok and (not is_counted or PROBE_TOKENS <= record.num_prompt_tokens <= PROBE_TOKENS + 1)


def _why(record: RequestRecord) -> str:
    if record.failure is not None:
        return f"{record.failure.kind}: {record.failure.message}"
    return f"it counts {record.num_prompt_tokens} tokens where {PROBE_TOKENS} were sent"


async def _word_writer(
    target: Target, *, seed: int, tokenizer: Tokenizer | None, notes: list[str]
) -> WordWriter:
    """Words, scaled by what the server counts in two short prompts.

    Raises:
        TargetError: one of the two is not answered.
    """
    plain = (
        WordWriter(seed=seed)
        if tokenizer is None
        else WordWriter(seed=seed, words=one_token_words(tokenizer))
    )
    counts: list[int] = []
    for num_words in SCALE_WORDS:
        record = await probe.ask_once(target, plain.write([Segment(key=(PROBE, 0), num_tokens=num_words)]))
        if not record.is_ok:
            raise TargetError(f"a first short request fails: {_why(record)}")
        if record.counted_by != "usage":
            notes.append(
                "prompt lengths are in words: the server sends no usage"
                + ("" if tokenizer else ", and there is no --tokenizer")
            )
            return plain
        counts.append(record.num_prompt_tokens)
    tokens_per_word = (counts[1] - counts[0]) / (SCALE_WORDS[1] - SCALE_WORDS[0])
    if tokens_per_word <= 0:
        raise TargetError(f"the server counts {counts[0]} and {counts[1]} tokens in {SCALE_WORDS} words")
    extra = counts[0] - SCALE_WORDS[0] * tokens_per_word
    source = "the server's usage" if tokenizer is None else "the tokenizer and the server's usage"
    notes.append(
        f"prompts are text of {tokens_per_word:.2f} tokens a word, {extra:.0f} more are added to each by the "
        f"server (by {source})"
    )
    return replace(plain, tokens_per_word=tokens_per_word, num_extra_tokens=extra)


async def warm_up(options: ServeOptions, *, prepared: Prepared, console: Console, is_shown: bool) -> None:
    """Send the first requests, whose times do not count.

    Raises:
        TargetError: none of them is answered.
    """
    if options.num_warmups == 0:
        return
    workload = make_warmup(options.recipe, writer=prepared.writer, num_requests=options.num_warmups)
    with live(console, title="warm-up", is_shown=is_shown) as watcher:
        result = await drive(workload, prepared.target, watcher=watcher)
    if result.status == "interrupted":
        raise KeyboardInterrupt
    if not any(record.is_ok for record in result.records):
        failure = next(record.failure for record in result.records if record.failure is not None)
        raise TargetError(f"no warm-up request was answered: {failure.kind}: {failure.message}")


async def measure(
    options: ServeOptions, *, prepared: Prepared, console: Console, is_shown: bool, title: str = "load"
) -> Measured:
    """The measured run."""
    workload = make_workload(options.recipe, writer=prepared.writer)
    with live(console, title=title, is_shown=is_shown) as watcher:
        result = await drive(workload, prepared.target, watcher=watcher)
    summary = figures(options, result=result)
    return Measured(result=result, summary=summary, notes=_cache_notes(options.recipe, summary=summary))


def _cache_notes(recipe: Recipe, *, summary: Summary) -> tuple[str, ...]:
    """Tell if a cache made the prompts cheaper than their lengths say."""
    is_shared = recipe.prefix_len > 0 or any(request.hash_ids for request in recipe.trace)
    if is_shared or summary.num_cached_tokens <= UNEXPECTED_CACHED * summary.num_prompt_tokens:
        return ()
    seen = f"{summary.num_cached_tokens} of {summary.num_prompt_tokens} prompt tokens came from the server's"
    return (f"{seen} prefix cache, it has had these prompts before: use another --seed",)


def figures(options: ServeOptions, *, result: LoadResult) -> Summary:
    """The figures that the options ask for."""
    return summarize(result, slos=options.slos, metrics=options.metrics, percentiles=options.percentiles)


def title_of(options: ServeOptions, *, prepared: Prepared) -> str:
    """One line: what was measured."""
    recipe, target = options.recipe, prepared.target
    return f"{target.model} at {target.request_url}: {num_requests(recipe)} requests, {loop_words(recipe)}"


def num_requests(recipe: Recipe) -> int:
    """How many the recipe makes."""
    return len(recipe.trace) or recipe.num_requests


def loop_words(recipe: Recipe) -> str:
    """How the load is driven, in words."""
    limit = recipe.max_concurrency
    if recipe.trace:
        kind = "open loop, times of the trace"
    elif recipe.arrivals.is_all_at_once:
        return "all at once" if limit is None else f"closed loop, {limit} at a time"
    else:
        kind = f"open loop, {recipe.arrivals.request_rate:g} requests/s, {recipe.arrivals.kind}"
    return kind if limit is None else f"{kind}, at most {limit} in flight"


def workload_fields(options: ServeOptions, *, prepared: Prepared) -> dict[str, object]:
    """The workload as it goes into the record: with this and the seed it can be made again."""
    recipe, arrivals = options.recipe, options.recipe.arrivals
    is_traced = bool(recipe.trace)
    return {
        "loop": loop_words(recipe),
        "num_prompts": num_requests(recipe),
        "seed": recipe.seed,
        "input_lens": "trace" if is_traced else str(recipe.input_lens),
        "output_lens": "trace" if is_traced else str(recipe.output_lens),
        "prefix_len": recipe.prefix_len,
        "num_prefixes": recipe.num_prefixes,
        "arrivals": "trace" if is_traced else arrivals.kind,
        "request_rate": None if arrivals.is_all_at_once else arrivals.request_rate,
        "burstiness": arrivals.burstiness,
        "burst_size": arrivals.burst_size,
        "max_concurrency": recipe.max_concurrency,
        "prompts": "text" if isinstance(prepared.writer, WordWriter) else "token ids",
        "ignore_eos": prepared.target.ignore_eos,
        "temperature": prepared.target.temperature,
        "extra_body": prepared.target.body,
        "num_warmups": options.num_warmups,
    }


def record(
    options: ServeOptions,
    *,
    prepared: Prepared,
    measured: Measured,
    metadata: dict[str, str],
    is_detailed: bool,
) -> dict[str, object]:
    """The JSON record of one run."""
    return record_of(
        "serve",
        target=prepared.target,
        workload=workload_fields(options, prepared=prepared),
        summary=measured.summary,
        server=prepared.server,
        notes=(*prepared.notes, *measured.notes),
        metadata=metadata,
        requests=measured.result if is_detailed else None,
    )
