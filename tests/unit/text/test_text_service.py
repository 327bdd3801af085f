"""The text service over a scripted engine: what it refuses, what it streams, and how every request ends."""

import asyncio
import contextlib
import logging
import time

import pytest

from penstock.core.errors import (
    EngineDeadError,
    EngineError,
    GenerateError,
    InvalidParameterError,
    PenstockError,
    QueueFullError,
)
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, GenerateRequest, Message, TokenLogprob, TokenLogprobs, Usage
from penstock.core.tokens import ErrorInfo
from penstock.text.chat_template import ChatTemplate
from penstock.text.service import TextService
from tests.unit.text.scripted_engine import STATS, ScriptedEngine, Sink, TickingClock, last, make_info, tokens
from tests.unit.text.tiny_vocabularies import make_tokenizer

TOKENIZER = make_tokenizer("byte-level")
LLAMA = make_tokenizer("llama")


def ids_of(text, tokenizer=TOKENIZER):
    return tokenizer.encode(text, add_special_tokens=False)


def one_by_one(text, *, index=0):
    return [tokens([token_id], index=index) for token_id in ids_of(text)]


def make_service(script=(), *, template=None, info=None, tokenizer=TOKENIZER):
    engine, sink = ScriptedEngine(script, info=info), Sink()
    service = TextService(
        engine, tokenizer, template, name="m", events=sink, clock=TickingClock(), root="tiny"
    )
    return service, engine, sink


DEFAULTS = SamplingParams()


def make_request(prompt="hello", *, params=DEFAULTS, **fields):
    return GenerateRequest(request_id="r", model="m", prompt=prompt, params=params, **fields)


async def collect(service, request):
    return [delta async for delta in await service.generate(request)]


def text_of(deltas, index=0):
    return "".join(delta.text for delta in deltas if delta.index == index)


async def test_text_streams_token_by_token_and_the_last_delta_alone_has_usage():
    service, engine, sink = make_service([*one_by_one("hello world"), last()])
    deltas = await collect(service, make_request())
    assert [delta.text for delta in deltas] == ["hello", " world", ""]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.STOP]
    assert [delta.usage for delta in deltas[:-1]] == [None, None]
    assert deltas[-1].usage == Usage(prompt_tokens=2, completion_tokens=2, cached_tokens=2)
    assert deltas[-1].stop_reason is None
    assert (len(sink.records), engine.num_closed) == (1, 1)


async def test_the_record_holds_the_engines_figures_and_the_clients_times():
    service, _, sink = make_service([*one_by_one("hello world"), last()])
    await collect(service, make_request(arrival_s=100.0))
    (record,) = sink.records
    assert (record.request_id, record.model, record.tenant_id) == ("r", "m", "default")
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (2, 2, 2)
    assert (record.finish_reason, record.error_code) == (FinishReason.STOP, None)
    assert (record.queue_wait_s, record.batch_size, record.kv_usage, record.num_preemptions) == (
        0.25,
        4,
        0.5,
        1,
    )
    assert (record.ttft_s, record.e2e_s, record.inference_s) == (1.0, 3.0, 2.5)
    assert record.tokens_per_s == pytest.approx(2 / 3)
    assert sink.gaps_s == [1.0]


@pytest.mark.parametrize("n", [1, 2, 3])
async def test_time_per_output_token_is_that_of_one_answer_however_many_there_are(n):
    """The clock ticks at each token of any answer, so an answer's tokens are n seconds apart."""
    steps = [one_by_one("hello world the", index=index) for index in range(n)]
    script = [delta for step in zip(*steps, strict=True) for delta in step]
    service, _, sink = make_service([*script, *(last(index=index) for index in range(n))])
    await collect(service, make_request(arrival_s=100.0, params=SamplingParams(n=n)))
    assert [record.tpot_s for record in sink.records] == [n]


