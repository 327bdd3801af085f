"""Every cell of docs/compatibility.md: each pair of features runs, or is refused with both named."""

from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from penstock import LLM
from penstock.cli.refused import refuse_flags
from penstock.core.errors import InvalidParameterError, PenstockError, StartupError
from penstock.core.text import GenerateRequest, Priority
from penstock.engine.scheduler import drafting
from penstock.engine.scheduler.draft_ledger import DraftLedger
from penstock.server.app import PUBLIC_ROUTES
from penstock.server.validation import validate
from tests.docs.feature_checks import BASE, BEHAVIOURS, Case, check_complete, check_engine_feature
from tests.docs.feature_engines import FeatureEngine, Run
from tools.features import (
    FEATURES,
    NOT_PAIRS,
    POOLED,
    POOLED_FIELDS,
    REFUSED,
    REFUSED_PAIRS,
    Feature,
    PooledFeature,
    RefusedPair,
    pair_id,
    served_pairs,
)

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

    # Drafts are free and never accounted for: every step has as many as it may.
    with patch.object(drafting, "MARGIN", 0.0), patch.object(DraftLedger, "allows", return_value=True):
        yield engine
    for each in made.values():
        each.close()


class AloneRuns:
    """The base request with one request feature, or none, on each engine; run once."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._made: dict[object, tuple[GenerateRequest, Run]] = {}

    def __call__(
        self, engine_names: frozenset[str], name: str | None, *, cut_after: int | None
    ) -> tuple[GenerateRequest, Run]:
        key = (engine_names, name, cut_after)
        if key not in self._made:
            request = BASE
            if name is not None:
                base_run = self(engine_names, None, cut_after=None)[1]
                request = BEHAVIOURS[name].apply(BASE, base_run)
            self._made[key] = (request, self._engines(engine_names).run(request, cut_after=cut_after))
        return self._made[key]


@pytest.fixture(scope="module")
def alone_runs(engines: Engines) -> AloneRuns:
    return AloneRuns(engines)


def _ids(pair: tuple[Feature, Feature]) -> str:
    return pair_id(pair[0].name, pair[1].name)


def _marks(*names: str) -> list[pytest.MarkDecorator]:
    """Triton's interpreter takes seconds a pair: of its pairs `make test-slow` runs all but itself."""
    return [pytest.mark.slow] if "triton" in names and set(names) != {"triton"} else []


@pytest.mark.parametrize(
    "pair",
    [
        pytest.param(pair, id=_ids(pair), marks=_marks(*(each.name for each in pair)))
        for pair in served_pairs()
    ],
)
def test_pair(pair: tuple[Feature, Feature], engines: Engines, alone_runs: AloneRuns) -> None:
    """Both features keep their law when used together."""
    names = frozenset(feature.name for feature in pair)
    engine_names = names & ENGINE_FEATURES
    request_names = [name for name in REQUEST_FEATURES if name in names]
    cut_after = CUT_AFTER if "cancel" in names else None
    first = request_names[0] if request_names else None
    second = request_names[1] if len(request_names) == 2 else None
    request, alone_of_second = alone_runs(engine_names, first, cut_after=cut_after)
    alone_of_first = alone_runs(engine_names, second, cut_after=cut_after)[1]
    if second is not None:
        request = BEHAVIOURS[second].apply(request, alone_of_second)
    engine = engines(engine_names)
    run = engine.run(request, cut_after=cut_after)
    case = Case(request=request, names=names, engine=engine, cut_after=cut_after)
    check_complete(run, case)
    if first is not None:
        BEHAVIOURS[first].check(run, alone_of_first, case)
    if second is not None:
        BEHAVIOURS[second].check(run, alone_of_second, case)
    for name in engine_names:
        check_engine_feature(
            name, run, engines(engine_names - {name}).run(request, cut_after=cut_after), case
        )


def test_the_policy_that_is_not_first_come_first_served_has_another_order(engines: Engines) -> None:
    """So that the law of `fcfs` says something."""
    assert engines(frozenset()).order(BASE) == [Priority.REALTIME, Priority.BATCH]


@pytest.mark.parametrize("pair", REFUSED_PAIRS, ids=lambda pair: pair_id(pair.first, pair.second))
def test_refused_pair(pair: RefusedPair, engines: Engines) -> None:
    """A pair that excludes itself is refused, and the message names both."""
    if {pair.first, pair.second} <= ENGINE_FEATURES:
        with pytest.raises(StartupError) as refused:
            engines(frozenset((pair.first, pair.second)))
        assert all(word in refused.value.message for word in pair.words), refused.value.message
        return
    engine = engines(frozenset())
    request = BEHAVIOURS[pair.second].apply(BEHAVIOURS[pair.first].apply(BASE, Run()), Run())
    with pytest.raises(InvalidParameterError) as caught:
        engine.run(request)
    assert all(word in caught.value.message for word in pair.words), caught.value.message


