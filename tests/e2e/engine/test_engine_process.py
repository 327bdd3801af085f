"""A real engine process dies, hangs, refuses and ends; no client hangs, the API side carries on."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.core.errors import CheckpointError, EngineDeadError, InvalidParameterError, NotReadyError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine import liveness
from penstock.engine.config import EngineConfig, KvConfig
from penstock.engine.supervisor import SubprocessEngine
from penstock.models.embedded_model import embedded_path
from penstock.observe.clock import SystemClock

MAX_TOKENS = 3000


class Restarts:
    """EngineEvents that remembers restarts."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def on_step(self, model: ModelName, stats: Any) -> None: ...
    def on_token_gap(self, model: ModelName, gap_s: float) -> None: ...
    def on_request(self, record: Any) -> None: ...
    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None: ...

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        self.reasons.append(reason)


def make_engine(path: Path, events: Restarts, *, ranks: int = 1) -> SubprocessEngine:
    config = EngineConfig(
        model_path=str(path),
        kv=KvConfig(num_blocks=2048),
        warmup=False,
        num_threads=1,
        tensor_parallel_size=ranks,
    )
    return SubprocessEngine(config, name=ModelName("m"), events=events, clock=SystemClock())


@pytest.fixture
def events() -> Restarts:
    return Restarts()


@pytest.fixture
async def engine(events: Restarts) -> AsyncIterator[SubprocessEngine]:
    engine = make_engine(embedded_path(), events)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.close()


def request(name: str, *, max_tokens: int = MAX_TOKENS) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return EngineRequest(request_id=RequestId(name), prompt_token_ids=[5, 6, 7], params=params)


async def until(condition: Any, *, timeout_s: float = 20) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.02)


async def test_tokens_come_from_another_process_which_close_ends(events: Restarts) -> None:
    engine = make_engine(embedded_path(), events)
    await engine.start()
    pid = engine.pid
    assert pid != os.getpid()
    assert engine.not_ready_reason is None
    stream = await engine.generate(request("r", max_tokens=4))
    tokens = [token for delta in [d async for d in stream] for token in delta.token_ids]
    assert len(tokens) == 4
    await engine.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(NotReadyError):
        await engine.generate(request("late"))


async def test_after_sigkill_started_requests_fail_and_fresh_ones_are_served_by_the_next_engine(
    engine: SubprocessEngine, events: Restarts
) -> None:
    started = await engine.generate(request("started"))
    await anext(started)
    os.kill(engine.pid, signal.SIGKILL)
    killed_s = time.monotonic()
    fresh = asyncio.create_task(engine.generate(request("fresh", max_tokens=3)))
    with pytest.raises(EngineDeadError):
        async for _ in started:
            pass
    assert time.monotonic() - killed_s < 1.0
    assert engine.not_ready_reason == "restarting"
    deltas = [delta async for delta in await asyncio.wait_for(fresh, 20)]
    assert sum(len(delta.token_ids) for delta in deltas) == 3
    assert engine.not_ready_reason is None
    assert events.reasons == ["died"]


@pytest.fixture
def scratch(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder for temporary ones; its name is short, because sockets have names of at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="p") as folder:
        monkeypatch.setenv("TMPDIR", folder)
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield folder