async def test_an_answer_of_one_token_has_no_time_per_output_token():
    service, _, sink = make_service([*one_by_one("hello"), last()])
    await collect(service, make_request())
    assert [record.tpot_s for record in sink.records] == [None]


async def test_the_record_bears_the_id_that_the_client_knows():
    service, engine, sink = make_service([last()])
    await collect(service, make_request(client_request_id="theirs"))
    assert [record.request_id for record in sink.records] == ["theirs"]
    assert [request.request_id for request in engine.requests] == ["r"]


@pytest.mark.parametrize(
    ("prompt", "refusal", "is_accepted"),
    [("hello", None, True), ("", None, False), ("hello", QueueFullError("full"), False)],
)
async def test_the_record_tells_whether_the_engine_accepted_the_request(prompt, refusal, is_accepted):
    service, engine, sink = make_service([last()])
    engine.refusal = refusal
    with contextlib.suppress(PenstockError):
        await collect(service, make_request(prompt))
    assert [record.is_accepted for record in sink.records] == [is_accepted]


async def test_the_engine_gets_resolved_parameters():
    service, engine, _ = make_service([last()])
    await collect(service, make_request("hello", cache_salt="s", tenant_id="t", priority=0))
    (request,) = engine.requests
    assert request.prompt_token_ids == [1, *ids_of("hello")]
    assert request.max_tokens == 64 - 2
    assert request.eos_token_ids == (2,)
    assert (request.cache_salt, request.tenant_id, request.priority) == ("s", "t", 0)


@pytest.mark.parametrize("include", [True, False])
async def test_a_stop_string_across_tokens_ends_the_answer_and_the_engines_work(include):
    params = SamplingParams(stop=("o wor",), include_stop_str_in_output=include)
    service, engine, sink = make_service([*one_by_one("hello world"), *one_by_one(" the"), last()])
    deltas = await collect(service, make_request(params=params))
    assert text_of(deltas) == ("hello wor" if include else "hell")
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, "o wor")
    assert deltas[-1].usage.completion_tokens == 2
    assert (engine.num_played, engine.num_closed, len(sink.records)) == (2, 1, 1)


async def test_the_record_of_a_request_that_a_stop_string_ends_holds_the_engines_figures():
    first = tokens(ids_of("hello"), stats_so_far=STATS)
    service, _, sink = make_service([first, *one_by_one(" world"), last()])
    await collect(service, make_request(params=SamplingParams(stop=(" wor",))))
    (record,) = sink.records
    assert (record.queue_wait_s, record.batch_size, record.kv_usage) == (0.25, 4, 0.5)


async def test_tokens_behind_a_stop_string_in_the_same_step_are_not_billed_nor_streamed():
    ids = ids_of("hello world the fox")
    service, _, _ = make_service([tokens(ids), last()])
    deltas = await collect(service, make_request(params=SamplingParams(stop=(" world",))))
    assert text_of(deltas) == "hello"
    assert deltas[-1].token_ids == tuple(ids[:2])
    assert deltas[-1].usage.completion_tokens == 2


async def test_of_several_stop_strings_the_earliest_start_wins():
    params = SamplingParams(stop=("lo w", "ello world"))
    service, _, _ = make_service([*one_by_one("hello world"), *one_by_one(" the"), last()])
    deltas = await collect(service, make_request(params=params))
    assert (text_of(deltas), deltas[-1].stop_reason) == ("h", "ello world")


async def test_held_text_comes_out_when_the_answer_ends_otherwise():
    service, _, _ = make_service([*one_by_one("hello"), last(reason=FinishReason.LENGTH)])
    deltas = await collect(service, make_request(params=SamplingParams(stop=("hello world",))))
    assert text_of(deltas) == "hello"
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.LENGTH, None)


async def test_a_stop_string_that_waited_for_a_longer_one_counts_at_the_end():
    params = SamplingParams(stop=("ell", "hello world"))
    service, _, _ = make_service([*one_by_one("hello"), last(reason=FinishReason.LENGTH)])
    deltas = await collect(service, make_request(params=params))
    assert (text_of(deltas), deltas[-1].finish_reason, deltas[-1].stop_reason) == (
        "h",
        FinishReason.STOP,
        "ell",
    )


