"""A real `penstock serve` as a subprocess, for tests that need the whole product."""

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path

import psutil

ROOT = Path(__file__).resolve().parents[3]
READY = re.compile(r"ready at (http://[0-9.]+:\d+)")


@dataclass(kw_only=True)
class ServerProcess:
    """One running server; lines of its output are kept."""

    process: "subprocess.Popen[str]"
    lines: list[str] = field(default_factory=list)
    url: str = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def engine_pid(self) -> int:
        """The engine is a direct child process."""
        children = psutil.Process(self.pid).children()
        engines = [child for child in children if "penstock.engine.process" in " ".join(child.cmdline())]
        assert len(engines) == 1, engines
        return engines[0].pid

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float = 30) -> int:
        return self.process.wait(timeout_s)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        assert self.process.stdout is not None
        self.process.stdout.close()

    @property
    def output(self) -> str:
        return "".join(self.lines)


def start_server(*arguments: str, ready_timeout_s: float = 60) -> ServerProcess:
    """Start on a free port and wait until it says that it is ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli.main", "serve", "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )
    server = ServerProcess(process=process)
    found: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(server, found), daemon=True).start()
    try:
        server.url = found.get(timeout=ready_timeout_s)
    except queue.Empty:
        server.stop()
        raise AssertionError(f"the server did not get ready: {server.output}") from None
    assert server.url, f"the server ended: {server.output}"
    return server


def _read(server: ServerProcess, found: "queue.SimpleQueue[str]") -> None:
    assert server.process.stdout is not None
    try:
        for line in server.process.stdout:
            server.lines.append(line)
            if match := READY.search(line):
                found.put(match[1])
    except ValueError:
        pass  # closed by stop()
    found.put("")
