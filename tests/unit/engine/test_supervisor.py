"""The supervisor's state machine over a scripted child: restarts, requeues, drains, refusals."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from penstock.core.error_info import error_to_info
from penstock.core.errors import (
    CheckpointError,
    EngineDeadError,
    InvalidParameterError,
    NotReadyError,
    QueueFullError,
    StartupError,
)
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineInfo, EngineRequest, RequestStats, StepStats, TokenDelta
from penstock.engine import engine_run, restarts, supervisor
from penstock.engine.config import EngineConfig, SchedulerConfig
from penstock.engine.supervisor import SubprocessEngine
from penstock.engine.wire import Accepted, Fatal, FromEngine, Output, Shutdown, Started, Submit, ToEngine
from penstock.observe.clock import SystemClock

INFO = EngineInfo(
    architecture="Fake",
    num_parameters=1,
    dtype="float32",
    kernels="fake",
    device="cpu",
    vocab_size=100,
    weights_bytes=1,
    kv_bytes=1,
    bytes_per_block=1,
    block_size=4,
    num_blocks=16,
    num_cache_groups=1,
    max_model_len=32,
    max_num_seqs=4,
    max_num_batched_tokens=32,
    load_time_s=0.0,
    warmup_time_s=0.0,
)
STATS = RequestStats(1, 0, 1, 0.0, 1, 0.0, 0)


class Child:
    """Stands for `EngineProcess`; a test speaks for the engine through it."""

    made: list["Child"]
    on_spawn: Callable[["Child"], None]

    def __init__(self, *, folder: Any, generation: int, on_message: Callable[[FromEngine], None]) -> None:
        self.generation = generation
        self.say = on_message
        self.sent: list[ToEngine] = []
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.pid = generation
        self.waiters = 0
        type(self).made.append(self)

    async def spawn(self, _config: EngineConfig) -> None:
        type(self).on_spawn(self)

    def send(self, message: ToEngine) -> None:
        self.sent.append(message)
        if isinstance(message, Shutdown):
            self.die(0)

    async def wait(self) -> int:
        self.waiters += 1
        lateness = 10 * (self.waiters - 1)  # who asked later reads the last messages later
        code = await asyncio.shield(self.exited)
        await turns(lateness)
        return code

    def die(self, code: int = -9) -> None:
        if not self.exited.done():
            self.exited.set_result(code)

    async def close(self) -> None:
        self.die()

    @property
    def submitted(self) -> list[str]:
        return [message.request.request_id for message in self.sent if isinstance(message, Submit)]


class Events:
    def on_step(self, model: ModelName, stats: StepStats) -> None: ...
    def on_token_gap(self, model: ModelName, gap_s: float) -> None: ...
    def on_request(self, record: Any) -> None: ...
    def on_engine_restart(self, model: ModelName, reason: str) -> None: ...
    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None: ...


def started(child: Child) -> None:
    child.say(Started(INFO))


def on_spawn(action: Callable[[Child], None]) -> None:
    Child.on_spawn = staticmethod(action)  # type: ignore[assignment]  # replaced per test


@pytest.fixture(autouse=True)
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    Child.made = []
    on_spawn(started)
    monkeypatch.setattr(engine_run, "EngineProcess", Child)
    monkeypatch.setattr(restarts, "RESTART_PAUSES_S", (0.0,))
    monkeypatch.setattr(supervisor, "CLOSE_TIMEOUT_S", 0.01)
    return Child.made


@pytest.fixture
async def engine() -> AsyncIterator[SubprocessEngine]:
    limits = SchedulerConfig(max_num_seqs=4, max_num_queued_reqs=5, max_num_batched_tokens=32)
    config = EngineConfig(model_path="x", scheduler=limits)
    engine = SubprocessEngine(config, name=ModelName("m"), events=Events(), clock=SystemClock())
    yield engine
    await engine.close()


def request(name: str, *, n: int = 1) -> EngineRequest:
    params = SamplingParams(n=n, max_tokens=4)
    return EngineRequest(request_id=RequestId(name), prompt_token_ids=[1], params=params)


async def turns(count: int = 20) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def accepted(engine: SubprocessEngine, name: str) -> Any:
    task = asyncio.create_task(engine.generate(request(name)))
    await turns(3)
    Child.made[-1].say(Accepted(RequestId(name)))
    return await task


def last(name: str) -> TokenDelta:
    return TokenDelta(RequestId(name), 0, (5,), None, FinishReason.LENGTH, None, 0, STATS)


async def test_refusals_never_fill_the_queue(engine: SubprocessEngine, children: list[Child]) -> None:
    await engine.start()
    for index in range(50):
        with pytest.raises(InvalidParameterError):
            await engine.generate(request(str(index), n=8))
    assert engine.not_ready_reason is None
    assert children[0].submitted == []


async def test_requests_on_their_way_count_once_they_are_more_than_the_seats(
    engine: SubprocessEngine,
) -> None:
    await engine.start()
    tasks = [asyncio.create_task(engine.generate(request(str(index)))) for index in range(9)]
    await turns(3)
    assert engine.not_ready_reason == "queue_full"
    with pytest.raises(QueueFullError):
        await engine.generate(request("more"))
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert engine.not_ready_reason is None


async def test_a_waiting_request_is_sent_to_the_next_engine_once_and_new_ones_after_it(
    engine: SubprocessEngine, children: list[Child]
) -> None:
    await engine.start()
    waiting = await accepted(engine, "waiting")
    children[0].die()
    await turns()
    fresh = asyncio.create_task(engine.generate(request("fresh")))
    await turns(3)
    assert children[1].submitted == ["waiting", "fresh"]
    children[1].say(Accepted(RequestId("fresh")))
    children[1].say(Output([last("waiting"), last("fresh")]))
    assert [delta.token_ids async for delta in waiting] == [(5,)]
    assert [delta.token_ids async for delta in await fresh] == [(5,)]


async def test_a_request_that_waited_for_one_restart_fails_at_the_second(
    engine: SubprocessEngine, children: list[Child]
) -> None:
    await engine.start()
    waiting = await accepted(engine, "waiting")
    children[0].die()
    await turns()
    children[1].die()
    await turns()
    with pytest.raises(EngineDeadError):
        await anext(waiting)
    assert len(children) == 3
    assert engine.not_ready_reason is None


async def test_draining_outlives_a_restart(engine: SubprocessEngine, children: list[Child]) -> None:
    await engine.start()
    waiting = await accepted(engine, "waiting")
    drained = asyncio.create_task(engine.drain(5))
    await turns(3)
    children[0].die()
    await turns()
    assert engine.not_ready_reason == "draining"
    with pytest.raises(NotReadyError, match="draining"):
        await engine.generate(request("late"))
    children[1].say(Output([last("waiting")]))
    assert [delta.token_ids async for delta in waiting] == [(5,)]
    assert await drained


async def test_what_waits_fails_after_five_starts_in_vain_and_the_engine_is_tried_again(
    engine: SubprocessEngine, children: list[Child]
) -> None:
    await engine.start()
    waiting = await accepted(engine, "waiting")
    on_spawn(lambda child: child.die(3) if child.generation < 9 else started(child))
    children[0].die()
    with pytest.raises(EngineDeadError, match="does not start"):
        await asyncio.wait_for(anext(waiting), 5)
    await turns(100)
    assert engine.not_ready_reason is None
    assert children[-1].generation == 9


async def test_the_first_start_that_fails_is_told_and_never_repeated(
    engine: SubprocessEngine, children: list[Child]
) -> None:
    def fail(child: Child) -> None:
        child.say(Fatal(error_to_info(CheckpointError("model.safetensors is broken"))))
        child.die(3)

    on_spawn(fail)
    with pytest.raises(CheckpointError, match="broken"):
        await engine.start()
    assert len(children) == 1
    assert engine.not_ready_reason == "closed"


async def test_a_child_that_ends_without_a_word_is_a_startup_error(engine: SubprocessEngine) -> None:
    on_spawn(lambda child: child.die(-11))
    with pytest.raises(StartupError, match="-11"):
        await engine.start()


async def test_questions_are_refused_while_nobody_can_answer(
    engine: SubprocessEngine, children: list[Child]
) -> None:
    await engine.start()
    on_spawn(lambda child: None)
    children[0].die()
    await turns()
    assert engine.not_ready_reason == "restarting"
    with pytest.raises(NotReadyError, match="restarting"):
        await engine.memory()
    with pytest.raises(NotReadyError, match="restarting"):
        await engine.generate(request("r"))


async def test_a_wake_up_that_comes_while_an_engine_ends_leaves_the_next_one_alone(
    engine: SubprocessEngine, children: list[Child], caplog: pytest.LogCaptureFixture
) -> None:
    """Orders take their turns: the end of level 2 closed the process that the wake-up had just made."""
    caplog.set_level("INFO", "penstock.supervisor")
    await engine.start()
    await asyncio.gather(engine.sleep(2), engine.wake_up())
    await turns()
    assert [child.exited.done() for child in children] == [True, False]
    assert (engine.not_ready_reason, engine.is_sleeping) == (None, False)
    assert caplog.messages == ["the model is asleep, level 2", "the model is awake"]


async def test_a_drain_does_not_wait_for_what_sleeps(engine: SubprocessEngine) -> None:
    """A minute of budget, and the test ends at once: nobody wakes the engine while the server ends."""
    await engine.start()
    waiting = await accepted(engine, "waiting")
    await engine.sleep(2)
    assert not await asyncio.wait_for(engine.drain(60), 10)
    await engine.close()
    with pytest.raises(EngineDeadError, match="shutting down"):
        await anext(waiting)
