"""Greedy answers of a checkpoint through the whole engine: chunked prefill, mixed batches, a small cache."""

from pathlib import Path
from typing import Any

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig

PROMPTS = ([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 26, 43], [7], [3, 14, 15, 92, 65, 35, 89, 79, 1, 2])
SHORT_PROMPTS = ([3, 14, 15, 92, 65, 35], [7, 2])
MAX_TOKENS = 12


def greedy_answers(
    path: Path, *, block_size: int = 4, async_scheduling: bool = False, is_short: bool = False, **options: Any
) -> dict[str, list[int]]:
    """Token ids by the number of the prompt.

    Args:
        path: the checkpoint.
        block_size: of the cache.
        is_short: fewer and shorter prompts and answers, for kernels that are interpreted.
        async_scheduling: plan each step before the one before it is known.
        options: further fields of `EngineConfig`.
    """
    config = EngineConfig(
        model_path=str(path),
        scheduler=SchedulerConfig(
            max_num_seqs=4, max_num_batched_tokens=5, async_scheduling=async_scheduling
        ),
        kv=KvConfig(block_size=block_size, num_blocks=64),
        max_model_len=48,
        warmup=False,
        **options,
    )
    core = build_core(config)
    answers: dict[str, list[int]] = {}
    params = SamplingParams(temperature=0, max_tokens=2 if is_short else MAX_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(SHORT_PROMPTS if is_short else PROMPTS):
        core.add(EngineRequest(request_id=RequestId(str(index)), prompt_token_ids=prompt, params=params))
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            answers.setdefault(delta.request_id, []).extend(delta.token_ids)
    core.ranks.close()
    return answers
