"""Takes turns: every contender answers the same scenario, round after round, and the record is kept.

All contenders are started first and stay up, idle, while another is asked: so a round is minutes shorter, and
what disturbs the machine disturbs all of them. The order turns by one from round to round. A contender that
cannot start or dies leaves the run with a line; the rest goes on, and what was measured is kept. The record
is given out after every scenario, so that a run that is cut off loses nothing.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Final

from penstock.bench.compare.bound import FindBound
from penstock.bench.compare.contender import Contender
from penstock.bench.compare.figures import (
    LESS_IS_BETTER,
    MORE_IS_BETTER,
    advantage,
    figures,
    spread,
)
from penstock.bench.compare.scenarios import Draw, Scenario, make_scenario
from penstock.bench.compare.server_process import hear_sigterm
from penstock.bench.target import TargetError

OURS: Final = "penstock"
WARM_NAMES: Final = ("single", "prefill")
"""Asked of everybody before the first round, and forgotten: the first answer of each size is slower."""
WARM_ROUND: Final = -1
MIB: Final = 1 << 20

Figures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Course:
    """What is asked, and how often."""

    scenario_names: tuple[str, ...]
    rounds: int
    draw: Draw

    @property
    def scenarios(self) -> tuple[Scenario, ...]:
        """All that is asked, what warms up too: a server must have room for each."""
        names = dict.fromkeys((*WARM_NAMES, *self.scenario_names))
        return tuple(make_scenario(name, draw=self.draw) for name in names)


@dataclass(slots=True, kw_only=True)
class Standing:
    """One contender and what is known of it."""

    name: str
    precision: str
    contender: Contender | None
    """None if it could not even be made."""
    error: str | None = None
    """Why it is out; None while it takes part."""
    start_s: float | None = None
    memory_mib: float | None = None
    rounds: dict[str, list[Figures]] = field(default_factory=dict)
    """By scenario."""

    @property
    def title(self) -> str:
        """How tables call it."""
        return f"{self.name} {self.precision}"

    @property
    def is_in(self) -> bool:
        """It takes part."""
        return self.contender is not None and self.error is None

    def record(self) -> dict[str, object]:
        """Everything about it, for the JSON."""
        return {
            "name": self.name,
            "precision": self.precision,
            "facts": {} if self.contender is None else self.contender.facts,
            "error": self.error,
            "start_s": None if self.start_s is None else round(self.start_s, 3),
            "memory_mib": self.memory_mib,
            "rounds": self.rounds,
        }


class Comparison:
    """One run.

    Args:
        standings: who takes part, ours among them.
        course: what is asked.
        tell: shows a line to the person who waits.
        keep: given the standings after every scenario.
        find_bound: what the machine could do just now, asked before every scenario; None leaves it out.
    """

    def __init__(
        self,
        standings: Sequence[Standing],
        *,
        course: Course,
        tell: Callable[[str], None],
        keep: Callable[[Sequence[Standing]], None],
        find_bound: FindBound | None = None,
    ) -> None:
        self._standings = list(standings)
        self._course = course
        self._tell = tell
        self._keep = keep
        self._find_bound = find_bound

    def run(self) -> bool:
        """Start, take turns, stop; True if all took part to the end without a failed request."""
        hear_sigterm()
        try:
            for standing in self._standings:
                self._start(standing)
            for round_idx in range(self._course.rounds):
                self._round(round_idx)
            for standing in self._standings:
                self._weigh(standing)
        finally:
            for standing in self._standings:
                if standing.contender is not None:
                    standing.contender.stop()
            self._keep(self._standings)
        return all(standing.error is None for standing in self._standings)

    def _start(self, standing: Standing) -> None:
        contender = standing.contender
        if contender is None:
            self._tell(f"{standing.title}: {standing.error}")
            return
        try:
            standing.start_s = contender.start()
            for name in WARM_NAMES:
                self._warm_up(contender, name)
        except TargetError as error:
            self._drop(standing, error)
            return
        took = "runs already" if standing.start_s is None else f"ready in {standing.start_s:.1f} s"
        self._tell(f"{standing.title}: {took}")

    def _warm_up(self, contender: Contender, name: str) -> None:
        seen = contender.ask(self._scenario(name, round_idx=WARM_ROUND))
        if seen.num_failed:
            raise TargetError(f"the first requests failed: {seen.first_failure}")

    def _drop(self, standing: Standing, error: TargetError) -> None:
        standing.error = error.message
        self._tell(f"{standing.title} is out: {error.message}")
        if standing.contender is not None:
            standing.contender.stop()

    def _scenario(self, name: str, *, round_idx: int) -> Scenario:
        return make_scenario(name, draw=replace(self._course.draw, round_idx=round_idx))

    def _round(self, round_idx: int) -> None:
        turn = round_idx % max(1, len(self._standings))
        order = self._standings[turn:] + self._standings[:turn]
        for name in self._course.scenario_names:
            scenario = self._scenario(name, round_idx=round_idx)
            for standing in order:
                self._ask(standing, scenario, round_idx=round_idx)

    def _ask(self, standing: Standing, scenario: Scenario, *, round_idx: int) -> None:
        if standing.contender is None or standing.error is not None:
            return
        bound_s = self._bound_s(scenario, precision=standing.precision)
        try:
            seen = standing.contender.ask(scenario)
        except TargetError as error:
            self._drop(standing, error)
            return
        if seen.num_failed:
            self._drop(standing, TargetError(f"{seen.num_failed} requests failed: {seen.first_failure}"))
            return
        found = figures(scenario, seen, bound_s=bound_s)
        standing.rounds.setdefault(scenario.name, []).append(found)
        self._tell(f"round {round_idx + 1}, {scenario.name}, {standing.title}: {headline(found)}")
        self._keep(self._standings)

    def _bound_s(self, scenario: Scenario, *, precision: str) -> float | None:
        """None too where another request comes in between: when depends on the engine."""
        if self._find_bound is None or scenario.late is not None:
            return None
        return self._find_bound(scenario.load, precision)

    def _weigh(self, standing: Standing) -> None:
        if standing.contender is not None and standing.is_in:
            memory_bytes = standing.contender.memory_bytes()
            standing.memory_mib = round(memory_bytes / MIB, 1) if memory_bytes else None


HEADLINES: Final[tuple[tuple[str, str], ...]] = (
    ("decode_tokens_per_s", "decode {:.1f} tokens/s"),
    ("prefill_tokens_per_s", "prefill {:.0f} tokens/s"),
    ("output_tokens_per_s", "{:.1f} tokens/s"),
    ("gap_max_ms", "longest gap {:.0f} ms"),
    ("late_ttft_ms", "TTFT of the long prompt {:.0f} ms"),
    ("ttft_p50_ms", "TTFT p50 {:.0f} ms"),
    ("itl_p99_ms", "ITL p99 {:.0f} ms"),
    ("of_bound", "{:.0%} of the bound"),
)
"""Figures of the line about a scenario, in its order."""


def headline(found: Figures) -> str:
    """The figures that a person waits for, in one line."""
    return ", ".join(form.format(found[name]) for name, form in HEADLINES if name in found)


def ratios(standings: Sequence[Standing]) -> list[dict[str, object]]:
    """Ours against each peer of the same precision: for every figure the ratios of the rounds.

    Above 1 ours is better. A round counts if both were asked in it.
    """
    rows: list[dict[str, object]] = []
    for ours in (standing for standing in standings if standing.name == OURS):
        for peer in standings:
            if peer.name != OURS and peer.precision == ours.precision:
                rows += _ratios_of_pair(ours, peer)
    return rows


def _ratios_of_pair(ours: Standing, peer: Standing) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    head = {"peer": peer.name, "precision": peer.precision}
    for scenario, mine in ours.rounds.items():
        theirs = peer.rounds.get(scenario, [])
        for name in sorted(MORE_IS_BETTER | LESS_IS_BETTER):
            values = [
                value
                for a, b in zip(mine, theirs, strict=False)
                if name in a
                and name in b
                and (value := advantage(name, ours=a[name], theirs=b[name])) is not None
            ]
            if values:
                rows.append({**head, "scenario": scenario, "figure": name, **spread(values)})
    once = {"start_s": (ours.start_s, peer.start_s), "memory_mib": (ours.memory_mib, peer.memory_mib)}
    for name, (a, b) in once.items():
        ratio = None if a is None or b is None else advantage(name, ours=a, theirs=b)
        if ratio is not None:
            rows.append({**head, "scenario": "process", "figure": name, **spread([ratio])})
    return rows
