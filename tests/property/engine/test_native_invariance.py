"""Under `--deterministic` greedy output on the native kernels is that of the request alone, bit by bit of bfloat16.

Neighbours, chunks, prefix hits, preemption, the number of threads: what `test_invariance` says of the reference,
for the fast kernels, with quantized weights and cache too.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_model
from tests.property.engine.test_invariance import make_prompts, prompts_strategy, run

VOCAB = 97
BLOCK = 16
MAX_LEN = 96
MODES = {
    "bfloat16": EngineConfig(model_path=""),
    "int8": EngineConfig(model_path="", quantization="int8", kv=KvConfig(cache_dtype="int8")),
    "int4": EngineConfig(model_path="", quantization="int4", quantization_group_size=32),
}
FAMILIES = ("llama", "gemma2")
"""Full attention; windows, caps and two cache groups."""


@pytest.fixture(scope="session")
def native_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("native-invariance")
    for family in FAMILIES:
        tiny_model(family, vocab_size=VOCAB, head_dim=32).save_pretrained(root / family)
    return {family: root / family for family in FAMILIES}


def make_core(
    path: Path, mode: str, *, num_blocks: int, chunk: int, seqs: int, threads: int, prefix: bool = True
) -> EngineCore:
    scheduler = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=max(chunk, seqs), enable_prefix_caching=prefix
    )
    config = msgspec.structs.replace(
        MODES[mode],
        model_path=str(path),
        dtype="bfloat16",
        kernels="native",
        deterministic=True,
        num_threads=threads,
        scheduler=scheduler,
        kv=msgspec.structs.replace(MODES[mode].kv, block_size=BLOCK, num_blocks=num_blocks),
        max_model_len=MAX_LEN,
        warmup=False,
    )
    return build_core(config)


@cache
def alone(path: Path, mode: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """The request by itself: whole prompt in one chunk, no prefix tree, one thread."""
    core = _lonely(path, mode)
    return run(core, [prompt], max_tokens=max_tokens)[0]


@cache
def _lonely(path: Path, mode: str) -> EngineCore:
    return make_core(path, mode, num_blocks=64, chunk=MAX_LEN, seqs=1, threads=1, prefix=False)


@pytest.mark.parametrize("mode", list(MODES))
@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=prompts_strategy, chunk=st.integers(1, 96), seqs=st.integers(1, 6), data=st.data())
def test_native_greedy_output_is_that_of_the_request_alone(
    native_checkpoints: dict[str, Path],
    family: str,
    mode: str,
    spec: list[Any],
    chunk: int,
    seqs: int,
    data: st.DataObject,
) -> None:
    path = native_checkpoints[family]
    prompts: Sequence[tuple[int, ...]] = [2 * prompt for prompt in make_prompts(spec)]
    max_tokens = data.draw(st.integers(1, 24), label="max_tokens")
    groups = 1 if family != "gemma2" else 2
    least = groups * (MAX_LEN // BLOCK + 1)
    num_blocks = data.draw(st.integers(least, 2 * least), label="num_blocks")
    threads = data.draw(st.integers(1, 2), label="threads")
    core = make_core(path, mode, num_blocks=num_blocks, chunk=chunk, seqs=seqs, threads=threads)
    expected = [alone(path, mode, prompt, max_tokens) for prompt in prompts]
    assert run(core, prompts, max_tokens=max_tokens) == expected
    assert run(core, prompts, max_tokens=max_tokens) == expected, "again, with a warm prefix tree"
