"""An answer is the same, token for token, with and without speculation, whatever shares its steps."""

import random
from pathlib import Path

import pytest

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig, SpeculativeConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_checkpoint

VOCAB = 11
BLOCK = 4
MAX_LEN = 64
FAMILIES = ("llama", "gemma2")
"""Full attention; and windows in a second cache group."""
NGRAM = SpeculativeConfig(method="ngram", num_speculative_tokens=5, prompt_lookup_min=1)


WHO = ("ngram", "itself", "stranger")
"""The n-gram index; the model as its own draft, which is nearly always right; a draft of other weights."""


def speculation(who: str, family: str, checkpoints: dict[str, Path]) -> SpeculativeConfig:
    if who == "ngram":
        return NGRAM
    path = checkpoints["llama" if who == "itself" and family == "llama" else "stranger"]
    return SpeculativeConfig(method="draft_model", model=str(path), num_speculative_tokens=4)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("spec")
    made = {family: tiny_checkpoint(family, root / family, vocab_size=VOCAB) for family in FAMILIES}
    return made | {"stranger": tiny_checkpoint("llama", root / "stranger", vocab_size=VOCAB, seed=5)}


def make_core(path: Path, speculative: SpeculativeConfig | None, **options: object) -> EngineCore:
    limits = {"max_num_seqs": 6, "max_num_batched_tokens": 40, **options}
    num_blocks = limits.pop("num_blocks", 200)
    config = EngineConfig(
        model_path=str(path),
        dtype="float32",
        kernels="reference",
        scheduler=SchedulerConfig(**limits),
        kv=KvConfig(block_size=BLOCK, num_blocks=num_blocks),
        max_model_len=MAX_LEN,
        speculative=speculative,
        warmup=False,
    )
    core = build_core(config)
    if speculative is not None:
        core.scheduler.cost.observe = lambda *_, **__: None  # drafts cost nothing: as many as can be
        core.scheduler._drafting.ledger.allows = lambda _: True
    return core


def make_requests(seed: int, num: int) -> list[EngineRequest]:
    """Prompts that repeat themselves, and parameters of every kind that draws."""
    rng = random.Random(seed)
    kinds = (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7, top_k=5, top_p=0.9, logprobs=2),
        SamplingParams(temperature=1.0, n=2),
        SamplingParams(temperature=0.3, repetition_penalty=1.2, presence_penalty=0.3),
        SamplingParams(temperature=0.2, min_tokens=6, stop_token_ids=(3,)),
        SamplingParams(temperature=0.0, logit_bias={4: 2.0}, frequency_penalty=0.2),
    )
    requests = []
    for idx in range(num):
        stem = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))]
        params = kinds[idx % len(kinds)]
        changes = {"max_tokens": rng.randint(7, 30), "seed": rng.getrandbits(60)}
        for name, value in changes.items():
            params = type(params)(
                **{**{f: getattr(params, f) for f in params.__struct_fields__}, name: value}
            )
        requests.append(
            EngineRequest(
                request_id=RequestId(str(idx)),
                prompt_token_ids=(stem * 5)[: rng.randint(2, 20)],
                params=params,
                eos_token_ids=(2,),
            )
        )
    return requests


Answers = dict[tuple[str, int], tuple[list[int], list[object], object]]


def answer(core: EngineCore, requests: list[EngineRequest], *, gap: int = 0) -> tuple[Answers, list[int]]:
    """Token ids, logprobs and ending of every answer; and drafts, accepted ones and preemptions."""
    answers: Answers = {}
    counts = [0, 0, 0]
    waiting = list(requests)
    while core.has_work or waiting:
        for request in waiting[: 1 if gap else len(waiting)]:
            core.add(request)
        waiting = waiting[1:] if gap else []
        for _ in range(gap or 1):
            output = core.step()
            counts[0] += output.stats.num_draft_tokens
            counts[1] += sum(output.stats.num_accepted_tokens)
            counts[2] += output.stats.num_preemptions
            for delta in output.deltas:
                assert delta.error is None, delta.error
                tokens, logprobs, _ = answers.get((delta.request_id, delta.index), ([], [], None))
                kept = [*logprobs, *(each.sampled.token_id for each in delta.logprobs or ())]
                answers[delta.request_id, delta.index] = (
                    [*tokens, *delta.token_ids],
                    kept,
                    delta.finish_reason,
                )
    assert core.kv.usage().num_owned == 0
    return answers, counts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("who", WHO)
def test_answers_are_those_without_speculation(checkpoints: dict[str, Path], family: str, who: str) -> None:
    requests = make_requests(1, 6)
    expected, _ = answer(make_core(checkpoints[family], None), requests)
    core = make_core(checkpoints[family], speculation(who, family, checkpoints))
    drafted, (num_drafts, num_accepted, _) = answer(core, requests)
    assert drafted == expected
    assert num_drafts > num_accepted > 0
    if who == "itself" and family == "llama":
        assert num_accepted > 0.8 * num_drafts


@pytest.mark.parametrize("who", WHO[:2])
@pytest.mark.parametrize("family", FAMILIES)
def test_preemption_chunks_prefix_hits_and_late_arrivals_change_nothing(
    checkpoints: dict[str, Path], family: str, who: str
) -> None:
    requests = make_requests(9, 8)
    expected, _ = answer(make_core(checkpoints[family], None), requests)
    num_blocks = 18 if family == "llama" else 26
    speculative = speculation(who, family, checkpoints)
    core = make_core(checkpoints[family], speculative, num_blocks=num_blocks, max_num_batched_tokens=12)
    drafted, (_, num_accepted, num_preemptions) = answer(core, requests, gap=1)
    assert drafted == expected
    assert num_accepted > 0
    assert num_preemptions > 0 or (family, who) != ("llama", "ngram")
    again, _ = answer(core, requests)
    assert again == expected, "again, with a warm prefix tree"


def test_a_request_cancelled_among_drafts_leaves_nothing_and_its_neighbours_alone(
    checkpoints: dict[str, Path],
) -> None:
    requests = make_requests(4, 4)
    expected, _ = answer(make_core(checkpoints["llama"], None), requests)
    core = make_core(checkpoints["llama"], NGRAM)
    for request in requests:
        core.add(request)
    seen = [*core.step().deltas, *core.step().deltas]
    core.abort(RequestId("0"))
    answers: dict[tuple[str, int], list[int]] = {}
    seen += core.scheduler.take_deltas()
    while core.has_work:
        seen += core.step().deltas
    for delta in seen:
        answers.setdefault((delta.request_id, delta.index), []).extend(delta.token_ids)
    for key, (tokens, _, _) in expected.items():
        got = answers.get(key, [])
        assert got == (tokens[: len(got)] if key[0] == "0" else tokens)
    assert core.kv.usage().num_owned == 0
