"""In the whole engine a fault ends the request that causes it, and nobody else notices."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from penstock.core.ids import RequestId, SequenceId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_checkpoint

PROMPT = list(range(1, 13))


class Faults:
    """Fails for one sequence, in the way it is told."""

    def __init__(self, kind: str, culprit: int) -> None:
        self.kind = kind
        self.culprit = SequenceId(culprit)

    def _raise_if(self, kind: str, seq_ids: Sequence[SequenceId]) -> None:
        if self.kind == kind and self.culprit in seq_ids:
            raise RuntimeError("a fault of the test")

    def before_forward(self, seq_ids: Sequence[SequenceId]) -> None:
        self._raise_if("forward", seq_ids)

    def after_logits(self, logits: torch.Tensor, seq_ids: Sequence[SequenceId]) -> None:
        if self.kind == "nan" and self.culprit in seq_ids:
            logits[list(seq_ids).index(self.culprit)] = float("nan")

    def before_sample(self, seq_ids: Sequence[SequenceId]) -> None:
        self._raise_if("sample", seq_ids)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("faults") / "llama"
    return tiny_checkpoint("llama", folder, vocab_size=97)


def make_core(
    path: Path, faults: Faults | None = None, *, async_scheduling: bool | None = None
) -> EngineCore:
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        kv=KvConfig(block_size=4, num_blocks=64),
        max_model_len=40,
        scheduler=SchedulerConfig(async_scheduling=async_scheduling),
        warmup=False,
    )
    return build_core(config, faults=faults)


def add(core: EngineCore, name: str, prompt: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    core.add(EngineRequest(request_id=RequestId(name), prompt_token_ids=prompt, params=params))


def run(core: EngineCore) -> dict[str, list[TokenDelta]]:
    deltas: dict[str, list[TokenDelta]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            deltas.setdefault(delta.request_id, []).append(delta)
    return deltas


def tokens(deltas: list[TokenDelta]) -> list[int]:
    return [token for delta in deltas for token in delta.token_ids]


@pytest.mark.parametrize(
    ("kind", "code"), [("nan", "numerical_error"), ("forward", "step_error"), ("sample", "step_error")]
)
def test_only_the_culprit_fails_and_the_next_prefix_hit_is_clean(path: Path, kind: str, code: str) -> None:
    sound = make_core(path)
    add(sound, "a", [50, 51, 52])
    add(sound, "b", PROMPT)
    add(sound, "c", [60, 61])
    expected = {name: tokens(deltas) for name, deltas in run(sound).items()}

    core = make_core(path, Faults(kind, culprit=2))
    add(core, "a", [50, 51, 52])
    add(core, "b", PROMPT)
    add(core, "c", [60, 61])
    got = run(core)
    last = got["b"][-1]
    assert last.error is not None
    assert last.error.code == code
    assert sum(delta.is_last for delta in got["b"]) == 1
    assert {name: tokens(got[name]) for name in ("a", "c")} == {name: expected[name] for name in ("a", "c")}
    assert core.kv.usage().num_owned == 0

    add(core, "again", PROMPT)
    assert tokens(run(core)["again"]) == expected["b"]


def test_the_fault_tests_name_the_sequence_they_mean(path: Path) -> None:
    core = make_core(path)
    add(core, "a", [50, 51, 52])
    add(core, "b", PROMPT)
    plan = core.scheduler.schedule()
    assert {seq.seq_id: seq.token_ids for seq in plan.sequences}[SequenceId(2)] == PROMPT


class Shortage(Faults):
    """There is memory for passes of so many tokens, as far as the test tells."""

    def __init__(self, *, culprit: int | None = None, most_sequences: int = 99) -> None:
        super().__init__("none", -5)
        self.alone = culprit
        self.most = most_sequences
        self.num_raised = 0

    def before_forward(self, seq_ids: Sequence[SequenceId]) -> None:
        if len(seq_ids) > self.most or (self.alone is not None and self.alone in seq_ids):
            self.num_raised += 1
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("is_async", [False, True])
def test_want_of_memory_costs_nobody_a_token(path: Path, is_async: bool) -> None:
    """Steps become smaller, somebody is preempted, and every answer is the one that it would have been."""
    prompts = [[number + i for i in range(12)] for number in range(6)]
    expected = []
    for shortage in (None, Shortage(most_sequences=1)):
        core = make_core(path, shortage, async_scheduling=is_async)
        for number, prompt in enumerate(prompts):
            add(core, str(number), prompt)
        expected.append({name: tokens(deltas) for name, deltas in run(core).items()})
        assert core.kv.usage().num_owned == 0
    assert shortage is not None
    assert shortage.num_raised > 0
    assert expected[0] == expected[1]


@pytest.mark.parametrize("is_async", [False, True])
def test_who_cannot_be_computed_even_alone_fails_alone_with_a_clear_error(path: Path, is_async: bool) -> None:
    core = make_core(path, Shortage(culprit=2), async_scheduling=is_async)
    for name in ("before", "culprit", "after"):
        add(core, name, PROMPT)
    answers = run(core)
    (failed,) = answers["culprit"]
    assert failed.error is not None
    assert failed.error.code == "out_of_memory"
    assert "not enough memory to compute" in failed.error.message
    assert len(tokens(answers["before"])) == len(tokens(answers["after"])) == 6
    assert core.kv.usage().num_owned == 0
