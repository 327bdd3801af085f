"""`penstock bench ladder`: reads the options, climbs, shows table and picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from penstock.bench.compare.report import write_record
from penstock.bench.compare.scenarios import Draw, read_vocab_size
from penstock.bench.ladder.climb import Climb, Crowd, Row, Yardstick, make_load, make_warmup
from penstock.bench.ladder.report import draw_picture, make_record, make_table
from penstock.bench.ladder.rungs import RUNG_NAMES, RUNGS, Site, make_rung
from penstock.bench.machine import cpu_name
from penstock.bench.machine_limits import measure_limits
from penstock.bench.model_cost import read_model_cost
from penstock.bench.plots import require_matplotlib
from penstock.cli.bench_options import (
    LogDir,
    Model,
    Output,
    PenstockFlags,
    Seed,
    Threads,
    check_file,
    command_line,
    flags,
    results,
    span,
    tell,
    threads_or_all,
    words,
    work_folder,
)
from penstock.cli.model_source import find_model
from penstock.cli.setting import PowerOfTwo, Range, setting
from penstock.core.errors import InvalidParameterError


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class LadderSettings:
    """Options of the command."""

    rungs: Annotated[str, Parameter(help=f"Which, with commas: {', '.join(RUNG_NAMES)}.")] = ",".join(
        RUNG_NAMES
    )
    users: Annotated[int, setting("Users in a closed loop.", allowed=Range(low=1, high=1024))] = 50
    requests_per_user: Annotated[
        int, setting("Requests of each, one after another.", allowed=Range(low=1, high=1000))
    ] = 1
    shared_tokens: Annotated[
        int, setting("Tokens with which all prompts begin.", allowed=Range(low=0, high=1 << 16))
    ] = 128
    prompt_tokens: Annotated[str, Parameter(help="Of each prompt's own part, as LOW:HIGH.")] = "16:128"
    output_tokens: Annotated[str, Parameter(help="Of each answer, as LOW:HIGH.")] = "16:64"
    max_model_len: Annotated[
        int,
        setting(
            "Context of the engine, all of it taken by contiguous KV.",
            allowed=PowerOfTwo(low=16, high=1 << 17),
        ),
    ] = 1024
    kv_contexts: Annotated[
        int, setting("KV memory of every rung, in whole contexts.", allowed=Range(low=1, high=4096))
    ] = 12
    static_batch_size: Annotated[
        int, setting("Requests of a static batch.", allowed=Range(low=1, high=1024))
    ] = 8
    static_timeout_ms: Annotated[
        float, setting("How long an unfull static batch waits.", allowed=Range(low=0, high=60_000))
    ] = 100.0
    price_per_hour: Annotated[
        float, setting("Of this machine, for the cost of tokens.", allowed=Range(low=0, high=1e6))
    ] = 0.1
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    seed: Seed = 0
    num_threads: Threads = None
    penstock_flags: PenstockFlags = ""
    log_dir: LogDir = None
    plot: Annotated[Path | None, Parameter(help="PNG to draw.")] = None
    output: Output = None


def ladder(model: Model = None, *, settings: LadderSettings | None = None) -> int:
    """What each idea of serving is worth: from one request at a time to paged KV and int4, in one run.

    Exit code 1 if a rung failed; the others are kept.
    """
    chosen = settings or LadderSettings()
    words(chosen.rungs, param="rungs", known=RUNG_NAMES)
    crowd = _crowd(chosen)
    check_file(chosen.output, param="output")
    check_file(chosen.plot, param="plot")
    if chosen.plot is not None:
        require_matplotlib()
    folder = find_model(model).path.resolve()
    with work_folder(chosen.log_dir, prefix="penstock-ladder-") as work_dir:
        return _climb(chosen, crowd=crowd, site=_site(chosen, model=folder, work_dir=work_dir))


def _crowd(chosen: LadderSettings) -> Crowd:
    prompt = span(chosen.prompt_tokens, param="prompt_tokens")
    answer = span(chosen.output_tokens, param="output_tokens")
    crowd = Crowd(
        num_users=chosen.users,
        requests_per_user=chosen.requests_per_user,
        shared_tokens=chosen.shared_tokens,
        prompt_low=prompt[0],
        prompt_high=prompt[1],
        output_low=answer[0],
        output_high=answer[1],
    )
    if crowd.longest > chosen.max_model_len:
        raise InvalidParameterError(
            f"the longest request has {crowd.longest} tokens, it must be at most max_model_len, which is "
            f"{chosen.max_model_len}",
            param="max_model_len",
        )
    return crowd


def _site(chosen: LadderSettings, *, model: Path, work_dir: Path) -> Site:
    return Site(
        model=model,
        num_users=chosen.users,
        max_model_len=chosen.max_model_len,
        kv_contexts=chosen.kv_contexts,
        static_batch_size=chosen.static_batch_size,
        static_timeout_ms=chosen.static_timeout_ms,
        num_threads=threads_or_all(chosen.num_threads),
        dtype=chosen.dtype,
        penstock_flags=flags(chosen.penstock_flags, param="penstock_flags"),
        work_dir=work_dir,
    )


def _climb(chosen: LadderSettings, *, crowd: Crowd, site: Site) -> int:
    draw = Draw(vocab_size=read_vocab_size(site.model), seed=chosen.seed)
    yardstick = Yardstick(
        cost=read_model_cost(site.model),
        limits=measure_limits(num_threads=site.num_threads),
        price_per_hour=chosen.price_per_hour,
    )
    head = {"command": command_line(), "model": site.model.name, "seed": chosen.seed}

    def keep(so_far: Sequence[Row]) -> None:
        if chosen.output is not None:
            write_record(make_record(so_far, head=head, crowd=crowd, yardstick=yardstick), chosen.output)

    rows = Climb(
        [rung for rung in RUNGS if rung.name in chosen.rungs.split(",")],
        make=lambda rung: make_rung(rung, site=site),
        load=make_load(crowd, draw=draw),
        warmup=make_warmup(draw=draw),
        yardstick=yardstick,
        tell=tell,
        keep=keep,
    ).run()
    results().print(make_table(rows, num_users=crowd.num_users))
    if chosen.plot is not None:
        subtitle = f"{site.model.name}, {crowd.num_users} users, {site.num_threads} threads of {cpu_name()}"
        draw_picture(rows, chosen.plot, subtitle=subtitle)
    return 1 if any(row.error is not None for row in rows) else 0
