"""`penstock bench compare`: reads the options, makes who takes part, runs the comparison."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, cast

from cyclopts import Parameter

from penstock.bench.compare.bound import FindBound, least_seconds, read_model_size
from penstock.bench.compare.comparison import OURS, Comparison, Course, Standing
from penstock.bench.compare.contender import ServedContender
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
from penstock.bench.compare.scenarios import NAMES, Draw, read_vocab_size
from penstock.bench.compare.server_process import hear_sigterm
from penstock.bench.machine_limits import measure_limits
from penstock.bench.target import TargetError, check_url
from penstock.bench.workload import Workload
from penstock.cli.bench_options import (
    LogDir,
    Model,
    Output,
    PenstockFlags,
    Rounds,
    Seed,
    Threads,
    check_file,
    command_line,
    flags,
    results,
    tell,
    threads_or_all,
    words,
    work_folder,
)
from penstock.cli.model_source import find_model
from penstock.cli.setting import Range, setting
from penstock.core.errors import CheckpointError, InvalidParameterError

PEERS_DIR: Final = Path("~/.cache/penstock/peers")
ALL_PEERS: Final = "installed"
POLL_S: Final = 0.5


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class CompareSettings:
    """Options of the command."""

    workload: Annotated[str, Parameter(help=f"What to ask, with commas: {', '.join(NAMES)}.")] = "single"
    peers: Annotated[
        str, Parameter(help=f"Whom, with commas: {', '.join(PEERS)}; or all that are installed.")
    ] = ALL_PEERS
    precision: Annotated[str, Parameter(help=f"Of the weights, with commas: {', '.join(PRECISIONS)}.")] = (
        "bf16"
    )
    rounds: Rounds = 3
    seed: Seed = 0
    num_threads: Threads = None
    peers_dir: Annotated[Path, Parameter(help="Where `make bench-peers` has put the peers.")] = PEERS_DIR
    attach: Annotated[
        tuple[str, ...],
        Parameter(help="NAME=URL of a server that runs already; with one precision only."),
    ] = ()
    penstock: Annotated[bool, Parameter(help="Ask Penstock too; without, peers are measured alone.")] = True
    penstock_flags: PenstockFlags = ""
    scale: Annotated[
        float,
        setting("Factor on all sizes; below 1 only proves that it works.", allowed=Range(low=0.01, high=1)),
    ] = 1.0
    log_dir: LogDir = None
    output: Output = None


@Parameter(name="*")
@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSettings:
    """Options of `peer`."""

    precision: Annotated[Precision, Parameter(help="Of the weights.")] = "bf16"
    workload: Annotated[str, Parameter(help="What it will be asked: sizes its context and slots.")] = "single"
    num_threads: Threads = None
    peers_dir: Annotated[Path, Parameter(help="Where `make bench-peers` has put the peers.")] = PEERS_DIR
    log_dir: LogDir = None


def compare(model: Model = None, *, settings: CompareSettings | None = None) -> int:
    """Penstock beside other engines: the same checkpoint and workload, in turns, with ratios.

    Exit code 1 if an engine that was asked for is missing, died or failed a request; the rest is kept.
    """
    chosen = settings or CompareSettings()
    check_file(chosen.output, param="output")
    folder = find_model(model).path.resolve()
    course = _course(chosen, model=folder)
    with work_folder(chosen.log_dir, prefix="penstock-compare-") as work_dir:
        standings = _standings(chosen, setup=_setup(chosen, course=course, model=folder, work_dir=work_dir))
        _tell_if_alone(standings, peers_dir=chosen.peers_dir)
        bound = _bound_of(folder, num_threads=threads_or_all(chosen.num_threads))
        return _run(standings, course=course, model=folder.name, bound=bound, output=chosen.output)


def _bound_of(model: Path, *, num_threads: int) -> FindBound | None:
    """Measures the machine each time that it is asked: its speed may have changed.

    None for a model that only peers know.
    """
    try:
        size = read_model_size(model)
    except CheckpointError as error:
        tell(f"shares of the bound are left out: {error.message}")
        return None

    def find(load: Workload, precision: str) -> float:
        limits = measure_limits(num_threads=num_threads)
        return least_seconds(load, size=size, precision=precision, limits=limits)

    return find


def _course(chosen: CompareSettings, *, model: Path) -> Course:
    draw = Draw(vocab_size=read_vocab_size(model), seed=chosen.seed, scale=chosen.scale)
    names = words(chosen.workload, param="workload", known=NAMES)
    return Course(scenario_names=names, rounds=chosen.rounds, draw=draw)


def _setup(chosen: CompareSettings, *, course: Course, model: Path, work_dir: Path) -> Setup:
    scenarios = course.scenarios
    return Setup(
        model=model,
        peers_dir=chosen.peers_dir.expanduser().absolute(),
        work_dir=work_dir,
        num_threads=threads_or_all(chosen.num_threads),
        longest=max(scenario.longest for scenario in scenarios),
        num_streams=max(scenario.num_streams for scenario in scenarios),
        has_late_prompt=any(scenario.late is not None for scenario in scenarios),
        penstock_flags=flags(chosen.penstock_flags, param="penstock_flags"),
    )


def _standings(chosen: CompareSettings, *, setup: Setup) -> list[Standing]:
    precisions = words(chosen.precision, param="precision", known=PRECISIONS)
    if chosen.attach and len(precisions) > 1:
        raise InvalidParameterError(
            f"precision is {chosen.precision}, it must be one with attach: a running server has one",
            param="precision",
        )
    return [
        _standing(name, cast("Precision", precision), url=url, setup=setup)
        for precision in precisions
        for name, url in _asked(chosen, peers_dir=setup.peers_dir)
    ]


def _asked(chosen: CompareSettings, *, peers_dir: Path) -> list[tuple[str, str | None]]:
    """Names of the engines, each with the address where it runs already, or None."""
    running = dict(_running(word) for word in chosen.attach)
    if chosen.peers == ALL_PEERS:
        named = installed_peers(peers_dir)
    else:
        named = words(chosen.peers, param="peers", known=PEERS)
    names = dict.fromkeys([*([OURS] if chosen.penstock else []), *named, *running])
    if not names:
        raise InvalidParameterError(
            "nobody to compare: penstock is off and no peer is installed; `make bench-peers` installs them",
            param="peers",
        )
    return [(name, running.get(name)) for name in names]


def _tell_if_alone(standings: list[Standing], *, peers_dir: Path) -> None:
    """Say why there will be no ratios, before minutes have gone by."""
    if {standing.name for standing in standings} == {OURS}:
        tell(
            f"no peer is installed in {peers_dir}, Penstock is measured alone; "
            "`make bench-peers` installs them"
        )


def _running(word: str) -> tuple[str, str]:
    name, separator, url = word.partition("=")
    if not separator or name not in MAKERS:
        raise InvalidParameterError(
            f"attach has {word!r}, it must be NAME=URL with a name of {', '.join(MAKERS)}", param="attach"
        )
    check_url(url, param="attach")
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
    standings: list[Standing], *, course: Course, model: str, bound: FindBound | None, output: Path | None
) -> int:
    def keep(so_far: Sequence[Standing]) -> None:
        if output is not None:
            record = make_record(so_far, course=course, model=model, command=command_line())
            write_record(record, output)

    is_whole = Comparison(standings, course=course, tell=tell, keep=keep, find_bound=bound).run()
    print_tables(results(), standings, course=course)
    return 0 if is_whole else 1


def peer(
    name: Annotated[str, Parameter(help=f"One of {', '.join(PEERS)}.")],
    model: Model = None,
    *,
    settings: PeerSettings | None = None,
) -> int:
    """Start a peer as `compare` does, and keep it until Ctrl-C: `compare --attach` finds it ready.

    Raises:
        TargetError: it is not installed, cannot start, or has no server.
    """
    words(name, param="peer", known=PEERS)
    chosen = settings or PeerSettings()
    folder = find_model(model).path.resolve()
    as_compared = CompareSettings(
        workload=chosen.workload, num_threads=chosen.num_threads, peers_dir=chosen.peers_dir
    )
    course = _course(as_compared, model=folder)
    with work_folder(chosen.log_dir, prefix="penstock-peer-") as work_dir:
        setup = _setup(as_compared, course=course, model=folder, work_dir=work_dir)
        contender = make_contender(name, precision=chosen.precision, setup=setup)
        if not isinstance(contender, ServedContender):
            raise TargetError(f"{name} has no server: `compare` drives it in a process of its own")
        return _keep(contender, name=name)


def _keep(contender: ServedContender, *, name: str) -> int:
    hear_sigterm()
    try:
        took_s = contender.start() or 0.0
        tell(f"{contender.name} is ready after {took_s:.1f} s: --attach {name}={contender.url}")
        while contender.is_running:
            time.sleep(POLL_S)
    finally:
        contender.stop()
    raise TargetError(f"{contender.name} ended by itself")
