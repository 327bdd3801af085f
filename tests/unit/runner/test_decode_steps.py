"""A decode step as one native call gives the tokens and the failures of the general path."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest, Pooling, TokenDelta
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig
from penstock.engine.core import EngineCore
from penstock.engine.runner.rank_group import LocalRank
from penstock.engine.runner.runner import Runner
from penstock.engine.sampling.masks import MaskSource
from penstock.engine.scheduler.constraint import Mask
from penstock.engine.scheduler.plan import (
    NewSequence,
    SampleSpec,
    ScheduledSequence,
    StepPlan,
    StepResult,
)
from penstock.kernels.cpu import _native
from penstock.models.embedded_model import embedded_path
from penstock.models.recorded import RecordedModel

PROMPT = list(range(40, 52))
NUM_TOKENS = 12
BLOCK_SIZE = 16
KINDS = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=NUM_TOKENS),
    "random": SamplingParams(temperature=1.0, seed=3, ignore_eos=True, max_tokens=NUM_TOKENS),
    "filtered": SamplingParams(
        temperature=0.8, top_k=40, top_p=0.9, seed=4, ignore_eos=True, max_tokens=NUM_TOKENS
    ),
    "logprobs": SamplingParams(temperature=1.0, seed=5, logprobs=3, ignore_eos=True, max_tokens=NUM_TOKENS),
    "penalised": SamplingParams(
        temperature=1.0, seed=6, repetition_penalty=1.3, ignore_eos=True, max_tokens=NUM_TOKENS
    ),
    "mirostat": SamplingParams(temperature=1.0, seed=7, mirostat=2, ignore_eos=True, max_tokens=NUM_TOKENS),
}


def make_core(**options: object) -> EngineCore:
    return build_core(
        EngineConfig(
            model_path=str(embedded_path()),
            kernels="native",
            num_threads=2,
            max_model_len=128,
            kv=KvConfig(num_blocks=64),
            warmup=False,
            **options,  # type: ignore[arg-type]  # as the tests write them
        )
    )


@pytest.fixture(scope="module")
def shared() -> EngineCore:
    return make_core()


@pytest.fixture
def core(shared: EngineCore) -> Iterator[EngineCore]:
    runner = runner_of(shared)
    decodes = runner._forward.decodes
    yield shared
    runner._forward.decodes = decodes
    for report in list(shared.requests()):
        shared.abort(report.request_id)
    while shared.has_work:
        shared.step()


def runner_of(core: EngineCore) -> Runner:
    assert isinstance(core.ranks, LocalRank)
    return core.ranks.runner


def watch(runner: Runner, monkeypatch: pytest.MonkeyPatch) -> list[bool | None]:
    """For each step that was offered: None if it was refused, else whether its tokens were drawn with it."""
    assert runner._forward.decodes is not None
    run, seen = runner._forward.decodes.run, []

    def noted(*args, **kwargs):
        step = run(*args, **kwargs)
        seen.append(None if step is None else step.drawn is not None)
        return step

    monkeypatch.setattr(runner._forward.decodes, "run", noted)
    return seen


def answers(
    core: EngineCore, kinds: dict[str, SamplingParams], *, prompt=PROMPT
) -> dict[str, list[TokenDelta]]:
    for i, (name, params) in enumerate(kinds.items()):
        tokens = [token + i for token in prompt]
        core.add(EngineRequest(request_id=RequestId(name), prompt_token_ids=tokens, params=params))
    deltas: dict[str, list[TokenDelta]] = {name: [] for name in kinds}
    while core.has_work:
        for delta in core.step().deltas:
            deltas[delta.request_id].append(delta)
    return deltas


def told(deltas: dict[str, list[TokenDelta]]) -> dict[str, list[object]]:
    """What a client sees of each answer."""
    return {
        name: [(delta.token_ids, delta.logprobs, delta.finish_reason) for delta in parts]
        for name, parts in deltas.items()
    }


@pytest.mark.parametrize("names", [[name] for name in KINDS] + [["greedy", "random", "logprobs"], [*KINDS]])
def test_tokens_are_those_of_the_general_path(
    core: EngineCore, names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kinds = {name: KINDS[name] for name in names}
    seen = watch(runner_of(core), monkeypatch)
    fast = told(answers(core, kinds))
    draws_with_it = not {"penalised", "mirostat"} & set(names)
    assert [each for each in seen if each is not None] == [draws_with_it] * (NUM_TOKENS - 1)
    runner_of(core)._forward.decodes = None
    assert told(answers(core, kinds)) == fast


KINDS_OF_PLAN = ("greedy", "random", "filtered", "logprobs")
SEQUENCES = range(len(KINDS_OF_PLAN))
START = 3
"""Tokens that stand in the sequence's block before the step."""


def decode(seq_id: int, **fields: object) -> ScheduledSequence:
    given = {"token_ids": [60 + seq_id], "samples": (SampleSpec(seq_id, 2),), **fields}
    return ScheduledSequence(seq_id=seq_id, start=START, block_tables=([seq_id],), **given)  # type: ignore[arg-type]


