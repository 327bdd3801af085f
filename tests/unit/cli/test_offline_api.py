"""`LLM`: vLLM's shape of calls and outputs, order kept, whatever is not here refused by name."""

import asyncio
from collections.abc import Iterator

import pytest

from penstock import LLM, SamplingParams
from penstock.cli import offline, pooled
from penstock.cli.feed import MAX_PROMPTS, num_in_flight, with_room
from penstock.cli.outputs import RequestOutput
from penstock.core.errors import (
    EngineDeadError,
    InvalidParameterError,
    NotReadyError,
    PenstockError,
    QueueFullError,
    StartupError,
)
from penstock.core.text import GenerateRequest
from penstock.engine.config import EngineConfig, SchedulerConfig, validate_engine_config
from penstock.server.dialects.openai.completions import MAX_PROMPTS as SERVER_MAX_PROMPTS
from penstock.text.service import TextService

GREEDY = SamplingParams(temperature=0.0, max_tokens=6)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(max_num_seqs=4, max_model_len=256, num_kv_blocks=128, num_threads=1, seed=7) as opened:
        yield opened


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"quantization": "awq"}, "quantization is 'awq', it must be one of none, int8, int4"),
        ({"tensor_parallel_size": 65}, "tensor_parallel_size is 65"),
        (
            {"gpu_memory_utilization": 0.9, "device": "cpu"},
            "gpu_memory_utilization is 0.9, but the device is the CPU",
        ),
        ({"gpu_memory_utilization": 0.0}, "gpu_memory_utilization is 0, it must be above 0 and at most 1"),
        ({"kv_offloading_size": 1, "enable_prefix_caching": False}, "kv_offloading_size needs enable_prefix"),
        ({"kv_offloading_size": "4"}, "kv_offloading_size is '4', it must be a number or a whole number"),
        ({"trust_remote_code": True}, "trust_remote_code is not supported"),
        ({"nonsense": 1}, "nonsense is not an argument"),
        ({"block_size": 17}, "block_size is 17"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"dtype": 16}, "dtype is 16, it must be text"),
        ({"max_num_seqs": "4"}, "max_num_seqs is '4', it must be a whole number"),
        ({"max_num_seqs": True}, "max_num_seqs is True, it must be a whole number"),
        ({"max_num_seqs": None}, "max_num_seqs is None, it must be a whole number"),
        ({"max_num_batched_tokens": 2048.0}, r"max_num_batched_tokens is 2048\.0, it must be a whole number"),
        ({"max_model_len": "1k"}, "max_model_len is '1k', it must be a whole number or None"),
        ({"block_size": True}, "block_size is True"),
        ({"num_kv_blocks": 8.5}, r"num_kv_blocks is 8\.5"),
        ({"kv_cache_memory_bytes": "1GiB"}, "kv_cache_memory_bytes is '1GiB'"),
        ({"num_threads": False}, "num_threads is False"),
        ({"seed": "x"}, "seed is 'x', it must be a whole number or None"),
        ({"enable_prefix_caching": 1}, "enable_prefix_caching is 1, it must be True or False"),
        ({"tensor_parallel_size": True}, "tensor_parallel_size is True"),
        ({"revision": 5}, "revision is 5, it must be text or None"),
        ({"model": 5}, "model is 5, it must be text, a path or None"),
        ({"chat_template": 5}, "chat_template is 5, it must be text, a path or None"),
        ({"chat_template": "/nope"}, "chat_template is '/nope': no such file"),
        ({"model": "no/such/place/at/all"}, "no/such/place/at/all"),
    ],
)
def test_what_is_not_here_is_refused_by_name(argument: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        LLM(**argument)  # type: ignore[arg-type]  # the point of the test


def test_one_prompt_gives_a_list_of_one(llm: LLM) -> None:
    outputs = llm.generate("Once upon a time", GREEDY)
    assert len(outputs) == 1
    assert outputs[0].prompt == "Once upon a time"
    assert outputs[0].finished
    answer = outputs[0].outputs[0]
    assert (len(answer.token_ids), answer.finish_reason) == (6, "length")
    assert answer.text
    assert (answer.logprobs, answer.cumulative_logprob) == (None, None)


def test_outputs_keep_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"Number {i} was" for i in range(20)]
    params = [
        SamplingParams(temperature=0.0, max_tokens=1 + (7 * i) % 11, ignore_eos=True) for i in range(20)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [output.prompt for output in outputs] == prompts
    assert [len(o.outputs[0].token_ids) for o in outputs] == [p.max_tokens for p in params]


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    by_text = llm.generate({"prompt": "The king"}, GREEDY)[0]
    by_ids = llm.generate([{"prompt_token_ids": by_text.prompt_token_ids}], GREEDY)[0]
    assert by_ids.prompt is None
    assert by_ids.outputs[0].token_ids == by_text.outputs[0].token_ids


def test_a_conversation_is_rendered_by_the_models_template(llm: LLM) -> None:
    turns = [{"role": "user", "content": "Hello"}]
    one, two = llm.chat(turns, GREEDY), llm.chat([turns, turns], GREEDY)
    assert "Hello" in (one[0].prompt or "")
    assert [o.outputs[0].text for o in two] == [one[0].outputs[0].text] * 2


def test_n_answers_of_one_prompt(llm: LLM) -> None:
    output = llm.generate("The", SamplingParams(n=3, max_tokens=4, ignore_eos=True))[0]
    assert [answer.index for answer in output.outputs] == [0, 1, 2]
    assert len({tuple(answer.token_ids) for answer in output.outputs}) > 1


def test_logprobs_hold_every_token_and_its_rivals(llm: LLM) -> None:
    answer = llm.generate("The king", SamplingParams(temperature=0.0, max_tokens=3, logprobs=2))[0].outputs[0]
    assert answer.logprobs is not None
    assert [tid in entry for tid, entry in zip(answer.token_ids, answer.logprobs, strict=True)] == [True] * 3
    chosen = [entry[tid] for tid, entry in zip(answer.token_ids, answer.logprobs, strict=True)]
    assert [one.rank for one in chosen] == [1, 1, 1]
    assert answer.cumulative_logprob == pytest.approx(sum(one.logprob for one in chosen))
    assert all(len(entry) == 2 for entry in answer.logprobs)


def test_the_engines_seed_makes_a_run_repeatable() -> None:
    texts = []
    for _ in range(2):
        with LLM(max_model_len=64, num_kv_blocks=64, max_num_seqs=2, num_threads=1, seed=3) as llm:
            texts.append(llm.generate(["The"] * 3, SamplingParams(max_tokens=8))[2].outputs[0].text)
    assert texts[0] == texts[1]


def test_a_stop_string_may_be_given_alone_or_in_a_list(llm: LLM) -> None:
    plain = (
        llm.generate("Once upon a time", SamplingParams(temperature=0.0, max_tokens=12))[0].outputs[0].text
    )
    word = plain.split()[1]
    for stop in (word, [word]):
        params = SamplingParams(temperature=0.0, max_tokens=12, stop=stop)  # type: ignore[arg-type]  # as vLLM takes it
        answer = llm.generate("Once upon a time", params)[0].outputs[0]
        assert (answer.finish_reason, answer.stop_reason) == ("stop", word)
        assert plain.startswith(answer.text)
        assert word not in answer.text


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", None, "prompt is empty"),
        ({"prompt_token_ids": [10**9]}, None, "token id 1000000000"),
        ({"text": "x"}, None, "a prompt must be"),
        ("x", SamplingParams(temperature=3.0), "temperature is 3"),
        ("x", SamplingParams(temperature="hot"), r"temperature"),  # type: ignore[arg-type]
        ("x", SamplingParams(max_tokens=10_000), "max_tokens is 10000"),
        ("x " * 5000, None, "the model's context holds 256"),
        ("x", [GREEDY, GREEDY], "2 entries, there are 1 prompts"),
        ("x", {"max_tokens": 2}, "sampling_params is {'max_tokens': 2}, it must be"),
        ("x", 5, "sampling_params is 5, it must be"),
        ("x", [{"max_tokens": 2}], "sampling_params holds {'max_tokens': 2}, it must be"),
        (5, None, "prompts is 5, it must be"),
        (None, None, "prompts is None, it must be"),
        (b"x", None, "prompts is b'x', it must be"),
        ([5], None, "prompts holds 5, a prompt must be"),
        ({"prompt_token_ids": "abc"}, None, "prompt_token_ids is 'abc', it must be a list of token ids"),
        ({"prompt_token_ids": [True]}, None, r"prompt_token_ids is \[True\], it must be"),
        ({"prompt": [1, 2]}, None, r"prompt is \[1, 2\], it must be text"),
    ],
)
def test_a_wrong_prompt_or_parameter_is_refused(
    llm: LLM, prompt: object, params: object, message: str
) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        llm.generate(prompt, params)  # type: ignore[arg-type]  # the point of the test