async def test_a_dead_rank_ends_its_engine_at_once_and_leaves_nothing_behind(
    events: Restarts, scratch: str
) -> None:
    """The engine ends by itself, it does not hang; nor does a killed one leave the ranks' folder."""
    engine = make_engine(embedded_path(), events, ranks=2)
    await engine.start()
    try:
        started = await engine.generate(request("started"))
        await anext(started)
        os.kill(_only_child(engine.pid), signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            async for _ in started:
                pass
        await until(lambda: engine.not_ready_reason is None, timeout_s=60)
        fresh = await engine.generate(request("fresh", max_tokens=3))
        assert sum([len(delta.token_ids) async for delta in fresh]) == 3
        assert events.reasons == ["died"]
        os.kill(engine.pid, signal.SIGKILL)
    finally:
        await engine.close()
    assert not any(os.scandir(scratch))


def _only_child(pid: int) -> int:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split()
    (child,) = children
    return int(child)


async def test_an_engine_that_was_put_to_sleep_refuses_and_answers_the_same_when_it_is_woken(
    engine: SubprocessEngine, events: Restarts
) -> None:
    """Level 1 in the same process, level 2 by ending it; what has no token yet waits for the next one."""

    async def answer(name: str) -> list[int]:
        stream = await engine.generate(request(name, max_tokens=5))
        return [token for delta in [d async for d in stream] for token in delta.token_ids]

    expected, pid = await answer("first"), engine.pid
    started = await engine.generate(request("started"))
    await anext(started)
    await engine.sleep(1)
    assert (engine.is_sleeping, engine.not_ready_reason) == (True, "sleeping")
    with pytest.raises(NotReadyError, match="sleeping"):
        await engine.generate(request("refused"))
    await engine.sleep(2)  # deeper: what has begun ends
    with pytest.raises(NotReadyError, match="put to sleep"):
        async for _ in started:
            pass
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(NotReadyError, match="sleeping"):
        await engine.generate(request("refused too"))
    await engine.wake_up()
    assert engine.not_ready_reason is None
    assert engine.pid != pid
    await engine.sleep(1)
    await engine.wake_up()
    await engine.wake_up()  # awake already
    assert await answer("again") == expected
    assert events.reasons == []  # it neither died nor hung
    with pytest.raises(InvalidParameterError, match="level is 3"):
        await engine.sleep(3)


async def test_a_stopped_engine_is_detected_killed_and_replaced(
    engine: SubprocessEngine, events: Restarts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(liveness, "WATCHDOG_MIN_S", 0.5)
    monkeypatch.setattr(liveness, "PING_INTERVAL_S", 0.25)
    stream = await engine.generate(request("r"))
    await anext(stream)
    os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(EngineDeadError):
        async with asyncio.timeout(10):
            async for _ in stream:
                pass
    await until(lambda: engine.not_ready_reason is None)
    assert events.reasons == ["hung"]


async def test_cancelled_requests_give_their_blocks_back(engine: SubprocessEngine) -> None:
    stream = await engine.generate(request("r"))
    await anext(stream)
    assert (await engine.memory()).kv_bytes_owned > 0
    await stream.aclose()
    async with asyncio.timeout(5):
        while (await engine.memory()).kv_bytes_owned:
            await asyncio.sleep(0.02)
    assert await engine.requests() == []


async def test_refused_requests_leave_the_queue_as_it_was(engine: SubprocessEngine) -> None:
    for index in range(3000):
        params = SamplingParams(n=8, max_tokens=4000)
        too_long = EngineRequest(
            request_id=RequestId(f"bad-{index}"), prompt_token_ids=[5] * 500, params=params
        )
        with pytest.raises(InvalidParameterError):
            await engine.generate(too_long)
    assert engine.not_ready_reason is None
    stream = await engine.generate(request("good", max_tokens=2))
    assert sum([len(delta.token_ids) async for delta in stream]) == 2


async def test_draining_admits_nothing_and_waits_for_what_runs(engine: SubprocessEngine) -> None:
    stream = await engine.generate(request("r", max_tokens=40))
    drained = asyncio.create_task(engine.drain(20))
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError):
        await engine.generate(request("late"))
    assert sum([len(delta.token_ids) async for delta in stream]) == 40
    assert await drained


async def test_a_missing_checkpoint_is_one_clear_error_and_leaves_no_process(
    events: Restarts, tmp_path: Path
) -> None:
    engine = make_engine(tmp_path, events)
    with pytest.raises(CheckpointError, match="config.json"):
        await engine.start()
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


def test_the_engine_ends_when_its_parent_is_killed() -> None:
    script = (
        "import asyncio, sys; sys.path.insert(0, 'tests/e2e/engine')\n"
        "import test_engine_process as t\n"
        "async def main():\n"
        "    engine = t.make_engine(t.embedded_path(), t.Restarts())\n"
        "    await engine.start()\n"
        "    print(engine.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child_pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline_s = time.monotonic() + 5
    while Path(f"/proc/{child_pid}/cmdline").exists() and Path(f"/proc/{child_pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline_s, "the engine outlived its parent"
        time.sleep(0.02)
    parent.stdout.close()
