"""Engines that can be asked: a server over HTTP, ours or theirs, or a runner under a peer's own Python.

Both are started, asked one scenario after another, and ended by `comparison`. An engine that fails raises
`TargetError`; requests that fail are in the observation.
"""

import asyncio
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import msgspec

from penstock.bench.client import Failure, RequestRecord
from penstock.bench.compare.figures import Observation
from penstock.bench.compare.late_arrival import drive_with_late
from penstock.bench.compare.scenarios import Scenario
from penstock.bench.compare.server_process import (
    Launch,
    ServerProcess,
    hear_sigterm,
    log_tail,
    start_group,
    stop_group,
    tree_memory_bytes,
)
from penstock.bench.load import drive, is_alive, loop_factory
from penstock.bench.target import Target, TargetError
from penstock.bench.workload import LoadRequest

MAX_LINE_BYTES: Final = 64 << 20
"""Of a runner's answer: times of 10,000 tokens take about 200 KB."""


class Contender(Protocol):
    """One engine at one precision."""

    @property
    def name(self) -> str:
        """How tables and records call it."""
        ...

    @property
    def facts(self) -> dict[str, str]:
        """Version, settings and form of the weights, for the record."""
        ...

    def start(self) -> float | None:
        """Make it ready; returns the seconds that took, or None if it ran already.

        Raises:
            TargetError: it cannot be started.
        """
        ...

    def ask(self, scenario: Scenario) -> Observation:
        """Run a scenario.

        Raises:
            TargetError: the engine is gone.
        """
        ...

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes, 0 if not known."""
        ...

    def stop(self) -> None:
        """End it; safe to call twice."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSpec:
    """A server that speaks the completions API."""

    name: str
    url: str
    model: str
    """As requests name it."""
    facts: dict[str, str]
    launch: Launch | None
    """None for one that runs already."""
    body: dict[str, object] = field(default_factory=dict)
    """Further fields of every request."""


class ServedContender:
    """A `Contender` over HTTP.

    Args:
        spec: the server.
        log_path: gets the output of a server that is started here.
    """

    def __init__(self, spec: ServerSpec, *, log_path: Path) -> None:
        self._spec = spec
        self._server = (
            None
            if spec.launch is None
            else ServerProcess(spec.launch, name=spec.name, url=spec.url, log_path=log_path)
        )
        self._target = Target(base_url=spec.url, model=spec.model, ignore_eos=True, body=spec.body)

    @property
    def name(self) -> str:
        """See `Contender`."""
        return self._spec.name

    @property
    def url(self) -> str:
        """Where it answers."""
        return self._spec.url

    @property
    def facts(self) -> dict[str, str]:
        """See `Contender`."""
        return self._spec.facts

    def start(self) -> float | None:
        """See `Contender`."""
        if self._server is not None:
            return self._server.start()
        if not asyncio.run(is_alive(self._spec.url)):
            raise TargetError(f"{self.name}: nobody answers at {self._spec.url}")
        return None

    def ask(self, scenario: Scenario) -> Observation:
        """See `Contender`."""
        if self._server is not None and not self._server.is_running:
            raise TargetError(f"{self.name} is gone")
        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                if scenario.late is None:
                    return runner.run(self._ask_plain(scenario))
                return runner.run(drive_with_late(scenario, self._target))
        finally:
            hear_sigterm()

    async def _ask_plain(self, scenario: Scenario) -> Observation:
        result = await drive(scenario.load, self._target)
        if result.status == "server_died":
            raise TargetError(f"{self.name} died: {result.detail}")
        if result.status == "interrupted":
            raise KeyboardInterrupt
        return Observation(
            records=result.records,
            duration_s=result.duration_s,
            client_cpu_share=result.cost.cpu_share,
        )

    @property
    def is_running(self) -> bool:
        """It was started here and has not ended."""
        return self._server is not None and self._server.is_running

    def memory_bytes(self) -> int:
        """See `Contender`."""
        return 0 if self._server is None else self._server.memory_bytes()

    def stop(self) -> None:
        """See `Contender`."""
        if self._server is not None:
            self._server.stop()


class _RunnerRecord(msgspec.Struct):
    """What a runner saw of one request; times are seconds after the start of the scenario."""

    start_s: float
    times_s: list[float]
    num_tokens: int
    error: str | None = None


