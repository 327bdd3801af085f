"""An engine that sleeps holds no KV, refuses what is new, and afterwards goes on as if nothing had been."""

import asyncio
from pathlib import Path

import pytest

from penstock.cli.local_model import StepTotals
from penstock.core.errors import InvalidParameterError, NotReadyError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.in_process import InProcessEngine
from tests.oracle.checkpoints import tiny_checkpoint

MAX_TOKENS = 100


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("sleep") / "llama", vocab_size=97)


def request(name: str) -> EngineRequest:
    params = SamplingParams(temperature=0, max_tokens=MAX_TOKENS, ignore_eos=True)
    prompt = list(range(1, 13)) if name != "other" else [5, 6, 7]
    return EngineRequest(request_id=RequestId(name), prompt_token_ids=prompt, params=params)


def engine_for(path: Path, **scheduler) -> InProcessEngine:
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        kv=KvConfig(block_size=4, num_blocks=200, offloading_bytes=1 << 20),
        scheduler=SchedulerConfig(**scheduler),
        max_model_len=128,
        warmup=False,
    )
    return InProcessEngine(build_core(config), name=ModelName("m"), events=StepTotals())


async def answer(stream) -> list[int]:
    return [token for delta in [delta async for delta in stream] for token in delta.token_ids]


@pytest.mark.parametrize("is_async", [False, True])
async def test_what_runs_goes_on_after_the_wake_up_with_the_same_tokens(path: Path, is_async: bool) -> None:
    engine = engine_for(path, async_scheduling=is_async)
    expected = await answer(await engine.generate(request("alone")))
    running = await engine.generate(request("running"))
    leaving = await engine.generate(request("other"))
    first = await anext(running)
    await engine.sleep(1)
    memory = await engine.memory()
    assert (memory.kv_bytes_owned, memory.kv_bytes_cached) == (0, 0)
    assert memory.offload_bytes_used > 0  # host memory keeps what it has
    assert engine.not_ready_reason == "sleeping"
    with pytest.raises(NotReadyError, match="sleeping") as refused:
        await engine.generate(request("new"))
    assert refused.value.retry_after_s
    await leaving.aclose()  # a client may leave while the engine sleeps
    await engine.sleep(1)  # once more is as good as once
    await engine.wake_up()
    assert not engine.is_sleeping
    tokens = list(first.token_ids) + await answer(running)
    assert tokens == expected
    assert await answer(await engine.generate(request("again"))) == expected
    assert (await engine.memory()).kv_bytes_owned == 0
    await engine.close()


async def test_a_wake_up_on_the_way_to_sleep_and_a_level_without_a_process(path: Path) -> None:
    engine = engine_for(path)
    with pytest.raises(InvalidParameterError, match="level is 2"):
        await engine.sleep(2)
    running = await engine.generate(request("running"))
    _, _, tokens = await asyncio.gather(engine.sleep(1), engine.wake_up(), answer(running))
    assert len(tokens) == MAX_TOKENS
    assert engine.not_ready_reason is None
    await engine.close()