ON = {
    "reasoning_effort": "low",
    "prompt_embeds": "AAAA",
}
WIRE: dict[str, dict[str, object]] = {
    "streaming": {"stream": True},
    "chat": {},
    "continue": {"continue_final_message": True, "add_generation_prompt": False},
    "n": {"n": 2},
    "logprobs": {"logprobs": True},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "filters": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "rare_filters": {"typical_p": 0.9, "top_n_sigma": 1.0, "xtc_probability": 0.5, "xtc_threshold": 0.2},
    "mirostat": {"mirostat": 2, "mirostat_tau": 4.0, "mirostat_eta": 0.2},
    "dry": {"dry_multiplier": 0.8, "dry_base": 1.5, "dry_allowed_length": 1, "dry_penalty_last_n": 64},
    "bad_words": {"bad_words": ["x"]},
    "allowed_token_ids": {"allowed_token_ids": [5, 6]},
    "best_of": {"best_of": 4},
    "beam_search": {"use_beam_search": True, "best_of": 3, "length_penalty": 0.5, "early_stopping": "never"},
    "penalties": {"presence_penalty": 1.0, "frequency_penalty": 1.0, "repetition_penalty": 1.1},
    "logit_bias": {"logit_bias": {"5": 1.0}},
    "seed": {"seed": 1},
    "stop": {"stop": ["x"]},
    "include_stop": {"stop": ["x"], "include_stop_str_in_output": True},
    "stop_token_ids": {"stop_token_ids": [5]},
    "min_tokens": {"min_tokens": 1},
    "eos": {"ignore_eos": True},
    "echo": {},
    "specials": {"skip_special_tokens": False},
    "priority": {},
    "cache_salt": {"cache_salt": "s"},
    "tools": {"tools": [{"type": "function", "function": {"name": "f"}}]},
    "reasoning": {"include_reasoning": True, "chat_template_kwargs": {"enable_thinking": True}},
    "grammar": {"response_format": {"type": "json_object"}},
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
    with pytest.raises(StartupError, match=refused):
        refuse_flags([f"--{refused.replace('_', '-')}", "2"])


ROUNDING = {
    "eager_bfloat16",
    "native_bfloat16",
    "kv_int8",
    "kv_fp8",
    "int8",
    "int4",
    "fp8",
    "gptq",
    "gguf",
    "sliding_window",
}
"""Engine features under which the model itself is another, or rounded; the others change nothing."""
NOT_A_FIELD = {"chat": "messages", "echo": "echo", "cancel": "stream"}
BODIES: dict[str, dict[str, object]] = {
    "/v1/embeddings": {"input": "a"},
    "/score": {"text_1": "a", "text_2": "b"},
}


@pytest.mark.parametrize(
    "engine_name", [pytest.param(name, marks=_marks(name, "pooled")) for name in sorted(ENGINE_FEATURES)]
)
@pytest.mark.parametrize("pooled", POOLED, ids=lambda pooled: pooled.name)
def test_pooled_feature(pooled: PooledFeature, engine_name: str, engines: Engines) -> None:
    """Beside answers, chunked, preempted, found in the cache: the same vector."""
    made = engines(frozenset({engine_name})).pooled(pooled.name, BASE)
    assert pooled.name == "score" or sum(value * value for value in made) == pytest.approx(1.0)
    if engine_name not in ROUNDING:
        assert made == pytest.approx(engines(frozenset()).pooled(pooled.name, BASE), abs=1e-5)


@pytest.mark.parametrize("pooled", POOLED, ids=lambda pooled: pooled.name)
def test_pooled_routes_refuse_fields_of_answers(pooled: PooledFeature) -> None:
    """By name; of the request features they have those of `POOLED_FIELDS` alone."""
    route = next(route for route in PUBLIC_ROUTES if route.path == pooled.route)
    assert route.body is not None
    for name in REQUEST_FEATURES:
        for field, value in (WIRE[name] or {NOT_A_FIELD.get(name, name): "batch"}).items():
            body = {**BODIES[pooled.route], field: value}
            if name in POOLED_FIELDS:
                validate(route.from_json(body), model=route.body)
                continue
            with pytest.raises(InvalidParameterError) as caught:
                validate(route.from_json(body), model=route.body)
            assert caught.value.param == field


def test_the_table_is_complete() -> None:
    """Every feature has a way to ask for it, and every pair is either run or refused."""
    assert set(BEHAVIOURS) == set(REQUEST_FEATURES) == set(WIRE)
    num_pairs = len(FEATURES) * (len(FEATURES) + 1) // 2
    assert len(served_pairs()) + len(REFUSED_PAIRS) + len(NOT_PAIRS) == num_pairs
    assert not {r.name for r in REFUSED} & {f.name for f in FEATURES}


def test_the_page_is_current() -> None:
    """docs/compatibility.md is what the generator writes now."""
    from tools.compatibility import PAGE, render

    assert Path(PAGE).read_text(encoding="utf-8") == render(), "run make docs"


def test_every_sampling_field_is_in_the_table() -> None:
    """A new field of SamplingParams needs a row."""
    covered = {
        "n", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty",
        "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "min_tokens", "max_tokens",
        "ignore_eos", "logprobs", "prompt_logprobs", "best_of", "typical_p", "top_n_sigma", "xtc_probability",
        "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_penalty_last_n",
        "use_beam_search", "length_penalty", "early_stopping", "dry_sequence_breakers", "mirostat", "mirostat_tau", "mirostat_eta", "bad_words", "allowed_token_ids",
        "include_stop_str_in_output", "skip_special_tokens",
    }  # fmt: skip
    assert set(msgspec.structs.asdict(BASE.params)) == covered