async def test_stop_strings_inside_the_first_min_tokens_do_not_count():
    params = SamplingParams(stop=("hello",), min_tokens=1)
    service, _, _ = make_service([*one_by_one("hello hello there"), last()])
    deltas = await collect(service, make_request(params=params))
    assert text_of(deltas) == "hello "


async def test_a_stop_token_is_named_as_the_reason():
    service, _, _ = make_service([*one_by_one("hello"), last(stop_token_id=9)])
    deltas = await collect(service, make_request(params=SamplingParams(stop_token_ids=(9,))))
    assert (deltas[-1].finish_reason, deltas[-1].stop_reason) == (FinishReason.STOP, 9)


async def test_a_character_across_tokens_is_shown_whole():
    service, _, _ = make_service([*one_by_one("a\U0001f600b"), last()])
    deltas = await collect(service, make_request())
    assert [delta.text for delta in deltas] == ["a", "\U0001f600", "b", ""]
    assert len(deltas[1].token_ids) == 4


async def test_an_unfinished_character_at_the_end_is_the_replacement_character():
    ids = ids_of("\U0001f600")[:2]
    service, _, _ = make_service([tokens(ids), last(reason=FinishReason.LENGTH)])
    assert text_of(await collect(service, make_request())) == "\ufffd"


async def test_thousands_of_tokens_without_text_wait_for_the_next_text_at_linear_cost():
    service, _, _ = make_service([*[tokens([3])] * 50_000, *one_by_one("hello"), last()])
    began_s = time.process_time()
    deltas = await collect(service, make_request())
    assert [len(delta.token_ids) for delta in deltas] == [50_001, 0]
    assert time.process_time() - began_s < 5.0


@pytest.mark.parametrize(("skip", "expected"), [(True, "hello"), (False, "<|im_start|>hello")])
async def test_special_tokens_are_left_out_unless_asked_for(skip, expected):
    service, _, _ = make_service([tokens([3]), *one_by_one("hello"), last()])
    params = SamplingParams(skip_special_tokens=skip)
    assert text_of(await collect(service, make_request(params=params))) == expected


async def test_an_answer_keeps_its_leading_space_after_visible_text():
    script = [tokens(ids_of("world", LLAMA)), last()]
    service, _, _ = make_service(script, tokenizer=LLAMA)
    assert text_of(await collect(service, make_request("hello", echo=True))) == "hello world"
    service, _, _ = make_service(script, tokenizer=LLAMA)
    assert text_of(await collect(service, make_request((1,)))) == "world"


def with_logprobs(ids, **fields):
    entries = tuple(TokenLogprobs(sampled=TokenLogprob(token_id=i, logprob=-0.5, rank=1)) for i in ids)
    return tokens(ids, logprobs=entries, **fields)


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("skip", [True, False])
async def test_offsets_of_logprobs_index_into_the_text_that_was_returned(at_once, skip):
    """Special tokens that are skipped and the parts of one character take no place of their own."""
    ids = [1, *ids_of("hello"), 1, *ids_of(" \N{OWL}!")]
    script = [with_logprobs(ids)] if at_once else [with_logprobs([i]) for i in ids]
    service, _, _ = make_service([*script, last()])
    params = SamplingParams(logprobs=0, skip_special_tokens=skip)
    deltas = await collect(service, make_request(params=params))
    text = text_of(deltas)
    found = [logprob for delta in deltas for logprob in delta.logprobs or ()]
    assert [logprob.token_id for logprob in found] == ids
    place = 0
    for logprob in found:
        is_hidden = logprob.token_id == 1 and skip
        assert logprob.text_offset == place
        if not is_hidden and "\N{REPLACEMENT CHARACTER}" not in logprob.token:
            assert text.startswith(logprob.token, place)
            place += len(logprob.token)
        elif logprob.token_bytes == "\N{OWL}".encode()[-1:]:
            place += 1
    assert place == len(text)


