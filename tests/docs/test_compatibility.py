"""Every cell of docs/compatibility.md: each pair of features runs, or is refused with both named."""

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from penstock import LLM
from penstock.cli.refused import refuse_flags
from penstock.core.errors import InvalidParameterError, PenstockError, StartupError
from penstock.server.app import PUBLIC_ROUTES
from penstock.server.validation import validate
from tests.docs.feature_checks import BASE, BEHAVIOURS, Case, _complete, check_engine_feature
from tests.docs.feature_engines import FeatureEngine, Run
from tools.features import FEATURES, REFUSED, REFUSED_PAIRS, Feature, RefusedPair, pair_id, served_pairs

Engines = Callable[[frozenset[str]], FeatureEngine]
ENGINE_FEATURES = frozenset(feature.name for feature in FEATURES if feature.kind == "engine")
REQUEST_FEATURES = [feature.name for feature in FEATURES if feature.kind == "request"]
CUT_AFTER = 3


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engines]:
    made: dict[frozenset[str], FeatureEngine] = {}

    def engine(features: frozenset[str]) -> FeatureEngine:
        if features not in made:
            made[features] = FeatureEngine(tmp_path_factory.mktemp("model"), features)
        return made[features]

    yield engine
    for each in made.values():
        each.close()


@pytest.fixture(scope="module")
def plain_runs(engines: Engines) -> Callable[[frozenset[str]], Run]:
    """The base request on an engine, run once."""
    made: dict[frozenset[str], Run] = {}

    def run(features: frozenset[str]) -> Run:
        if features not in made:
            made[features] = engines(features).run(BASE)
        return made[features]

    return run


def _ids(pair: tuple[Feature, Feature]) -> str:
    return pair_id(pair[0].name, pair[1].name)


@pytest.mark.parametrize("pair", served_pairs(), ids=_ids)
def test_pair(
    pair: tuple[Feature, Feature], engines: Engines, plain_runs: Callable[[frozenset[str]], Run]
) -> None:
    """Both features keep their law when used together."""
    names = frozenset(feature.name for feature in pair)
    engine_names, request_names = names & ENGINE_FEATURES, [n for n in REQUEST_FEATURES if n in names]
    engine = engines(engine_names)
    cut_after = CUT_AFTER if "cancel" in names else None
    request, alone = BASE, plain_runs(engine_names)
    alones: dict[str, Run] = {}
    for name in request_names:
        alones[name] = alone
        request = BEHAVIOURS[name].apply(request, alone)
        alone = engine.run(request, cut_after=cut_after)
    if len(request_names) == 2:  # the first one's law compares with the second alone
        other = BEHAVIOURS[request_names[1]].apply(BASE, plain_runs(engine_names))
        alones[request_names[0]] = engine.run(other, cut_after=cut_after)
    run = engine.run(request, cut_after=cut_after)
    case = Case(request=request, names=names, engine=engine, cut_after=cut_after)
    _complete(run, case)
    for name in request_names:
        BEHAVIOURS[name].check(run, alones[name], case)
    for name in engine_names:
        plain = engines(engine_names - {name}).run(request, cut_after=cut_after)
        check_engine_feature(name, run, plain, case)


@pytest.mark.parametrize("pair", REFUSED_PAIRS, ids=lambda pair: pair_id(pair.first, pair.second))
def test_refused_pair(pair: RefusedPair, engines: Engines) -> None:
    """A pair that excludes itself is refused, and the message names both."""
    engine = engines(frozenset())
    request = BEHAVIOURS[pair.second].apply(BEHAVIOURS[pair.first].apply(BASE, Run()), Run())
    with pytest.raises(InvalidParameterError) as caught:
        engine.run(request)
    assert all(word in caught.value.message for word in pair.words), caught.value.message


ON = {
    "response_format": {"type": "json_object"},
    "guided_json": {"type": "object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "reasoning_effort": "low",
    "prompt_logprobs": 1,
    "use_beam_search": True,
    "prompt_embeds": "AAAA",
}
WIRE: dict[str, dict[str, object]] = {
    "streaming": {"stream": True},
    "chat": {},
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "filters": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"5": 1.0}},
    "seed": {"seed": 1},
    "stop": {"stop": ["x"]},
    "stop_token_ids": {"stop_token_ids": [5]},
    "min_tokens": {"min_tokens": 1},
    "eos": {"ignore_eos": True},
    "echo": {},
    "priority": {},
    "cache_salt": {"cache_salt": "s"},
    "cancel": {},
}


@pytest.mark.parametrize("name", REQUEST_FEATURES)
@pytest.mark.parametrize("refused", [r.name for r in REFUSED if r.kind == "request"])
def test_refused_request_feature(refused: str, name: str) -> None:
    """What is not served yet is refused by its name, whatever else the request asks for."""
    route = next(route for route in PUBLIC_ROUTES if route.path == "/v1/chat/completions")
    assert route.body is not None
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **WIRE[name]}
    validate(route.from_json(dict(body)), model=route.body)
    with pytest.raises(PenstockError) as caught:
        validate(route.from_json({**body, refused: ON[refused]}), model=route.body)
    assert refused in caught.value.message
    assert caught.value.param is not None
    assert caught.value.param.startswith(refused)


@pytest.mark.parametrize("refused", [r.name for r in REFUSED if r.kind == "engine"])
def test_refused_engine_feature(refused: str) -> None:
    """What the engine does not have is refused by name, by the command line and by `LLM` alike."""
    with pytest.raises(StartupError, match=refused):
        LLM(**{refused: 2})
    if refused != "tensor_parallel_size":  # that one is a setting with the range 1 to 1
        with pytest.raises(StartupError, match=refused):
            refuse_flags([f"--{refused.replace('_', '-')}", "2"])


def test_the_table_is_complete() -> None:
    """Every feature has a way to ask for it, and every pair is either run or refused."""
    assert set(BEHAVIOURS) == set(REQUEST_FEATURES) == set(WIRE)
    num_pairs = len(FEATURES) * (len(FEATURES) + 1) // 2
    assert len(served_pairs()) + len(REFUSED_PAIRS) == num_pairs
    assert not {r.name for r in REFUSED} & {f.name for f in FEATURES}


def test_the_page_is_current() -> None:
    """docs/compatibility.md is what the generator writes now."""
    from tools.compatibility import PAGE, render

    assert Path(PAGE).read_text(encoding="utf-8") == render(), "run make docs"


def test_every_sampling_field_is_in_the_table() -> None:
    """A new field of SamplingParams needs a row, or to be of no concern to any other feature."""
    of_the_text_alone = {"include_stop_str_in_output", "skip_special_tokens"}  # tests/unit/text
    covered = {
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens", "max_tokens",
        "ignore_eos", "logprobs",
    }  # fmt: skip
    assert set(msgspec.structs.asdict(BASE.params)) == covered | of_the_text_alone
