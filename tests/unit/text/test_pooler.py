"""Vectors and scores over a scripted engine: what is asked of it, what is refused, how every request ends."""

import asyncio
import math

import msgspec
import pytest

from penstock.core.errors import (
    CheckpointError,
    GenerateError,
    InvalidParameterError,
    QueueFullError,
    StartupError,
)
from penstock.core.params import SamplingParams
from penstock.core.pooled import ClassifyRequest, EmbedRequest, ScoreRequest
from penstock.core.text import FinishReason
from penstock.core.tokens import ErrorInfo, Pooling, TokenDelta
from penstock.text.chat_template import ChatTemplate
from penstock.text.pooling_config import PoolingConfig, read_pooling
from penstock.text.service import TextService
from tests.unit.text.scripted_engine import STATS, ScriptedEngine, Sink, TickingClock, make_info
from tests.unit.text.template_samples import CHATML
from tests.unit.text.tiny_vocabularies import make_tokenizer

TOKENIZER = make_tokenizer("byte-level")
WORDS = PoolingConfig(pooling="mean", score_yes_token="y", score_no_token="n")


def pooled(*values):
    return TokenDelta("r", 0, finish_reason=FinishReason.STOP, stats=STATS, pooled=values)


def make_service(*script, labels=(), template=None, config=WORDS):
    info = msgspec.structs.replace(make_info(max_model_len=16), hidden_size=4, labels=labels)
    engine, sink = ScriptedEngine(script, info=info), Sink()
    service = TextService(
        engine, TOKENIZER, template, name="m", events=sink, clock=TickingClock(), pooling=config
    )
    return service, engine, sink


def embed_request(prompt="hello world", **fields):
    return EmbedRequest(request_id="r", model="m", prompt=prompt, **fields)


def ids_of(text):
    return TOKENIZER.encode(text, add_special_tokens=True)


async def test_a_vector_has_length_1_and_its_request_one_record():
    service, engine, sink = make_service(pooled(3.0, 4.0, 0.0, 0.0))
    made = await service.embed(embed_request())
    assert made.values == (0.6, 0.8, 0.0, 0.0)
    assert (made.usage.prompt_tokens, made.usage.completion_tokens, made.usage.cached_tokens) == (3, 0, 2)
    (asked,) = engine.requests
    assert (asked.pooling, asked.params) == (Pooling("mean"), SamplingParams(max_tokens=0))
    assert asked.prompt_token_ids == ids_of("hello world")
    (record,) = sink.records
    assert (record.finish_reason, record.prompt_tokens, record.ttft_s) == (FinishReason.STOP, 3, None)
    assert record.is_accepted
    assert engine.num_closed == 1


async def test_a_vector_is_cut_before_it_is_scaled_and_left_as_it_is_if_asked():
    service, _, _ = make_service(pooled(3.0, 4.0, 12.0, 0.0), pooled(3.0, 4.0, 12.0, 0.0), pooled(0.0, 0.0))
    assert (await service.embed(embed_request(dimensions=2))).values == (0.6, 0.8)
    assert (await service.embed(embed_request(dimensions=3, normalize=False))).values == (3.0, 4.0, 12.0)
    assert (await service.embed(embed_request())).values == (0.0, 0.0)


@pytest.mark.parametrize(
    ("fields", "param", "number"),
    [
        ({"dimensions": 5}, "dimensions", "4"),
        ({"dimensions": 0}, "dimensions", "4"),
        ({"prompt": (1,) * 17}, "input.3", "16"),
        ({"prompt": "hello " * 40}, "input.3", "16"),
        ({"prompt": (1, 500)}, "input.3", "499"),
        ({"prompt": ""}, "input.3", "empty"),
        ({"truncate_prompt_tokens": 17}, "truncate_prompt_tokens", "16"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "16"),
    ],
)
async def test_what_is_wrong_is_refused_by_the_clients_own_word(fields, param, number):
    service, engine, sink = make_service()
    with pytest.raises(InvalidParameterError) as caught:
        await service.embed(embed_request(**{"prompt": "x", **fields}, field="input.3"))
    assert caught.value.param == param
    assert number in caught.value.message
    assert engine.requests == []
    assert [record.finish_reason for record in sink.records] == [FinishReason.ERROR]


@pytest.mark.parametrize(
    ("prompt", "limit", "expected"),
    [
        ("hello world", 2, ids_of("hello world")[:2]),
        ("hello world", -1, ids_of("hello world")),
        ("hello " * 40, -1, ids_of("hello " * 40)[:16]),
        ((5, 6, 7), 2, [5, 6]),
        ((5,) * 99, -1, [5] * 16),
    ],
)
async def test_a_prompt_is_cut_at_its_end_if_asked(prompt, limit, expected):
    service, engine, _ = make_service(pooled(1.0))
    await service.embed(embed_request(prompt, truncate_prompt_tokens=limit))
    assert engine.requests[0].prompt_token_ids == expected