async def test_offsets_stay_within_a_text_that_a_stop_string_has_cut():
    script = [with_logprobs([i]) for i in ids_of("hello world")]
    service, _, _ = make_service([*script, last()])
    deltas = await collect(service, make_request(params=SamplingParams(logprobs=0, stop=("lo wor",))))
    offsets = [logprob.text_offset for delta in deltas for logprob in delta.logprobs or ()]
    assert (text_of(deltas), offsets) == ("hel", [0, 3])


async def test_logprobs_carry_the_tokens_own_text_and_bytes():
    sampled, other = ids_of("hello")[0], ids_of("\u00e9")[0]
    entry = TokenLogprobs(
        TokenLogprob(sampled, -0.5, 1), (TokenLogprob(sampled, -0.5, 1), TokenLogprob(other, -1.5, 2))
    )
    service, _, _ = make_service([tokens([sampled], logprobs=(entry,)), last()])
    deltas = await collect(service, make_request(params=SamplingParams(logprobs=2)))
    (logprob,) = deltas[0].logprobs
    assert (logprob.token, logprob.token_bytes, logprob.logprob) == ("hello", b"hello", -0.5)
    assert [(top.token_id, top.rank) for top in (logprob, *logprob.top)] == [
        (sampled, 1),
        (sampled, 1),
        (other, 2),
    ]
    assert [top.token for top in logprob.top] == [
        "hello",
        TOKENIZER.token_bytes(other).decode(errors="replace"),
    ]
    assert deltas[1].logprobs is None


async def test_with_n_each_answer_ends_once_and_the_last_to_end_has_the_usage():
    script = [
        *one_by_one("hello", index=0),
        *one_by_one("the fox", index=1),
        last(index=1, stats=None),
        *one_by_one(" world", index=0),
        last(index=0),
    ]
    service, engine, sink = make_service(script)
    deltas = await collect(service, make_request(params=SamplingParams(n=2)))
    assert (text_of(deltas, 0), text_of(deltas, 1)) == ("hello world", "the fox")
    ended = [delta for delta in deltas if delta.finish_reason is not None]
    assert [(delta.index, delta.usage is None) for delta in ended] == [(1, True), (0, False)]
    assert ended[-1].usage.completion_tokens == 2 + len(ids_of("the fox"))
    assert (engine.num_closed, len(sink.records)) == (1, 1)
    assert len(sink.gaps_s) == 1 + len(ids_of("the fox")) - 1


async def test_with_n_a_stopped_answers_further_tokens_are_dropped_while_others_go_on():
    script = [
        *one_by_one("hello", index=0),
        *one_by_one(" world the", index=0),
        *one_by_one("hi", index=1),
        *one_by_one(" fox fox", index=0),
        last(index=1, stats=None),
        *one_by_one(" never", index=0),
        last(index=0),
    ]
    service, engine, _ = make_service(script)
    deltas = await collect(service, make_request(params=SamplingParams(n=2, stop=(" world",))))
    assert (text_of(deltas, 0), text_of(deltas, 1)) == ("hello", "hi")
    assert deltas[-1].usage.completion_tokens == 2 + len(ids_of("hi"))
    # The last open answer ended: what the engine still makes of the other is cancelled.
    assert engine.num_played < len(script)
    assert engine.num_closed == 1


async def test_echo_comes_first_in_every_answer():
    script = [*one_by_one(" world", index=0), last(index=0, stats=None), last(index=1)]
    service, _, _ = make_service(script)
    deltas = await collect(service, make_request("hello", echo=True, params=SamplingParams(n=2)))
    assert (text_of(deltas, 0), text_of(deltas, 1)) == ("hello world", "hello")
    service, _, _ = make_service([last()])
    assert text_of(await collect(service, make_request((1, *ids_of("hello")), echo=True))) == "hello"


