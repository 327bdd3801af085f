"""Greedy output does not depend on neighbours, chunk size, prefix hits or preemption in reference mode."""

import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penstock.core.ids import RequestId, TenantId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_checkpoint

VOCAB = 97
BLOCK = 4
MAX_LEN = 40
FAMILIES = ("llama", "mistral", "gemma2")
"""Full attention; one window; both kinds in two cache groups, soft-capped."""


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("invariance")
    return {family: tiny_checkpoint(family, root / family, vocab_size=VOCAB) for family in FAMILIES}


def make_core(path: Path, *, num_blocks: int, chunk: int, seqs: int, prefix: bool = True) -> EngineCore:
    scheduler = SchedulerConfig(
        max_num_seqs=seqs, max_num_batched_tokens=max(chunk, seqs), enable_prefix_caching=prefix
    )
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        scheduler=scheduler,
        kv=KvConfig(block_size=BLOCK, num_blocks=num_blocks),
        max_model_len=MAX_LEN,
        warmup=False,
    )
    return build_core(config)


def run(core: EngineCore, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[tuple[int, ...]]:
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
        request = EngineRequest(
            request_id=RequestId(str(index)),
            prompt_token_ids=list(prompt),
            params=params,
            tenant_id=TenantId("t"),
        )
        core.add(request)
    answers: dict[str, list[int]] = {str(index): [] for index in range(len(prompts))}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            answers[delta.request_id].extend(delta.token_ids)
            if delta.finish_reason is not None:
                assert delta.finish_reason is FinishReason.LENGTH
    assert core.kv.usage().num_owned == 0
    return [tuple(answers[str(index)]) for index in range(len(prompts))]


@cache
def alone(path: Path, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """The request by itself: whole prompt in one chunk, no prefix tree, blocks in plenty."""
    core = make_core(path, num_blocks=64, chunk=64, seqs=1, prefix=False)
    return run(core, [prompt], max_tokens=max_tokens)[0]


prompts_strategy = st.lists(
    st.tuples(st.integers(0, 2), st.integers(1, 24), st.integers(0, 3)), min_size=1, max_size=6
)


def make_prompts(spec: list[Any]) -> list[tuple[int, ...]]:
    """Prompts that share prefixes: a common stem per seed, cut at a length, with a tail of its own."""
    prompts = []
    for stem, length, tail in spec:
        rng = random.Random(stem)
        tokens = [rng.randrange(VOCAB) for _ in range(length)]
        prompts.append(tuple(tokens + [tail + 1] * tail))
    return prompts


@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(spec=prompts_strategy, chunk=st.integers(1, 40), seqs=st.integers(1, 6), data=st.data())
def test_greedy_output_is_that_of_the_request_alone(
    checkpoints: dict[str, Path], family: str, spec: list[Any], chunk: int, seqs: int, data: st.DataObject
) -> None:
    path = checkpoints[family]
    prompts = make_prompts(spec)
    max_tokens = data.draw(st.integers(1, 12), label="max_tokens")
    groups = 1 if family != "gemma2" else 2
    least = groups * (MAX_LEN // BLOCK + 1)
    num_blocks = data.draw(st.integers(least, 3 * least), label="num_blocks")
    core = make_core(path, num_blocks=num_blocks, chunk=chunk, seqs=seqs)
    expected = [alone(path, prompt, max_tokens) for prompt in prompts]
    assert run(core, prompts, max_tokens=max_tokens) == expected
    assert run(core, prompts, max_tokens=max_tokens) == expected, "again, with a warm prefix tree"


def test_the_invariance_test_meets_preemption_and_prefix_hits(checkpoints: dict[str, Path]) -> None:
    core = make_core(checkpoints["llama"], num_blocks=14, chunk=16, seqs=6)
    prompts = make_prompts([(0, 20, 1), (0, 20, 2), (1, 20, 0), (2, 16, 3)])
    for index, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)
        core.add(
            EngineRequest(request_id=RequestId(str(index)), prompt_token_ids=list(prompt), params=params)
        )
    num_preemptions = num_hits = 0
    answers: dict[str, list[int]] = {}
    while core.has_work:
        output = core.step()
        num_preemptions += output.stats.num_preemptions
        num_hits += output.stats.num_prefix_hit_tokens
        for delta in output.deltas:
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
    assert num_preemptions > 0
    assert num_hits > 0
    expected = [alone(checkpoints["llama"], prompt, 16) for prompt in prompts]
    assert [tuple(answers[str(index)]) for index in range(len(prompts))] == expected
