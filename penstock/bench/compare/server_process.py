"""A server in processes of its own: start it, wait until it answers, know its memory, end all of it.

The command becomes the leader of a session, so that everything it starts is ended with it. Its output goes to
a log file whose last words are told when it dies.
"""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Final

from penstock.bench.target import TargetError

STOP_TIMEOUT_S: Final = 20.0
POLL_S: Final = 0.02
MAX_TAIL_CHARS: Final = 300
PROC: Final = Path("/proc")
ERROR_WORDS: Final = ("error", "unable", "failed", "cannot", "refused", "penstock:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """How one contender is started."""

    command: tuple[str, ...]
    env: dict[str, str] = field(default_factory=dict)
    """Over the environment of this process."""
    ready_path: str = "/health"
    """Answers 200 once requests are served."""
    start_timeout_s: float = 420.0


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


class ServerProcess:
    """One running server.

    Args:
        launch: what to run.
        name: how messages call it.
        url: where it will answer.
        log_path: gets its output; overwritten.
    """

    def __init__(self, launch: Launch, *, name: str, url: str, log_path: Path) -> None:
        self._launch = launch
        self._name = name
        self._url = url
        self._log_path = log_path
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> float:
        """Start it and wait; returns the seconds until it was ready.

        Raises:
            TargetError: it ended, or was not ready in time; it is stopped then.
        """
        began_s = time.perf_counter()
        with self._log_path.open("wb") as log:
            self._process = start_group(self._launch, stdout=log, stderr=log)
        try:
            while not _answers(self._url + self._launch.ready_path):
                self._check(waited_s=time.perf_counter() - began_s)
                time.sleep(POLL_S)
        except BaseException:
            self.stop()
            raise
        return time.perf_counter() - began_s

    def _check(self, *, waited_s: float) -> None:
        assert self._process is not None, "it has been started"
        code = self._process.poll()
        if code is not None:
            raise TargetError(f"{self._name} ended with exit code {code}: {log_tail(self._log_path)}")
        if waited_s > self._launch.start_timeout_s:
            tail = log_tail(self._log_path)
            raise TargetError(f"{self._name} was not ready in {self._launch.start_timeout_s:.0f} s: {tail}")

    @property
    def is_running(self) -> bool:
        """It has been started and has not ended."""
        return self._process is not None and self._process.poll() is None

    def memory_bytes(self) -> int:
        """Proportional set size of all its processes; 0 if it does not run or the system does not tell."""
        return 0 if self._process is None else tree_memory_bytes(self._process.pid)

    def stop(self) -> None:
        """End it and all that it started; safe to call twice."""
        if self._process is not None:
            stop_group(self._process)
            self._process = None


def start_group(
    launch: Launch, *, stdout: "int | BinaryIO", stderr: "int | BinaryIO", stdin: int = subprocess.DEVNULL
) -> "subprocess.Popen[bytes]":
    """Run the command as the leader of a session of its own.

    Raises:
        TargetError: the command cannot be run.
    """
    if shutil.which(launch.command[0]) is None:
        raise TargetError(f"{launch.command[0]} cannot be run: there is no such program")
    try:
        return subprocess.Popen(  # noqa: S603 - a command that `peers` made, no shell
            (*_bound_to_us(), *launch.command),
            env={**os.environ, **launch.env},
            start_new_session=True,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
        )
    except OSError as error:
        raise TargetError(f"{launch.command[0]} cannot be run: {error.strerror}") from error


def _bound_to_us() -> tuple[str, ...]:
    """Words before a command that end it with us, even if we are killed; none where util-linux is missing."""
    setpriv = shutil.which("setpriv")
    return () if setpriv is None else (setpriv, "--pdeathsig", "KILL", "--")


def stop_group(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the session's group, SIGKILL to what is left of it after a while; reaps the leader."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as reply:  # noqa: S310 - our own child on loopback
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError, ValueError):
        return False


def hear_sigterm() -> None:
    """From here on SIGTERM is an interrupt, so that servers of ours are ended before this process ends.

    A load run has handlers of its own and leaves none behind: call it again after one. Does nothing outside
    of the main thread.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def log_tail(path: Path) -> str:
    """The last line that speaks of an error, else the last line; one line, cut to a readable length."""
    try:
        lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no output"
    told = [line for line in lines if any(word in line.lower() for word in ERROR_WORDS)]
    chosen = (told or lines or ["no output"])[-1]
    return "".join(character for character in chosen if character.isprintable())[-MAX_TAIL_CHARS:]


def tree_memory_bytes(pid: int, *, proc: Path = PROC) -> int:
    """Sum of the proportional set sizes of a process and all its descendants; pages are counted once."""
    return sum(_pss_bytes(member, proc=proc) for member in process_tree(pid, proc=proc))


def process_tree(pid: int, *, proc: Path = PROC) -> list[int]:
    """`pid` and all its descendants that live."""
    found, todo = [], [pid]
    while todo:
        current = todo.pop()
        found.append(current)
        with contextlib.suppress(OSError):
            for children in (proc / str(current) / "task").glob("*/children"):
                todo += [int(word) for word in children.read_text().split()]
    return found


def _pss_bytes(pid: int, *, proc: Path) -> int:
    try:
        lines = (proc / str(pid) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:")), 0)
