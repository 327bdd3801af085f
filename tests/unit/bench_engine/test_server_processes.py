"""Processes that are started to be measured: none is left behind, and what went wrong is told."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.bench.compare.server_process import (
    Launch,
    ServerProcess,
    free_port,
    process_tree,
    start_group,
    stop_group,
    tree_memory_bytes,
)
from penstock.bench.target import TargetError

SLEEPER = (sys.executable, "-c", "import time; time.sleep(60)")


def server(command: tuple[str, ...], tmp_path, *, timeout_s: float = 20.0) -> ServerProcess:
    launch = Launch(command=command, start_timeout_s=timeout_s)
    url = f"http://127.0.0.1:{free_port()}"
    return ServerProcess(launch, name="x", url=url, log_path=tmp_path / "log")


def test_one_that_ends_at_its_start_is_told_with_its_last_error(tmp_path):
    script = "import sys; print('error: port in use'); sys.exit(7)"
    with pytest.raises(TargetError, match="x ended with exit code 7: error: port in use"):
        server((sys.executable, "-c", script), tmp_path).start()


def test_one_that_is_never_ready_is_ended(tmp_path):
    made = server(SLEEPER, tmp_path, timeout_s=0.2)
    with pytest.raises(TargetError, match="x was not ready in 0 s"):
        made.start()
    assert not made.is_running


def test_a_program_that_is_not_there_is_told(tmp_path):
    with pytest.raises(TargetError, match="/no/such/program cannot be run"):
        server(("/no/such/program",), tmp_path).start()


def test_all_that_a_command_started_is_ended_with_it():
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    process = start_group(
        Launch(command=(sys.executable, "-c", script)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while len(process_tree(process.pid)) < 2:
        assert process.poll() is None
    _, child = process_tree(process.pid)
    assert tree_memory_bytes(process.pid) > 1 << 20
    stop_group(process)
    assert not _lives(child)


def test_a_server_ends_with_us_even_if_we_are_killed(tmp_path):
    """Where util-linux is there: a measurement that is killed leaves nothing that takes the next one's CPU."""
    if not Path("/usr/bin/setpriv").exists():
        pytest.skip("setpriv is not installed")
    script = (
        "import subprocess, sys, time\n"
        "from penstock.bench.compare.server_process import Launch, start_group\n"
        f"child = start_group(Launch(command={SLEEPER!r}), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=env) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        while "time.sleep" not in Path(f"/proc/{child}/cmdline").read_text():
            assert parent.poll() is None
        while b"setpriv" in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]:
            assert parent.poll() is None
        parent.send_signal(signal.SIGKILL)
        parent.wait(10)
    for _ in range(200_000):
        if not _lives(child):
            return
    raise AssertionError("the child outlived its parent")


def _lives(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state not in "ZX"