async def test_an_echoed_prompt_has_its_logprobs_and_the_answers_offsets_go_on_behind_it():
    prompt = ids_of("hello")
    told = (
        None,
        *(TokenLogprobs(TokenLogprob(i, -0.5, 2), (TokenLogprob(i + 1, -0.25, 1),)) for i in prompt[1:]),
    )
    own = [TokenLogprobs(TokenLogprob(i, -1.0, 1)) for i in ids_of(" world")]
    script = [tokens(ids_of(" world"), logprobs=tuple(own), prompt_logprobs=told), last()]
    service, engine, _ = make_service(script)
    params = SamplingParams(logprobs=1, prompt_logprobs=0)
    deltas = await collect(service, make_request(tuple(prompt), echo=True, params=params))
    assert engine.requests[0].params.prompt_logprobs == 1
    assert text_of(deltas) == "hello world"
    echoed, answered = (delta.logprobs for delta in deltas if delta.logprobs)
    assert [entry.logprob for entry in echoed] == [None] + [-0.5] * (len(prompt) - 1)
    assert "".join(entry.token for entry in echoed) == "hello"
    assert [len(entry.top) for entry in echoed] == [0] + [1] * (len(prompt) - 1)
    assert answered[0].text_offset == len("hello")
    (about_prompt,) = (delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs)
    assert about_prompt[0] is None
    assert all(entry.top == () for entry in about_prompt[1:])


def scored(text, *, index, logprob):
    ids = ids_of(text)
    return tokens(ids, index=index, logprobs=tuple(TokenLogprobs(TokenLogprob(i, logprob, 1)) for i in ids))


async def test_best_of_gives_the_likeliest_answers_best_first_and_bills_all():
    script = [
        scored("hello", index=0, logprob=-2.0),
        scored("hello world", index=1, logprob=-0.5),  # a larger sum of logprobs, a smaller mean
        scored("hi", index=2, logprob=-1.0),
        *(last(index=index, stats=STATS if index == 2 else None) for index in range(3)),
    ]
    service, engine, _ = make_service(script)
    deltas = await collect(service, make_request(params=SamplingParams(n=2, best_of=3)))
    assert (engine.requests[0].params.n, engine.requests[0].params.logprobs) == (3, 0)
    assert [text_of(deltas, index) for index in (0, 1)] == ["hello world", "hi"]
    assert not any(delta.logprobs for delta in deltas)
    assert [delta.usage is None for delta in deltas] == [True] * (len(deltas) - 1) + [False]
    assert deltas[-1].usage.completion_tokens == sum(len(ids_of(t)) for t in ("hello", "hello world", "hi"))


async def test_best_of_has_ended_after_an_error():
    service, *_ = make_service([GenerateError("the answer failed")])
    stream = await service.generate(make_request(params=SamplingParams(best_of=2)))
    with pytest.raises(GenerateError):
        await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_best_of_that_is_closed_before_its_first_delta_closes_the_engine():
    service, engine, sink = make_service([None])
    stream = await service.generate(make_request(params=SamplingParams(best_of=2)))
    await stream.aclose()
    assert engine.num_closed == 1
    assert [record.finish_reason for record in sink.records] == [FinishReason.CANCELLED]
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_bad_words_reach_the_engine_as_tokens_with_and_without_a_space():
    service, engine, _ = make_service([last()])
    await collect(service, make_request(params=SamplingParams(bad_words=("world", "hi"))))
    assert set(engine.requests[0].banned_sequences) == {
        tuple(ids_of(text)) for text in ("world", " world", "hi", " hi")
    }


