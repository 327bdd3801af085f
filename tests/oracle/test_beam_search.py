"""Beam search gives the answers of transformers, whatever the width, the penalty and the rule for stopping."""

from pathlib import Path

import pytest
import torch

from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from tests.oracle.checkpoints import tiny_checkpoint

VOCAB = 40
"""Small, so that end tokens come up among the candidates."""
EOS = (2, 17, 23, 31)
PROMPTS = ([3, 14, 15, 32, 25, 35], [7], [9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3])
MAX_TOKENS = 10


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint("llama", tmp_path_factory.mktemp("llama"), vocab_size=VOCAB)


@pytest.fixture(scope="module")
def oracle(path: Path):  # type: ignore[no-untyped-def]
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    model.generation_config.pad_token_id = 0
    return model


def make_core(path: Path, *, num_blocks: int = 128, chunk: int = 64) -> EngineCore:
    return build_core(
        EngineConfig(
            model_path=str(path),
            dtype="float32",
            scheduler=SchedulerConfig(max_num_seqs=12, max_num_batched_tokens=chunk),
            kv=KvConfig(block_size=4, num_blocks=num_blocks),
            max_model_len=32,
            warmup=False,
        )
    )


def run(core: EngineCore, prompts: list[list[int]], params: SamplingParams) -> list[list[TokenDelta]]:
    """For each prompt its deltas."""
    for index, prompt in enumerate(prompts):
        core.add(
            EngineRequest(
                request_id=RequestId(str(index)), prompt_token_ids=prompt, params=params, eos_token_ids=EOS
            )
        )
    deltas: dict[str, list[TokenDelta]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.error is None, delta.error
            deltas.setdefault(delta.request_id, []).append(delta)
    assert core.memory().kv_bytes_owned == 0
    return [deltas[str(index)] for index in range(len(prompts))]


def expected(oracle, prompt: list[int], *, width: int, n: int, **options: object) -> list[list[int]]:  # type: ignore[no-untyped-def]
    with torch.inference_mode():
        out = oracle.generate(
            torch.tensor([prompt]),
            num_beams=width,
            num_return_sequences=n,
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=list(EOS),
            **options,
        )
    answers = []
    for row in out[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(row) if token in EOS]
        answers.append(row[: ends[0]] if ends else row)
    return answers


@pytest.mark.parametrize("width", [2, 4, 7])
@pytest.mark.parametrize("length_penalty", [1.0, 0.0, 2.0, -1.0])
@pytest.mark.parametrize("early_stopping", [False, True, "never"])
def test_the_answers_equal_transformers(path, oracle, width, length_penalty, early_stopping) -> None:  # type: ignore[no-untyped-def]
    n = max(1, width - 1)
    params = SamplingParams(
        n=n,
        best_of=width,
        use_beam_search=True,
        length_penalty=length_penalty,
        early_stopping=early_stopping,
        max_tokens=MAX_TOKENS,
    )
    core = make_core(path)
    for prompt in PROMPTS:
        (deltas,) = run(core, [prompt], params)
        assert [delta.index for delta in deltas] == list(range(n))
        assert [delta.stats is not None for delta in deltas] == [False] * (n - 1) + [True]
        wanted = expected(
            oracle, prompt, width=width, n=n, length_penalty=length_penalty, early_stopping=early_stopping
        )
        assert [list(delta.token_ids) for delta in deltas] == wanted


@pytest.mark.parametrize("num_blocks", [128, 24])
def test_searches_side_by_side_in_chunks_and_under_preemption_find_the_same(
    path: Path, num_blocks: int
) -> None:
    params = SamplingParams(n=3, best_of=4, use_beam_search=True, max_tokens=MAX_TOKENS, logprobs=1)
    alone = [run(make_core(path), [prompt], params)[0] for prompt in PROMPTS]
    together = run(make_core(path, num_blocks=num_blocks, chunk=12), list(PROMPTS), params)
    assert [[d.token_ids for d in deltas] for deltas in together] == [
        [d.token_ids for d in deltas] for deltas in alone
    ]
    for deltas in together:
        for delta in deltas:
            assert [told.sampled.token_id for told in delta.logprobs or ()] == list(delta.token_ids)
            assert all(len(told.top) == 1 for told in delta.logprobs or ())


def test_a_search_that_is_aborted_ends_each_answer_once_and_frees_all(path: Path) -> None:
    core = make_core(path)
    params = SamplingParams(n=2, best_of=4, use_beam_search=True, max_tokens=MAX_TOKENS, ignore_eos=True)
    core.add(EngineRequest(request_id=RequestId("a"), prompt_token_ids=PROMPTS[0], params=params))
    for _ in range(4):
        assert core.step().deltas == []
    core.abort(RequestId("a"))
    assert [(delta.index, delta.finish_reason) for delta in core.step().deltas] == [
        (0, "cancelled"),
        (1, "cancelled"),
    ]
    assert core.memory().kv_bytes_owned == 0
