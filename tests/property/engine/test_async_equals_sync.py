"""Every answer is, delta by delta, the one without asynchrony, whatever shares its steps and however they end."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import RequestId, SequenceId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, TokenLogprobs
from penstock.core.tokens import EngineRequest, Pooling
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, LoraConfig, LoraModule, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.runner.overlapped_rank import OverlappedRank
from penstock.engine.scheduler.plan import PENDING_TOKEN
from tests.docs.tiny_model import VOCAB_SIZE, make_tiny_adapter, make_tiny_model

MAX_LEN = 48
DIGITS = GrammarSpec(kind=GrammarKind.REGEX, source="[0-9]{2}(ABC|DEFGH)[0-9]{1,4}")
"""Tokens that are drawn, tokens that are forced, and an end that the grammar decides."""
EOS = tuple(range(3, VOCAB_SIZE, 30))
KINDS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "logprobs": 2},
    {"temperature": 1.0, "n": 3},
    {"temperature": 0.4, "repetition_penalty": 1.2, "presence_penalty": 0.3, "stop_token_ids": (11, 12)},
    {"temperature": 1.0, "min_tokens": 6, "stop_token_ids": (7, 8, 9)},
    {"temperature": 1.0, "mirostat": 2, "logprobs": 0},
    {
        "temperature": 0.0,
        "frequency_penalty": 0.9,
        "dry_multiplier": 0.8,
        "dry_base": 1.75,
        "ignore_eos": True,
    },
    {"temperature": 1.0, "repetition_penalty": 1.1, "grammar": DIGITS, "logprobs": 1},
    {"temperature": 0.0, "grammar": DIGITS, "n": 2},
    {"temperature": 0.0, "use_beam_search": True, "n": 2},
    {"temperature": 0.9, "prompt_logprobs": 1},
    {"pooling": Pooling("mean")},
)
Told = tuple[list[int], list[TokenLogprobs], FinishReason | None, int | None, str | None]
"""Of one answer: tokens, logprobs, and how it ended."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("async")
    make_tiny_model(path / "model")
    make_tiny_model(path / "window", window=6)
    make_tiny_adapter(path / "adapter")
    return path


class Faults:
    """Fails for some sequences, in the way it is told."""

    def __init__(self, kind: str, culprits: Sequence[int]) -> None:
        self.kind = kind
        self.culprits = frozenset(SequenceId(each) for each in culprits)

    def _raise_if(self, kind: str, seq_ids: Sequence[SequenceId]) -> None:
        if self.kind == kind and self.culprits & set(seq_ids):
            raise RuntimeError("a fault of the test")

    def before_forward(self, seq_ids: Sequence[SequenceId]) -> None:
        self._raise_if("forward", seq_ids)

    def after_logits(self, logits: torch.Tensor, seq_ids: Sequence[SequenceId]) -> None:
        if self.kind == "nan":
            for row, seq_id in enumerate(seq_ids):
                if seq_id in self.culprits:
                    logits[row] = float("nan")

    def before_sample(self, seq_ids: Sequence[SequenceId]) -> None:
        self._raise_if("sample", seq_ids)


class Shortage(Faults):
    """Now and then there is no memory for a pass, or for draws; alone everybody gets what it needs."""

    def __init__(self, seed: int) -> None:
        super().__init__("", ())
        self._rng = random.Random(seed)
        self.num_times = 0

    def _try(self, seq_ids: Sequence[SequenceId], chance: float) -> None:
        if self._rng.random() < chance and (len(seq_ids) > 1 or self.num_times % 3 == 0):
            self.num_times += 1
            raise torch.OutOfMemoryError("a shortage of the test")

    def before_forward(self, seq_ids: Sequence[SequenceId]) -> None:
        self._try(seq_ids, 0.2)

    def before_sample(self, seq_ids: Sequence[SequenceId]) -> None:
        self._try(seq_ids, 0.1)


def make_core(folder: Path, *, is_async: bool, faults: Faults | None = None, **options: Any) -> EngineCore:
    limits = {"max_num_seqs": 5, "max_num_batched_tokens": 24, "step_time_target_ms": 10_000.0, **options}
    model = limits.pop("model", "model")
    num_blocks = limits.pop("num_blocks", 200)
    adapters = (LoraModule(name="adapter", path=str(folder / "adapter")),)
    config = EngineConfig(
        model_path=str(folder / model),
        dtype="float32",
        kernels="reference",
        scheduler=SchedulerConfig(async_scheduling=is_async, **limits),
        kv=KvConfig(block_size=4, num_blocks=num_blocks),
        lora=LoraConfig(enable_lora=True, modules=adapters, max_loras=1),
        max_model_len=MAX_LEN,
        num_threads=1,
        warmup=False,
    )
    return build_core(config, faults=faults)


