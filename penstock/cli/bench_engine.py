"""The commands of `penstock bench` that drive the engine itself, and those that set it beside others."""

import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Final, Literal, cast

from cyclopts import Parameter
from rich.console import Console

from penstock.bench.compare.comparison import OURS, Comparison, Course, Standing
from penstock.bench.compare.peers import (
    MAKERS,
    PEERS,
    PRECISIONS,
    Precision,
    Setup,
    attached,
    installed_peers,
    make_contender,
)
from penstock.bench.compare.report import make_record, print_tables, write_record
from penstock.bench.compare.scenarios import NAMES, Draw, make_scenario, read_vocab_size
from penstock.bench.offline import OfflineSizes, offline_record, offline_table, run_offline
from penstock.bench.target import TargetError
from penstock.cli.model_source import find_model
from penstock.cli.setting import Range, setting
from penstock.core.errors import InvalidParameterError
from penstock.engine.config import EngineConfig, SchedulerConfig, validate_engine_config

PEERS_DIR: Final = Path("~/.cache/penstock/peers")
ALL_PEERS: Final = "installed"
MAX_BATCH: Final = 4096

Model = Annotated[str | None, Parameter(help="Folder or hub id; without one, the embedded model.")]
Rounds = Annotated[int, setting("How often everything is asked, in turns.", allowed=Range(low=1, high=1000))]
Seed = Annotated[int, setting("Of the token ids.", allowed=Range(low=0, high=1 << 32))]
Threads = Annotated[
    int | None,
    setting("Threads of every engine; otherwise the CPUs of this process.", allowed=Range(low=1, high=1024)),
]
Output = Annotated[Path | None, Parameter(help="JSON to write, also while the run goes on.")]
PeersDir = Annotated[Path, Parameter(help="Where `make bench-peers` has put the peers.")]