def test_a_refused_prompt_leaves_the_engine_usable(llm: LLM) -> None:
    with pytest.raises(InvalidParameterError):
        llm.generate(["fine", ""], GREEDY)
    assert llm.generate("fine", GREEDY)[0].finished


def test_no_prompts_give_no_outputs(llm: LLM) -> None:
    assert llm.generate([], GREEDY) == []


def test_totals_count_what_the_engine_computed(llm: LLM) -> None:
    before = llm.totals.num_generated_tokens
    llm.generate("One more", SamplingParams(max_tokens=5, ignore_eos=True))
    assert llm.totals.num_generated_tokens == before + 5
    assert llm.totals.last is not None


def test_its_own_feeding_cannot_reach_the_limits_of_the_queue() -> None:
    """The most seats, the most requests each, and no prompt refused."""
    config = with_room(SchedulerConfig(max_num_seqs=4096, max_num_batched_tokens=4096))
    validate_engine_config(EngineConfig(model_path="x", scheduler=config))
    assert num_in_flight(max_num_seqs=4096) * MAX_PROMPTS <= config.max_num_queued_reqs
    assert num_in_flight(max_num_seqs=4096) * MAX_PROMPTS * (4 << 20) <= config.max_num_queued_tokens
    assert num_in_flight(max_num_seqs=1) > 1