def make_requests(seed: int, num: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    stems = [[rng.randrange(3, VOCAB_SIZE) for _ in range(12)] for _ in range(2)]
    requests = []
    for idx in range(num):
        kind = dict(KINDS[(idx + seed) % len(KINDS)])
        grammar, pooling = kind.pop("grammar", None), kind.pop("pooling", None)
        asked = {"max_tokens": rng.choice((1, 2, 5, 12, 24)), "seed": rng.getrandbits(60), **kind}
        asked["min_tokens"] = min(asked.get("min_tokens", 0), asked["max_tokens"])
        prompt = [*rng.choice(stems)[: rng.randint(1, 12)], rng.randrange(3, VOCAB_SIZE)]
        requests.append(
            EngineRequest(
                request_id=RequestId(str(idx)),
                prompt_token_ids=prompt,
                params=SamplingParams(max_tokens=0) if pooling else SamplingParams(**asked),
                eos_token_ids=EOS,
                grammar=grammar,
                pooling=pooling,
                adapter=rng.choice(("", "", "adapter")),
            )
        )
    return requests


def run(
    core: EngineCore, requests: Sequence[EngineRequest], *, aborts: dict[int, str] | None = None
) -> dict[tuple[str, int], Told]:
    """What was told of each answer; checks that each request ends once and that nothing comes after."""
    told: dict[tuple[str, int], Told] = {}
    is_over: set[str] = set()
    to_come = list(reversed(requests))
    step = 0
    while to_come or core.has_work:
        for _ in range(2):
            if to_come:
                core.add(to_come.pop())
        if aborts and step in aborts:
            core.abort(RequestId(aborts[step]))
        step += 1
        for delta in core.step().deltas:
            assert delta.request_id not in is_over, "a delta after the last"
            tokens, logprobs, reason, *_ = told.get((delta.request_id, delta.index), ([], [], None))
            assert reason is None, "an answer went on after its end"
            assert (
                not delta.is_last
                or delta.stats is None
                or delta.stats.num_generated_tokens
                == sum(len(one[0]) for (name, _), one in told.items() if name == delta.request_id)
                + len(delta.token_ids)
            ), "what is billed is what was streamed"
            told[delta.request_id, delta.index] = (
                [*tokens, *delta.token_ids],
                [*logprobs, *(delta.logprobs or ())],
                delta.finish_reason,
                delta.stop_token_id,
                delta.error.code if delta.error else None,
            )
            if delta.is_last:
                is_over.add(delta.request_id)
        usage = core.kv.usage()
        assert usage.num_free + usage.num_cached + usage.num_owned == usage.num_blocks
    assert is_over == {request.request_id for request in requests}
    assert core.kv.usage().num_owned == 0
    assert len(core.under_way) <= 1
    core.ranks.close()
    return told


def pending_tokens(core: EngineCore) -> Iterator[int]:
    """Count, from here on, the decodes that were planned before their token was known."""
    counts = [0]
    schedule = core.scheduler.schedule

    def counting() -> Any:
        plan = schedule()
        counts[0] += sum(entry.token_ids == [PENDING_TOKEN] for entry in plan.sequences)
        return plan

    core.scheduler.schedule = counting  # type: ignore[method-assign]  # a test looks on
    while True:
        yield counts[0]


@pytest.mark.parametrize(
    ("seed", "options"),
    [
        (0, {}),
        (1, {"num_blocks": 24}),
        (2, {"enable_prefix_caching": False, "max_num_batched_tokens": 7}),
        (3, {"model": "window"}),
        (4, {"enable_jump_forward": False, "policy": "fcfs"}),
    ],
    ids=lambda value: "-".join(value) or "plain" if isinstance(value, dict) else None,
)
def test_answers_are_those_without_asynchrony(folder: Path, seed: int, options: dict[str, Any]) -> None:
    requests = make_requests(seed, 14)
    core = make_core(folder, is_async=True, **options)
    assert isinstance(core.ranks, OverlappedRank)
    pending = pending_tokens(core)
    next(pending)
    expected = run(make_core(folder, is_async=False, **options), requests)
    assert run(core, requests) == expected
    assert next(pending) > 20, "the test does not test asynchrony"


@pytest.mark.parametrize("seed", [5, 6])
def test_who_leaves_gets_a_beginning_and_nobody_else_notices(folder: Path, seed: int) -> None:
    requests = make_requests(seed, 14)
    rng = random.Random(seed)
    expected = run(make_core(folder, is_async=False), requests)
    leaving = rng.sample(range(14), 6)
    aborts = {step: str(idx) for step, idx in zip(rng.sample(range(1, 20), 6), leaving, strict=True)}
    got = run(make_core(folder, is_async=True, num_blocks=24), requests, aborts=aborts)
    for key, (tokens, *rest) in got.items():
        if rest[1] is FinishReason.CANCELLED:
            assert tokens == expected[key][0][: len(tokens)]
        else:
            assert (tokens, *rest) == expected[key]


@pytest.mark.parametrize("kind", ["nan", "forward", "sample"])
def test_who_fails_fails_alone_though_it_is_in_two_steps(folder: Path, kind: str) -> None:
    requests = [each for each in make_requests(7, 14) if each.pooling is None]
    expected = run(make_core(folder, is_async=False), requests)
    culprits = (2, 9, 10)
    got = run(make_core(folder, is_async=True, faults=Faults(kind, culprits)), requests)
    failed = {name for (name, _), one in got.items() if one[2] is FinishReason.ERROR}
    assert failed
    assert len(failed) <= len(culprits)
    assert {key: one for key, one in got.items() if key[0] not in failed} == {
        key: one for key, one in expected.items() if key[0] not in failed
    }


@pytest.mark.parametrize("seed", [8, 9])
def test_who_lacks_memory_is_computed_again_and_says_the_same(folder: Path, seed: int) -> None:
    requests = make_requests(seed, 14)
    expected = run(make_core(folder, is_async=False), requests)
    shortage = Shortage(seed)
    assert run(make_core(folder, is_async=True, faults=shortage), requests) == expected
    assert shortage.num_times > 3
