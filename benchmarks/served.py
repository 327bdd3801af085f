"""A `penstock serve` of our own for the benchmarks over HTTP: start, wait until ready, stop."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from penstock.bench.compare.server_process import free_port

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A running server."""

    url: str
    ready_s: float
    """From the start of the command to the first answer of /health/ready."""
    pid: int


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health/ready", timeout=1) as reply:  # noqa: S310 - loopback
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


@contextmanager
def served(*flags: str) -> Iterator[Served]:
    """`penstock serve` with `flags` on a free port, until the block ends; it must then exit with 0."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        sys.executable,
        "-m",
        "penstock.cli.main",
        "serve",
        *flags,
        "--port",
        str(port),
        "--log-level",
        "error",
    ]
    start_s = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ, stderr=subprocess.DEVNULL)
    try:
        while not _is_ready(url):
            if process.poll() is not None or time.perf_counter() - start_s > READY_TIMEOUT_S:
                raise RuntimeError(f"the server did not start: exit code {process.poll()}")
            time.sleep(0.01)
        yield Served(url=url, ready_s=time.perf_counter() - start_s, pid=process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_TIMEOUT_S)
    assert code == 0, f"the server ended with exit code {code}"