def test_a_cut_keeps_what_the_tokenizer_adds_at_the_end():
    tokenizer = make_tokenizer("byte-level")
    tokenizer._backend.post_processor = type(tokenizer._backend.post_processor)(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    whole = tokenizer.encode("hello world, the fox", add_special_tokens=True)
    cut = tokenizer.encode_cut("hello world, the fox", limit=4, add_special_tokens=True, param="p")
    assert cut == [*whole[:3], 2]
    assert tokenizer.encode_cut("hello", limit=9, add_special_tokens=True, param="p")[-1] == 2
    assert tokenizer.encode_pair("a", "b", param="p").count(2) == 2


async def test_cancelling_the_call_closes_the_engines_stream():
    service, engine, sink = make_service(None)
    task = asyncio.create_task(service.embed(embed_request()))
    for _ in range(20):
        await asyncio.sleep(0)
    assert engine.num_played == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert engine.num_closed == 1
    assert [record.finish_reason for record in sink.records] == [FinishReason.CANCELLED]


@pytest.mark.parametrize(
    ("script", "refusal", "error"),
    [
        (
            [TokenDelta("r", 0, error=ErrorInfo("GenerateError", "nan", "numerical_error"))],
            None,
            GenerateError,
        ),
        ([], None, GenerateError),
        ([RuntimeError("x")], None, GenerateError),
        ([], QueueFullError("full"), QueueFullError),
    ],
)
async def test_a_failure_is_told_once(script, refusal, error):
    service, engine, sink = make_service(*script)
    engine.refusal = refusal
    with pytest.raises(error):
        await service.embed(embed_request())
    (record,) = sink.records
    assert record.finish_reason is FinishReason.ERROR
    assert record.is_accepted is (refusal is None)


async def test_a_score_is_the_softmax_over_no_and_yes_in_the_models_own_template():
    template = ChatTemplate({"default": CHATML}, special_tokens={})
    service, engine, _ = make_service(pooled(1.0, 3.0), pooled(0.0, 0.0), template=template)
    engine.info = msgspec.structs.replace(engine.info, max_model_len=4096)
    try:
        made = await service.score(ScoreRequest(request_id="r", model="m", query="q?", document="d!"))
        await service.score(
            ScoreRequest(request_id="r", model="m", query="q?", document="e", instruction="i")
        )
    finally:
        await service.close()
    assert made.value == pytest.approx(1 / (1 + math.exp(-2.0)))
    no, yes = (TOKENIZER.encode(word, add_special_tokens=False)[0] for word in "ny")
    assert engine.requests[0].pooling == Pooling("logits", (no, yes))
    first, second = (TOKENIZER.decode(asked.prompt_token_ids) for asked in engine.requests)
    assert "<Query>: q?\n<Document>: d!<|im_end|>\n<|im_start|>assistant\n" in first
    assert '"y" or "n"' in first
    assert "<Instruct>: i\n<Query>: q?\n<Document>: e<|im_end|>" in second


@pytest.mark.parametrize(
    ("logits", "expected"), [((0.0,), 0.5), ((800.0,), 1.0), ((-800.0,), 0.0), ((800.0, 0.0), 0.0)]
)
async def test_a_classifier_scores_by_its_last_class_without_overflow(logits, expected):
    labels = ("a", "b")[: len(logits)]
    service, engine, _ = make_service(pooled(*logits), pooled(*logits), labels=labels)
    made = await service.score(ScoreRequest(request_id="r", model="m", query="a", document="b"))
    assert made.value == pytest.approx(expected)
    classes = await service.classify(ClassifyRequest(request_id="r", model="m", prompt="a"))
    assert (classes.labels, classes.probabilities[-1]) == (labels, pytest.approx(expected))
    assert {asked.pooling.kind for asked in engine.requests} == {"classify"}


@pytest.mark.parametrize(("labels", "ask"), [((), "classify"), (("a", "b", "c"), "score"), ((), "score")])
async def test_what_a_model_cannot_do_is_refused_by_name(labels, ask):
    service, engine, sink = make_service(labels=labels)
    request = (
        ClassifyRequest(request_id="r", model="m", prompt="a")
        if ask == "classify"
        else ScoreRequest(request_id="r", model="m", query="a", document="b")
    )
    with pytest.raises(InvalidParameterError):
        await getattr(service, ask)(request)
    assert engine.requests == []
    assert len(sink.records) == 1


async def test_words_of_several_tokens_are_refused_at_start_if_an_operator_wrote_them_else_when_asked():
    config = PoolingConfig(score_yes_token="hello hello")
    with pytest.raises(StartupError, match="score_yes_token") as refused:
        make_service(config=config)
    assert refused.value.param == "score_yes_token"
    service, _, _ = make_service(config=PoolingConfig())
    with pytest.raises(InvalidParameterError, match="one token"):
        await service.score(ScoreRequest(request_id="r", model="m", query="a", document="b"))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "last"),
        ('{"word_embedding_dimension": 4}', "last"),
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_cls_token": false}', "mean"),
        ('{"pooling_mode_lasttoken": true}', "last"),
        ('{"pooling_mode_cls_token": true}', None),
        ('{"pooling_mode_mean_tokens": true, "pooling_mode_lasttoken": true}', None),
    ],
)
def test_a_checkpoint_says_how_it_was_trained(tmp_path, content, expected):
    if content is not None:
        (tmp_path / "1_Pooling").mkdir()
        (tmp_path / "1_Pooling" / "config.json").write_text(content)
    if expected is not None:
        assert read_pooling(tmp_path) == expected
        return
    with pytest.raises(CheckpointError, match="pooling_mode"):
        read_pooling(tmp_path)
