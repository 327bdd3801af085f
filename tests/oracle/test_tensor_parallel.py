"""Two ranks compute what one computes: every family, and the whole engine over processes."""

from pathlib import Path

import pytest
import torch

from penstock.core.errors import EngineDeadError, StartupError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.runner.rank_processes import SeveralRanks
from penstock.models.loader import load_model
from penstock.parallel.rank import Rank
from tests.fakes.thread_ranks import run_ranks
from tests.oracle.checkpoints import FAMILIES, tiny_checkpoint
from tests.oracle.greedy_engine import PROMPTS, greedy_answers
from tests.oracle.paged_driver import PagedDriver, run_schedule
from tests.oracle.test_family_logits import SCHEDULE, tokens_by_name

TOLERANCE = 5e-5
"""Logits are of order 1 to 10; sums over the ranks round in another order, in float32."""


@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_compute_the_logits_of_one(family: str, tmp_path: Path) -> None:
    """Heads, experts, inner sizes and the vocabulary (97, so unequally) are shared; each reads its part alone."""
    path = tiny_checkpoint(family, tmp_path)
    one = load_model(path)
    expected = run_schedule(PagedDriver(one), tokens_by_name(), SCHEDULE)

    def work(rank: Rank) -> None:
        part = load_model(path, rank=rank)
        assert part.model.num_kv_heads * 2 == one.model.num_kv_heads
        assert part.weights_bytes < 0.75 * one.weights_bytes
        got = run_schedule(PagedDriver(part), tokens_by_name(), SCHEDULE)
        for name, logits in expected.items():
            torch.testing.assert_close(got[name], logits, atol=TOLERANCE, rtol=TOLERANCE)

    run_ranks(work)


def _config(path: Path, **options: object) -> EngineConfig:
    given = {
        "model_path": str(path),
        "dtype": "float32",
        "scheduler": SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=5),
        "kv": KvConfig(block_size=4, num_blocks=64),
        "max_model_len": 48,
        "tensor_parallel_size": 2,
    }
    return EngineConfig(**{**given, **options})  # type: ignore[arg-type]  # options are fields


def test_two_processes_answer_as_one_and_the_death_of_one_ends_the_engine(tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path, vocab_size=101)
    core = build_core(_config(path))
    assert isinstance(core.ranks, SeveralRanks)
    try:
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        for index, prompt in enumerate(PROMPTS):
            core.add(EngineRequest(request_id=RequestId(str(index)), prompt_token_ids=prompt, params=params))
        answers: dict[str, list[int]] = {}
        while core.has_work:
            for delta in core.step().deltas:
                answers.setdefault(delta.request_id, []).extend(delta.token_ids)
        assert answers == greedy_answers(path, dtype="float32")
        (other,) = core.ranks.started.others
        other.process.kill()
        other.process.wait()
        core.add(EngineRequest(request_id=RequestId("late"), prompt_token_ids=[5, 6], params=params))
        with pytest.raises(EngineDeadError, match="rank 1 of the engine has ended with exit code -9"):
            core.step()
    finally:
        core.ranks.close()


@pytest.mark.parametrize(
    ("size", "message"),
    [(3, "must divide num_key_value_heads, which is 2"), (65, "tensor_parallel_size is 65")],
)
def test_a_number_of_ranks_that_does_not_fit_is_refused(size: int, message: str, tmp_path: Path) -> None:
    path = tiny_checkpoint("llama", tmp_path)
    if size == 65:
        with pytest.raises(StartupError, match=message):
            build_core(_config(path, tensor_parallel_size=size))
        return
    with pytest.raises(StartupError, match=message):
        run_ranks(lambda rank: load_model(path, rank=rank), size=size)
