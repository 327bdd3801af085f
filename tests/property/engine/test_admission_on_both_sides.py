"""What the API side refuses by `EngineInfo` is what the engine refuses: the same limits, the same verdict."""

import random
from pathlib import Path

import pytest

from penstock.core.errors import InvalidParameterError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.scheduler.admission import check_admissible, limits_from_info
from tests.oracle.checkpoints import tiny_checkpoint

VOCAB = 97
NUM_REQUESTS = 300


def make_core(family: str, root: Path) -> EngineCore:
    config = EngineConfig(
        model_path=str(tiny_checkpoint(family, root / family, vocab_size=VOCAB)),
        dtype="float32",
        kernels="reference",
        scheduler=SchedulerConfig(max_num_seqs=3, max_num_batched_tokens=16),
        kv=KvConfig(block_size=4, num_blocks=24),
        max_model_len=40,
        warmup=False,
    )
    return build_core(config)


def random_request(rng: random.Random) -> EngineRequest:
    """Around every limit: length, seats, blocks, vocabulary, parameters."""
    length = rng.choice((0, 1, 8, 20, 39, 40, 41))
    token_ids = [rng.randrange(VOCAB) for _ in range(length)]
    if token_ids and rng.random() < 0.2:
        token_ids[-1] = rng.choice((-1, VOCAB - 1, VOCAB, 2**32))
    params = SamplingParams(
        n=rng.choice((1, 1, 2, 3, 4)),
        max_tokens=rng.choice((None, 0, 1, 2, 12, 20, 32, 39, 40)),
        temperature=rng.choice((1.0, 1.0, 1.0, -1.0)),
        stop_token_ids=rng.choice(((), (), (VOCAB - 1,), (VOCAB,))),
        logit_bias=rng.choice(({}, {VOCAB - 1: 1.0}, {VOCAB: 1.0})),
    )
    return EngineRequest(request_id=RequestId("r"), prompt_token_ids=token_ids, params=params)


def api_verdict(core: EngineCore, request: EngineRequest) -> tuple[str, str | None, str] | None:
    try:
        check_admissible(request, limits=limits_from_info(core.info))
    except InvalidParameterError as error:
        return (error.code, error.param, error.message)
    return None


def engine_verdict(core: EngineCore, request: EngineRequest) -> tuple[str, str | None, str] | None:
    try:
        core.add(request)
    except InvalidParameterError as error:
        return (error.code, error.param, error.message)
    core.abort(request.request_id)
    core.step()
    return None


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_both_sides_of_the_process_boundary_give_the_same_verdict(family: str, tmp_path: Path) -> None:
    core = make_core(family, tmp_path)
    rng = random.Random(family)
    verdicts = []
    for _ in range(NUM_REQUESTS):
        request = random_request(rng)
        verdict = api_verdict(core, request)
        assert verdict == engine_verdict(core, request), request
        verdicts.append(verdict)
    refused = {verdict[1] for verdict in verdicts if verdict is not None}
    assert verdicts.count(None) > NUM_REQUESTS // 20
    assert {"prompt", "max_tokens", "n", "temperature"} <= refused