async def test_dry_breakers_are_all_tokens_that_hold_one():
    service, engine, _ = make_service([last()])
    params = SamplingParams(dry_multiplier=1.0, dry_sequence_breakers=("w",))
    await collect(service, make_request(params=params))
    ids = engine.requests[0].dry_breaker_ids
    assert set(ids_of(" world")) & set(ids)
    assert all(b"w" in TOKENIZER.token_bytes(token_id) for token_id in ids)
    assert not set(ids_of("hello")) & set(ids)


async def test_echo_without_new_tokens_needs_no_engine():
    service, engine, sink = make_service()
    params = SamplingParams(max_tokens=0, n=2)
    deltas = await collect(service, make_request("hello", echo=True, params=params))
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH, FinishReason.LENGTH]
    assert deltas[-1].usage == Usage(prompt_tokens=2, completion_tokens=0)
    assert (engine.requests, len(sink.records)) == ([], 1)


HI = (Message(role="user", content="hi"),)

REFUSALS = {
    "neither": ({"prompt": None}, "prompt", "exactly one of"),
    "both": ({"messages": HI}, "prompt", "exactly one of"),
    "empty text": ({"prompt": ""}, "prompt", "prompt is empty"),
    "empty ids": ({"prompt": ()}, "prompt", "prompt is empty"),
    "id too great": ({"prompt": (1, 500)}, "prompt", "token id 500, it must be from 0 to 499"),
    "negative id": ({"prompt": (-1,)}, "prompt", "token id -1"),
    "surrogate": ({"prompt": "a\udfff"}, "prompt", "lone surrogate"),
    "no template": ({"prompt": None, "messages": HI}, "messages", "has no chat template"),
    "echo of messages": (
        {"prompt": None, "messages": HI, "echo": True},
        "echo",
        "must be False with messages",
    ),
    "no tokens": ({"params": SamplingParams(max_tokens=0)}, "max_tokens", "max_tokens is 0"),
    "n": ({"params": SamplingParams(n=9)}, "n", "n is 9, it must be between 1 and 8"),
    "bias": ({"params": SamplingParams(logit_bias={500: 1.0})}, "logit_bias", "logit_bias is 500"),
    "stop id": ({"params": SamplingParams(stop_token_ids=(501,))}, "stop_token_ids", "stop_token_ids is 501"),
    "long ids": ({"prompt": (1,) * 65}, "prompt", "prompt has 65 tokens, the model's context holds 64"),
    "full context": ({"prompt": (1,) * 64}, "prompt", "has 64 tokens and max_tokens is 1, together 65"),
    "long answer": (
        {"prompt": (1,) * 60, "params": SamplingParams(max_tokens=5)},
        "prompt",
        "prompt has 60 tokens and max_tokens is 5, together 65; the model's context holds 64",
    ),
    "huge text": ({"prompt": "x" * 10**6}, "prompt", "has at least"),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_wrong_request_is_refused_by_name_before_the_engine_hears_of_it(name):
    fields, param, words = REFUSALS[name]
    service, engine, sink = make_service()
    with pytest.raises(InvalidParameterError) as caught:
        await service.generate(make_request(**fields))
    assert caught.value.param == param
    assert words in caught.value.message
    assert engine.requests == []
    assert [record.error_code for record in sink.records] == [caught.value.code]


async def test_a_context_overflow_has_the_code_that_clients_look_for():
    service, _, _ = make_service()
    for prompt in ((1,) * 65, "hello " * 70, "x" * 10**6):
        with pytest.raises(InvalidParameterError) as caught:
            await service.generate(make_request(prompt))
        assert caught.value.code == "context_length_exceeded"


async def test_a_tokenizer_larger_than_the_model_cannot_send_it_unknown_ids():
    service, engine, _ = make_service(info=make_info(vocab_size=300))
    with pytest.raises(InvalidParameterError, match="it must be from 0 to 299"):
        await service.generate(make_request("hello world"))
    assert engine.requests == []


async def test_a_long_text_is_tokenized_off_the_event_loop(monkeypatch):
    service, _, _ = make_service([last()], info=make_info(max_model_len=100_000))
    threads = []
    original = asyncio.to_thread

    async def spy(function, *args, **kwargs):
        threads.append(function.__name__)
        return await original(function, *args, **kwargs)

    monkeypatch.setattr(asyncio, "to_thread", spy)
    await collect(service, make_request("hello " * 100))
    assert threads == []
    service, _, _ = make_service([last()], info=make_info(max_model_len=100_000))
    deltas = await collect(service, make_request("hello " * 2000))
    assert threads == ["_encode_now"]
    assert deltas[-1].usage.prompt_tokens == 1 + len(ids_of("hello " * 2000))


async def test_the_engines_refusal_passes_through_and_is_recorded():
    service, engine, sink = make_service()
    engine.refusal = QueueFullError("256 requests wait, the limit is 256", retry_after_s=2.0)
    with pytest.raises(QueueFullError):
        await service.generate(make_request())
    assert [(r.finish_reason, r.error_code) for r in sink.records] == [(FinishReason.ERROR, "queue_full")]


@pytest.mark.parametrize(
    ("item", "kind", "code"),
    [
        (EngineDeadError("the engine process died"), EngineDeadError, "engine_restarting"),
        (tokens((), error=ErrorInfo("GenerateError", "nan", "nan_logits")), GenerateError, "nan_logits"),
        (tokens((), error=ErrorInfo("Nonsense", "x", "odd")), EngineError, "odd"),
        (tokens((), error=ErrorInfo("annotations", "x", "odd")), EngineError, "odd"),
        (RuntimeError("secret"), GenerateError, "generate_error"),
        (tokens((1,), index=7), GenerateError, "generate_error"),
    ],
)
async def test_a_failure_in_the_stream_ends_this_request_once(item, kind, code, caplog):
    service, engine, sink = make_service([*one_by_one("hello"), item, *one_by_one("more")])
    stream = await service.generate(make_request())
    assert (await anext(stream)).text == "hello"
    with caplog.at_level(logging.CRITICAL), pytest.raises(PenstockError) as caught:
        await anext(stream)
    assert type(caught.value) is kind
    assert "secret" not in caught.value.message
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    await stream.aclose()
    assert engine.num_closed == 1
    (record,) = sink.records
    assert (record.finish_reason, record.error_code, record.completion_tokens) == (
        FinishReason.ERROR,
        code,
        1,
    )


async def test_a_stream_that_ends_without_a_terminal_delta_is_an_error():
    service, _, sink = make_service(one_by_one("hello"))
    with pytest.raises(GenerateError, match="ended early"):
        await collect(service, make_request())
    assert [record.finish_reason for record in sink.records] == [FinishReason.ERROR]


@pytest.mark.parametrize("stage", ["tokenize", "detokenize"])
async def test_an_unforeseen_exception_in_the_text_stage_fails_that_request_only(stage, monkeypatch, caplog):
    service, engine, sink = make_service([*one_by_one("hello"), last(), *one_by_one("hello"), last()])
    with monkeypatch.context() as patch, caplog.at_level(logging.CRITICAL):
        target = "tokenizer.Tokenizer.encode" if stage == "tokenize" else "detokenizer.Detokenizer.push"
        patch.setattr(f"penstock.text.{target}", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(GenerateError) as caught:
            await collect(service, make_request())
        assert "division" not in caught.value.message
    assert [record.error_code for record in sink.records] == ["generate_error"]
    engine.num_played = 0
    assert text_of(await collect(service, make_request())) == "hello"


@pytest.mark.parametrize("num_read", [0, 1, 2])
async def test_closing_the_generator_cancels_the_engines_work_once(num_read):
    service, engine, sink = make_service([*one_by_one("hello world the fox"), last()])
    stream = await service.generate(make_request())
    for _ in range(num_read):
        await anext(stream)
    await stream.aclose()
    await stream.aclose()
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert engine.num_closed == 1
    (record,) = sink.records
    assert (record.finish_reason, record.completion_tokens) == (FinishReason.CANCELLED, num_read)


@pytest.mark.parametrize("stop", [(), ("fox",)], ids=["cancelled", "stop string"])
async def test_the_time_of_inference_goes_on_until_an_early_end(stop):
    """The engine's figures came with the first token; the clock ticks at each of the four and at the end."""
    first, *others = ids_of("hello world the fox")
    script = [tokens([first], stats_so_far=STATS), *(tokens([each]) for each in others), None]
    service, _, sink = make_service(script)
    stream = await service.generate(make_request(params=SamplingParams(stop=stop)))
    if stop:
        assert [delta.finish_reason async for delta in stream][-1] is FinishReason.STOP
    else:
        for _ in range(4):
            await anext(stream)
        await stream.aclose()
    assert [record.inference_s for record in sink.records] == [STATS.inference_s + 5]


async def test_cancelling_a_waiting_reader_cancels_the_engines_work():
    service, engine, sink = make_service([*one_by_one("hello"), None])
    stream = await service.generate(make_request())
    await anext(stream)
    reader = asyncio.ensure_future(stream.__anext__())
    await asyncio.sleep(0)
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert engine.num_closed == 1
    assert [record.finish_reason for record in sink.records] == [FinishReason.CANCELLED]


async def test_throwing_into_the_stream_closes_it():
    service, engine, _ = make_service([None])
    stream = await service.generate(make_request())
    for error in (KeyError("x"), KeyError):
        with pytest.raises(KeyError):
            await stream.athrow(error)
    assert engine.num_closed == 1


@pytest.fixture
def template():
    source = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    template = ChatTemplate({"default": source}, special_tokens={})
    yield template
    template.close()


async def test_a_conversation_is_rendered_and_gets_no_second_bos(template):
    service, engine, _ = make_service([last()], template=template)
    await service.start()
    request = GenerateRequest(request_id="r", model="m", messages=HI)
    await collect(service, request)
    expected = ids_of("<|im_start|>user\nhi<|im_end|>")
    assert engine.requests[0].prompt_token_ids == expected
    assert await service.tokenize(request, add_special_tokens=False) == expected
    await service.close()


async def test_a_long_conversation_names_messages(template):
    service, _, _ = make_service(template=template)
    messages = (Message(role="user", content="hello " * 70),)
    with pytest.raises(InvalidParameterError) as caught:
        await service.generate(GenerateRequest(request_id="r", model="m", messages=messages))
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    await service.close()


async def test_tokenize_and_detokenize_are_inverse():
    service, _, _ = make_service()
    ids = await service.tokenize(make_request("hello world"), add_special_tokens=True)
    assert ids == [1, *ids_of("hello world")]
    assert await service.detokenize(ids) == "<s>hello world"
    assert await service.tokenize(make_request((5, 6)), add_special_tokens=True) == [5, 6]
    for wrong in ((500,), (-1,)):
        with pytest.raises(InvalidParameterError, match="tokens holds the token id"):
            await service.detokenize(wrong)


async def test_the_card_and_readiness_are_the_engines():
    service, engine, _ = make_service()
    card = service.card
    assert (card.name, card.max_model_len, card.root, card.created_unix_s) == ("m", 64, "tiny", 1_700_000_000)
    assert service.not_ready_reason is None
    engine.not_ready_reason = "draining"
    assert service.not_ready_reason == "draining"


async def test_it_is_put_together_while_the_engine_still_loads():
    class LoadingEngine(ScriptedEngine):
        is_started = False

        @property
        def info(self):
            assert self.is_started, "start() has returned"
            return make_info()

        @info.setter
        def info(self, _value):
            pass

    engine = LoadingEngine([*one_by_one("hello"), last()])
    service = TextService(engine, TOKENIZER, None, name="m", events=Sink(), clock=TickingClock())
    engine.is_started = True
    assert text_of(await collect(service, make_request())) == "hello"