def words(text: str, *, param: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The comma-separated words of an option.

    Raises:
        InvalidParameterError: one is not known, or there is none; the message lists what is.
    """
    found = tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))
    wrong = next((word for word in found if word not in known), None)
    if not found or wrong is not None:
        raise InvalidParameterError(
            f"{param} has {wrong or text!r}, it must be of {', '.join(known)}, separated by commas",
            param=param,
        )
    return found


def compare(
    model: Model = None,
    *,
    workload: Annotated[str, Parameter(help=f"What to ask, with commas: {', '.join(NAMES)}.")] = "single",
    peers: Annotated[
        str, Parameter(help=f"Whom, with commas: {', '.join(PEERS)}; or all that are installed.")
    ] = ALL_PEERS,
    precision: Annotated[
        str, Parameter(help=f"Of the weights, with commas: {', '.join(PRECISIONS)}.")
    ] = "bf16",
    rounds: Rounds = 3,
    seed: Seed = 0,
    num_threads: Threads = None,
    peers_dir: PeersDir = PEERS_DIR,
    attach: Annotated[
        tuple[str, ...], Parameter(help="NAME=URL of a server that runs already, of the first precision.")
    ] = (),
    penstock: Annotated[bool, Parameter(help="Ask Penstock too; without, peers are measured alone.")] = True,
    penstock_flags: Annotated[str, Parameter(help="Further flags of `penstock serve`, in one word.")] = "",
    scale: Annotated[
        float,
        setting("Factor on all sizes; below 1 only proves that it works.", allowed=Range(low=0.01, high=1)),
    ] = 1.0,
    log_dir: Annotated[Path | None, Parameter(help="Keep the engines' logs here.")] = None,
    output: Output = None,
) -> int:
    """Penstock beside other engines: the same checkpoint and workload, in turns, with ratios.

    Exit code 1 if an engine that was asked for is missing, died or failed a request; the rest is kept.
    """
    names = words(workload, param="workload", known=NAMES)
    precisions = words(precision, param="precision", known=PRECISIONS)
    folder = find_model(model).path.resolve()
    draw = Draw(vocab_size=read_vocab_size(folder), seed=seed, scale=scale)
    course = Course(scenario_names=names, rounds=rounds, draw=draw)
    console = Console(stderr=True)
    with tempfile.TemporaryDirectory(prefix="penstock-compare-") as scratch:
        work_dir = Path(scratch) if log_dir is None else log_dir
        work_dir.mkdir(parents=True, exist_ok=True)
        setup = _setup(
            course,
            model=folder,
            peers_dir=peers_dir.expanduser().absolute(),
            work_dir=work_dir,
            num_threads=num_threads,
            penstock_flags=tuple(shlex.split(penstock_flags)),
        )
        asked = _asked(peers, peers_dir=setup.peers_dir, attach=attach, with_ours=penstock)
        standings = [
            _standing(name, cast("Precision", each), url=url, setup=setup)
            for each in precisions
            for name, url in asked
        ]
        return _run(standings, course=course, console=console, model=folder.name, output=output)


def _command_line() -> str:
    return shlex.join(["penstock", *sys.argv[1:]])


def _setup(
    course: Course,
    *,
    model: Path,
    peers_dir: Path,
    work_dir: Path,
    num_threads: int | None,
    penstock_flags: tuple[str, ...],
) -> Setup:
    scenarios = [make_scenario(name, draw=course.draw) for name in course.scenario_names]
    return Setup(
        model=model,
        peers_dir=peers_dir,
        work_dir=work_dir,
        num_threads=num_threads or len(os.sched_getaffinity(0)),
        longest=max(scenario.longest for scenario in scenarios),
        num_streams=max(scenario.num_streams for scenario in scenarios),
        has_late_prompt=any(scenario.late is not None for scenario in scenarios),
        penstock_flags=penstock_flags,
    )


def _asked(
    peers: str, *, peers_dir: Path, attach: tuple[str, ...], with_ours: bool
) -> list[tuple[str, str | None]]:
    """Names of the engines, each with the address where it runs already, or None."""
    running = dict(_running(word) for word in attach)
    if peers == ALL_PEERS:
        named = installed_peers(peers_dir)
    else:
        named = words(peers, param="peers", known=PEERS)
    names = dict.fromkeys([*([OURS] if with_ours else []), *named, *running])
    return [(name, running.get(name)) for name in names]


def _running(word: str) -> tuple[str, str]:
    name, separator, url = word.partition("=")
    if not separator or name not in MAKERS:
        raise InvalidParameterError(
            f"attach has {word!r}, it must be NAME=URL with a name of {', '.join(MAKERS)}", param="attach"
        )
    return name, url


def _standing(name: str, precision: Precision, *, url: str | None, setup: Setup) -> Standing:
    """A contender that can be made, or the reason why not."""
    try:
        if url is not None:
            contender = attached(name, url=url, precision=precision)
        else:
            contender = make_contender(name, precision=precision, setup=setup)
    except TargetError as error:
        return Standing(name=name, precision=precision, contender=None, error=error.message)
    return Standing(name=name, precision=precision, contender=contender)


def _run(
    standings: list[Standing], *, course: Course, console: Console, model: str, output: Path | None
) -> int:
    command = _command_line()

    def keep(_standings: object) -> None:
        if output is not None:
            record = make_record(standings, course=course, model=model, command=command)
            write_record(record, output)

    comparison = Comparison(
        standings,
        course=course,
        tell=lambda line: console.print(line, highlight=False, soft_wrap=True),
        keep=keep,
    )
    is_whole = comparison.run()
    print_tables(Console(), standings, course=course)
    return 0 if is_whole else 1


# -- the engine alone ----------------------------------------------------------------------------------------


def offline(
    model: Model = None,
    *,
    prompt_tokens: Annotated[
        int, setting("Tokens of each prompt.", allowed=Range(low=1, high=1 << 20))
    ] = 512,
    output_tokens: Annotated[
        int, setting("Tokens of each answer, at least 2.", allowed=Range(low=2, high=1 << 20))
    ] = 64,
    batch_sizes: Annotated[str, Parameter(help="Requests at once, with commas.")] = "1,2,4,8,16,32,64",
    rounds: Rounds = 3,
    seed: Seed = 0,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    kernels: Literal["auto", "eager", "reference"] = "auto",
    num_threads: Threads = None,
    limits: Annotated[
        bool, Parameter(help="Measure the machine's read bandwidth and multiply peak first.")
    ] = True,
    output: Output = None,
) -> int:
    """The engine alone: tokens per second and step times, prefill and decode apart."""
    sizes = OfflineSizes(
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        batch_sizes=_numbers(batch_sizes, param="batch_sizes"),
        rounds=rounds,
        seed=seed,
    )
    source = find_model(model)
    threads = num_threads or len(os.sched_getaffinity(0))
    config = EngineConfig(
        model_path=str(source.path),
        model_revision=source.revision,
        dtype=dtype,
        kernels=kernels,
        num_threads=threads,
        max_model_len=prompt_tokens + output_tokens,
        scheduler=_offline_limits(sizes),
    )
    validate_engine_config(config)
    return _run_offline(config, sizes=sizes, model=source.name, with_limits=limits, output=output)


def _numbers(text: str, *, param: str) -> tuple[int, ...]:
    """Whole numbers above 0, with commas.

    Raises:
        InvalidParameterError: names what is none.
    """
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or max(numbers) > MAX_BATCH:
        raise InvalidParameterError(
            f"{param} is {text!r}, it must be whole numbers from 1 to {MAX_BATCH}, separated by commas",
            param=param,
        )
    return numbers


def _offline_limits(sizes: OfflineSizes) -> SchedulerConfig:
    """Room for the largest batch; nobody watches the tokens come, so no prompt is cut for others."""
    return SchedulerConfig(
        max_num_seqs=max(sizes.batch_sizes),
        max_num_batched_tokens=max(2048, *sizes.batch_sizes),
        max_num_queued_tokens=1 << 40,
        max_num_queued_reqs=MAX_BATCH,
        step_time_target_ms=10_000.0,
        decode_stretch=1000.0,
        enable_prefix_caching=False,
    )


def _run_offline(
    config: EngineConfig, *, sizes: OfflineSizes, model: str, with_limits: bool, output: Path | None
) -> int:
    from penstock.bench.machine_limits import measure_limits
    from penstock.engine.build import build_core

    console = Console(stderr=True)
    found = measure_limits(num_threads=config.num_threads or 1) if with_limits else None
    core = build_core(config)
    rows = run_offline(core, sizes, tell=lambda line: console.print(line, highlight=False, soft_wrap=True))
    record = offline_record(
        rows, sizes=sizes, info=core.info, limits=found, model=model, command=_command_line()
    )
    if output is not None:
        write_record(record, output)
    Console().print(offline_table(rows, info=core.info, limits=found))
    return 0