def plan(sequences: Sequence[ScheduledSequence]) -> StepPlan:
    return StepPlan(
        step_id=0,
        sequences=list(sequences),
        new_sequences=[
            NewSequence(seq_id=i, params=KINDS[name], seed=i, prompt_token_ids=PROMPT)
            for i, name in enumerate(KINDS_OF_PLAN)
        ],
    )


def both_ways(
    runner: Runner, *, masks: MaskSource | None = None, void: frozenset[int] = frozenset()
) -> StepResult:
    """The result of a step, which is the same on the general path."""
    results = []
    for decodes in (runner._forward.decodes, None):
        runner._forward.decodes, kept = decodes, runner._forward.decodes
        handle = runner.launch(plan([decode(i) for i in SEQUENCES]))
        runner.draw(handle, masks=masks, void=void)
        results.append(runner.collect(handle))
        runner._forward.decodes = kept
    fast, general = results
    assert (fast.tokens, fast.failures) == (general.tokens, general.failures)
    return fast


@pytest.mark.parametrize("isa", sorted({"scalar", "avx2"} & set(_native.supported_isas())))
def test_the_heads_own_maxima_choose_what_the_logits_do(isa: str) -> None:
    core = make_core(isa=isa)
    assert len(both_ways(runner_of(core)).tokens) == len(SEQUENCES)


def test_a_sequence_whose_states_are_not_finite_fails_alone(core: EngineCore) -> None:
    runner = runner_of(core)
    sound = both_ways(runner)
    runner._pool.storage[1] = 0xFF  # a NaN in bfloat16, whatever stands where
    result = both_ways(runner)
    runner._pool.storage[1] = 0
    assert [(failure.seq_id, failure.code) for failure in result.failures] == [(1, "numerical_error")]
    assert result.tokens == [token for token in sound.tokens if token.seq_id != 1]


@dataclass
class OnlyToken:
    """Allows one sequence one token, the others all."""

    seq_id: int
    token_id: int

    def row(self, seq_id: int, *, depth: int = 0) -> Mask | None:
        assert depth == 0
        if seq_id != self.seq_id:
            return None
        mask = np.zeros(1 << 13, np.int32)
        mask[self.token_id // 32] = 1 << (self.token_id % 32)
        return mask


def test_masks_that_come_after_the_launch_count(core: EngineCore, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = runner_of(core)
    seen = watch(runner, monkeypatch)
    free = both_ways(runner)
    masked = both_ways(runner, masks=OnlyToken(seq_id=0, token_id=77))
    assert masked.tokens[0].token_id == 77
    assert masked.tokens[1:] == free.tokens[1:]
    both_ways(runner, masks=OnlyToken(seq_id=1, token_id=78))
    both_ways(runner)
    both_ways(runner)
    # A step behind one with masks does not draw ahead.
    assert seen == [True, True, False, False, True]


def test_nothing_is_drawn_for_the_void(core: EngineCore) -> None:
    runner = runner_of(core)
    assert [token.seq_id for token in both_ways(runner, void=frozenset({2})).tokens] == [0, 1, 3]


def test_what_raises_in_the_call_is_computed_in_halves(
    core: EngineCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = runner_of(core)
    expected = both_ways(runner)
    sizes: list[int] = []

    def raising(sequences, *, adapters):
        sizes.append(len(sequences))
        raise MemoryError("no room")

    monkeypatch.setattr(runner._forward.decodes, "run", raising)
    assert both_ways(runner).tokens == expected.tokens
    assert sizes == [len(SEQUENCES)]


@pytest.mark.parametrize(
    "other",
    [
        {"token_ids": [1, 2]},
        {"token_ids": [1, 2], "num_drafts": 1},
        {"samples": ()},
        {"samples": (SampleSpec(0, 0), SampleSpec(1, 0))},
        {"prompt_targets": (1,)},
        {"pooling": Pooling(kind="last")},
    ],
    ids="-".join,
)
def test_steps_of_another_kind_are_left_to_the_general_path(
    core: EngineCore, other: dict[str, object]
) -> None:
    decodes = runner_of(core)._forward.decodes
    assert decodes is not None
    assert decodes.run([decode(0), decode(1, **other)], adapters=()) is None


def test_profiled_steps_are_left_to_the_general_path(core: EngineCore) -> None:
    runner = runner_of(core)
    model = runner.model
    assert isinstance(model, RecordedModel)
    assert runner._forward.decodes is not None
    with model.profiling() as (layers, head):
        both_ways(runner)
        assert sum(layers) > 0
        assert sum(head) > 0


def test_the_time_in_the_programs_is_counted(core: EngineCore) -> None:
    runner = runner_of(core)
    assert isinstance(runner.model, RecordedModel)
    before_s = runner.model.program_seconds
    runner.collect(runner.launch(plan([decode(0)])))
    assert runner.model.program_seconds > before_s
