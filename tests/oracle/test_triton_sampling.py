"""Seeded draws through the whole engine on the Triton kernels, interpreted: the tokens of the reference."""

from pathlib import Path

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from tests.oracle.checkpoints import tiny_checkpoint

PARAMS = (
    SamplingParams(seed=3, max_tokens=3, ignore_eos=True, top_p=0.8, repetition_penalty=1.3, n=2),
    SamplingParams(seed=4, max_tokens=3, ignore_eos=True, top_k=20, frequency_penalty=1.9, logprobs=2),
    SamplingParams(seed=5, max_tokens=3, ignore_eos=True, typical_p=0.9),
)
"""A fork, logprobs, and a draw that the device leaves to the host."""


def answers(path: Path, *, kernels: str, async_scheduling: bool) -> dict[tuple[str, int], list[int]]:
    core = build_core(
        EngineConfig(
            model_path=str(path),
            kernels=kernels,
            device="cpu",
            dtype="float32",
            scheduler=SchedulerConfig(
                max_num_seqs=4, max_num_batched_tokens=16, async_scheduling=async_scheduling
            ),
            kv=KvConfig(block_size=16, num_blocks=16),
            max_model_len=32,
            warmup=False,
        )
    )
    found: dict[tuple[str, int], list[int]] = {}
    for index, params in enumerate(PARAMS):
        core.add(EngineRequest(request_id=RequestId(str(index)), prompt_token_ids=[3, 14, 15], params=params))
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            assert (delta.logprobs is not None) == (delta.request_id == "1")
            found.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    core.ranks.close()
    return found


def test_seeded_draws_are_those_of_the_reference_one_step_ahead(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    wanted = answers(path, kernels="reference", async_scheduling=False)
    assert len(wanted) == 4
    assert all(len(token_ids) == 3 for token_ids in wanted.values())
    assert answers(path, kernels="triton", async_scheduling=True) == wanted