class _RunnerAnswer(msgspec.Struct):
    """A runner's line."""

    version: str = ""
    error: str | None = None
    duration_s: float = 0.0
    records: list[_RunnerRecord] = []
    late: _RunnerRecord | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSpec:
    """A script that drives a peer without a server: one JSON line in, one out, for each scenario."""

    name: str
    facts: dict[str, str]
    launch: Launch


class RunnerContender:
    """A `Contender` in a process of its own, without HTTP: what is measured is the engine alone.

    Args:
        spec: the runner.
        log_path: gets what it writes to stderr.
    """

    def __init__(self, spec: RunnerSpec, *, log_path: Path) -> None:
        self._spec = spec
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None
        self._version = ""

    @property
    def name(self) -> str:
        """See `Contender`."""
        return self._spec.name

    @property
    def facts(self) -> dict[str, str]:
        """See `Contender`; the version is known once it has started."""
        return {**self._spec.facts, "version": self._version}

    def start(self) -> float | None:
        """See `Contender`."""
        began_s = time.perf_counter()
        with self._log_path.open("wb") as log:
            self._process = start_group(
                self._spec.launch, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
        try:
            self._version = self._read().version
        except BaseException:
            self.stop()
            raise
        return time.perf_counter() - began_s

    def ask(self, scenario: Scenario) -> Observation:
        """See `Contender`."""
        assert self._process is not None, "it has been started"
        assert self._process.stdin is not None, "it was given a pipe"
        try:
            self._process.stdin.write(msgspec.json.encode(_question(scenario)) + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise TargetError(f"{self.name} is gone: {log_tail(self._log_path)}") from error
        answer = self._read()
        asked = scenario.load.requests
        return Observation(
            records=tuple(
                _record(index, seen, asked[index], version=self._version)
                for index, seen in enumerate(answer.records)
            ),
            duration_s=answer.duration_s,
            late=None
            if answer.late is None or scenario.late is None
            else _record(len(asked), answer.late, scenario.late, version=self._version),
        )

    def _read(self) -> _RunnerAnswer:
        """The next line that is JSON; libraries may print others.

        Raises:
            TargetError: the runner ended, or told an error.
        """
        assert self._process is not None, "it has been started"
        assert self._process.stdout is not None, "it was given a pipe"
        while line := self._process.stdout.readline(MAX_LINE_BYTES):
            if line.startswith(b"{"):
                answer = msgspec.json.decode(line, type=_RunnerAnswer)
                if answer.error is not None:
                    raise TargetError(f"{self.name}: {answer.error}")
                return answer
        raise TargetError(f"{self.name} ended: {log_tail(self._log_path)}")

    def memory_bytes(self) -> int:
        """See `Contender`."""
        return 0 if self._process is None else tree_memory_bytes(self._process.pid)

    def stop(self) -> None:
        """See `Contender`."""
        if self._process is not None:
            stop_group(self._process)
            self._process = None


def _question(scenario: Scenario) -> dict[str, object]:
    late = scenario.late
    return {
        "requests": [_asked(request) for request in scenario.load.requests],
        "max_concurrency": scenario.load.max_concurrency,
        "late": None if late is None else _asked(late),
        "late_after_tokens": scenario.late_after_tokens,
    }


def _asked(request: LoadRequest) -> dict[str, object]:
    return {"prompt": request.prompt, "max_tokens": request.num_output_tokens}


def _record(index: int, seen: _RunnerRecord, asked: LoadRequest, *, version: str) -> RequestRecord:
    record = RequestRecord(
        index=index,
        num_output_tokens_asked=asked.num_output_tokens,
        start_s=seen.start_s,
        sent_s=seen.start_s,
        num_prompt_tokens=asked.num_prompt_tokens,
        num_output_tokens=seen.num_tokens,
        counted_by="usage",
        finish_reason="length",
    )
    record.pieces_s.extend(seen.times_s)
    record.last_s = record.end_s = seen.times_s[-1] if seen.times_s else seen.start_s
    if seen.error is not None:
        record.failure = Failure(kind="stream_error", message=f"{version}: {seen.error}")
    elif seen.num_tokens != asked.num_output_tokens:
        message = f"{seen.num_tokens} tokens, {asked.num_output_tokens} were asked for"
        record.failure = Failure(kind="wrong_length", message=message)
    return record