def test_one_row_of_a_file_may_hold_so_many_prompts() -> None:
    assert MAX_PROMPTS == SERVER_MAX_PROMPTS


def test_many_seats_and_many_prompts_overflow_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """More requests wait at once than a server lets wait."""
    monkeypatch.setattr(pooled, "with_patience", lambda ask: ask())
    seats = {"max_num_seqs": 400, "max_num_batched_tokens": 400, "num_kv_blocks": 64}
    with LLM(**seats, max_model_len=32, num_threads=1) as llm:  # type: ignore[arg-type]  # plain numbers
        prompts = [{"prompt_token_ids": [5, 6]}] * 1600
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, temperature=0.0), use_tqdm=False)
    assert len(outputs) == 1600
    assert {output.error for output in outputs} == {None}


def test_a_full_queue_is_waited_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    refusals = [QueueFullError("full", retry_after_s=0.001) for _ in range(3)]
    ask = offline.answer_whole

    async def answer(service: TextService, request: GenerateRequest) -> RequestOutput:
        if refusals:
            raise refusals.pop()
        return await ask(service, request)

    monkeypatch.setattr(offline, "answer_whole", answer)
    assert [output.error for output in llm.generate(["a", "b"], GREEDY)] == [None, None]
    assert not refusals


@pytest.mark.parametrize("error", [EngineDeadError("it died"), NotReadyError("it is dead")])
def test_what_was_answered_before_the_engine_died_is_kept(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, error: PenstockError
) -> None:
    ask, num_left = offline.answer_whole, 1

    async def answer(service: TextService, request: GenerateRequest) -> RequestOutput:
        nonlocal num_left
        if request.prompt != "good":
            while num_left:
                await asyncio.sleep(0)
            raise error
        output = await ask(service, request)
        num_left = 0
        return output

    monkeypatch.setattr(offline, "answer_whole", answer)
    good, lost = llm.generate(["good", "bad"], GREEDY)
    assert (good.error, lost.error) == (None, error.message)
    assert lost.outputs[0].finish_reason == "error"
    with pytest.raises(type(error)):
        llm.generate(["bad"], GREEDY)


def test_a_closed_llm_says_so() -> None:
    llm = LLM(max_model_len=64, num_kv_blocks=64, max_num_seqs=2, num_threads=1)
    llm.close()
    llm.close()
    with pytest.raises(StartupError, match="closed"):
        llm.generate("x")


@pytest.mark.parametrize("messages", [5, None, "Hi", {"role": "user", "content": "Hi"}, [5], ["Hi"]])
def test_messages_that_are_none_are_refused_by_name(llm: LLM, messages: object) -> None:
    with pytest.raises(InvalidParameterError, match="messages"):
        llm.chat(messages)  # type: ignore[arg-type]  # the point of the test


def test_vectors_keep_the_order_of_the_prompts_and_have_length_1(llm: LLM) -> None:
    many = llm.embed([f"prompt {i}" for i in range(40)], pooling_type="mean", dimensions=16)
    (again,) = llm.embed({"prompt": "prompt 7"}, pooling_type="mean", dimensions=16)
    assert many[7].outputs.embedding == pytest.approx(again.outputs.embedding, abs=0.02)
    for output in many:
        assert sum(value * value for value in output.outputs.embedding) == pytest.approx(1.0)
        assert output.num_prompt_tokens > 0


@pytest.mark.parametrize(
    ("ask", "param"),
    [
        (lambda llm: llm.embed("a", pooling_type="cls"), "pooling_type"),
        (lambda llm: llm.embed("a", dimensions=1 << 20), "dimensions"),
        (lambda llm: llm.embed(3), "prompts"),
        (lambda llm: llm.score("a", []), "text_2"),
        (lambda llm: llm.score(["a", "b"], ["a", "b", "c"]), "text_1"),
        (lambda llm: llm.score("a", "b"), "model"),
        (lambda llm: llm.classify("a"), "model"),
    ],
)
def test_what_cannot_be_embedded_or_scored_is_refused_by_name(llm: LLM, ask, param: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InvalidParameterError) as caught:
        ask(llm)
    assert caught.value.param == param


def test_a_model_that_slept_says_the_same() -> None:
    with LLM(max_num_seqs=2, max_model_len=64, num_kv_blocks=16, num_threads=1) as own:
        expected = own.generate("Once", GREEDY, use_tqdm=False)[0].outputs[0].token_ids
        for level in (1, 2):
            own.sleep(level)
            assert own.is_sleeping
            with pytest.raises(NotReadyError, match="sleeping"):
                own.generate("Once", GREEDY, use_tqdm=False)
            own.wake_up()
            assert not own.is_sleeping
            assert own.generate("Once", GREEDY, use_tqdm=False)[0].outputs[0].token_ids == expected
        with pytest.raises(InvalidParameterError, match="level is 3"):
            own.sleep(3)
        own.sleep(2)  # and closed asleep
