"""For each request feature: how to ask for it on top of a request, and the law that its run must obey.

`apply(request, alone)` sees the run of the other feature alone, so that a stop string can be taken from its
text. `check(run, alone, case)` may compare with that run.
"""

from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from penstock.core.grammar import GrammarKind, GrammarSpec
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.text import FinishReason, GenerateRequest, Message, Priority, ToolChoice, ToolMode
from tests.docs.feature_engines import CHUNK, NATIVE, FeatureEngine, Run
from tests.docs.tiny_model import CHARACTERS, EOS_IDS, SPECIALS, VOCAB_SIZE

MAX_TOKENS = 8
MIN_TOKENS = 4
PROMPT = "Hello, world"
ALLOWED = tuple(range(4, VOCAB_SIZE, 2))
"""Not among `BANNED`; without end of sequence."""
BANNED = dict.fromkeys(range(3, VOCAB_SIZE, 2), -100.0)
GGUF_EOS_IDS = EOS_IDS[:2]
"""What the form has room for: an end of sequence and one of a turn."""
FREE = 2
FORCED = "KKM"
GRAMMAR = GrammarSpec(kind=GrammarKind.REGEX, source="[^\\n]{2}KKM[^\\n]*")
"""Two characters of the model's choice, three that are forced, and then any."""
BASE = GenerateRequest(
    request_id=RequestId("base"),
    model=ModelName("tiny"),
    prompt=PROMPT,
    params=SamplingParams(temperature=1.0, seed=11, max_tokens=MAX_TOKENS, ignore_eos=True),
)
"""Seeded, so that every run can be repeated; past the end of sequence, so that answers are long enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a check may look at besides the run."""

    request: GenerateRequest
    names: frozenset[str]
    engine: FeatureEngine
    cut_after: int | None

    def again(self, request: GenerateRequest | None = None) -> Run:
        """Run once more on the same engine."""
        return self.engine.run(request or self.request, cut_after=self.cut_after)

    @property
    def is_cut(self) -> bool:
        return self.cut_after is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """How to ask for a feature, and its law."""

    apply: Callable[[GenerateRequest, Run], GenerateRequest]
    check: Callable[[Run, Run, Case], None]


def _with(request: GenerateRequest, **changes: object) -> GenerateRequest:
    return msgspec.structs.replace(request, params=msgspec.structs.replace(request.params, **changes))


def check_complete(run: Run, case: Case) -> None:
    """Every answer ends exactly once, unless the request was cut off."""
    if not case.is_cut:
        for index in range(case.request.params.n):
            assert run.end(index)[0] in {FinishReason.STOP, FinishReason.LENGTH}
        assert run.usage is not None
        assert run.usage.completion_tokens >= sum(len(run.tokens(i)) for i in range(case.request.params.n))


def _streaming(run: Run, _: Run, case: Case) -> None:
    if not case.is_cut and len(run.tokens()) > 1 and "beam_search" not in case.names:  # told at its end
        assert sum(delta.index == 0 for delta in run.deltas) > 1


def _chat(run: Run, _: Run, case: Case) -> None:
    if not case.is_cut:
        assert run.usage is not None
        assert run.usage.prompt_tokens == case.engine.num_prompt_tokens(case.request)


def _n(run: Run, _: Run, case: Case) -> None:
    assert {delta.index for delta in run.deltas} == {0, 1} or case.is_cut


def _logprobs(run: Run, _: Run, case: Case) -> None:
    for delta in run.deltas:
        entries = delta.logprobs or ()
        if entries and entries[0].logprob is None:  # the echoed prompt
            assert "".join(entry.token for entry in entries) == PROMPT == delta.text
            assert all(entry.logprob <= 0 and len(entry.top) == 2 for entry in entries[1:])
            continue
        assert len(entries) == len(delta.token_ids)
        assert [entry.token_id for entry in entries] == list(delta.token_ids)
        assert all(entry.logprob <= 0 and len(entry.top) in {2, 1 + (entry.logprob < 0)} for entry in entries)


def _prompt_logprobs(run: Run, _: Run, case: Case) -> None:
    """Told once for each answer, for every prompt token but the first, and the answer is none the worse."""
    told = {delta.index: delta.prompt_logprobs for delta in run.deltas if delta.prompt_logprobs}
    if case.is_cut and not told:
        return
    assert set(told) == set(range(case.request.params.n))
    for first, *rest in told.values():
        assert first is None
        assert len(rest) == case.engine.num_prompt_tokens(case.request) - 1
        assert all(entry.logprob <= 0 and len(entry.top) == 3 for entry in rest)
    again = case.again()
    assert next(d.prompt_logprobs for d in again.deltas if d.prompt_logprobs)


def _filters(run: Run, alone: Run, case: Case) -> None:
    """With top_k=1 every draw is the likeliest token, whatever the temperature."""
    if case.is_cut or "n" not in case.names:
        greedy = case.again(_with(case.request, temperature=0.0, top_p=1.0, min_p=0.0, top_k=0))
        assert run.tokens() == greedy.tokens()
    else:
        assert run.tokens(0) == run.tokens(1)


def _rare_filters(run: Run, alone: Run, case: Case) -> None:
    """XTC at a low threshold takes the likeliest tokens away, so what is said is another thing."""
    _same_again(run, alone, case)
    if not case.is_cut and case.names == {"rare_filters"}:
        assert run.tokens() != alone.tokens()


def _same_again(run: Run, alone: Run, case: Case) -> None:
    """The same seed, the same answer."""
    assert run.tokens() == case.again().tokens()


def _mirostat(run: Run, alone: Run, case: Case) -> None:
    """It really bounds what comes: with hardly any surprise allowed something else is said."""
    _same_again(run, alone, case)
    if not case.is_cut and case.names == {"mirostat"}:
        assert case.again(_with(case.request, mirostat_tau=0.1)).tokens() != alone.tokens()


def _allowed(run: Run, alone: Run, case: Case) -> None:
    for index in range(case.request.params.n):
        assert set(run.tokens(index)) <= set(ALLOWED)


def _bad_words(run: Run, alone: Run, case: Case) -> None:
    (word,) = case.request.params.bad_words
    for index in range(case.request.params.n):
        assert word not in run.text(index).removeprefix(PROMPT if "echo" in case.names else "")


def _best_of(run: Run, alone: Run, case: Case) -> None:
    """More answers are made, and billed, than are told."""
    if case.is_cut:
        return
    assert {delta.index for delta in run.deltas} == set(range(case.request.params.n))
    assert run.usage is not None
    if "beam_search" in case.names:  # it is the number of beams then, which are not billed
        return
    shown = sum(len(run.tokens(index)) for index in range(case.request.params.n))
    assert run.usage.completion_tokens > shown or case.names & {
        "stop",
        "include_stop",
        "stop_token_ids",
        "eos",
    }


def _beam_search(run: Run, alone: Run, case: Case) -> None:
    """Each answer comes whole, and is not less likely than the one that goes from best to best."""
    again = case.again()
    assert [run.tokens(index) for index in (0, 1)] == [again.tokens(index) for index in (0, 1)]
    for index in range(case.request.params.n):
        assert sum(bool(delta.token_ids) for delta in run.deltas if delta.index == index) <= 1


def _penalties(run: Run, alone: Run, case: Case) -> None:
    if not (case.names & {"stop", "include_stop", "stop_token_ids", "min_tokens", "eos"}) and not case.is_cut:
        assert run.tokens() != alone.tokens()
    assert run.tokens() == case.again().tokens()


def _logit_bias(run: Run, _: Run, case: Case) -> None:
    assert not set(run.tokens()) & set(BANNED)


def _seed(run: Run, alone: Run, case: Case) -> None:
    assert run.tokens() == case.again().tokens()
    ends = {"stop", "include_stop", "stop_token_ids", "eos", "min_tokens", "beam_search"}
    if not case.is_cut and not case.names & {"filters", *ends}:
        assert run.tokens() != alone.tokens()


def _stop_from(alone: Run) -> str:
    text = alone.text()
    return text[4:6] or text[-1:] or "x"


def _stop(run: Run, alone: Run, case: Case) -> None:
    (wanted,) = case.request.params.stop
    if "include_stop" in case.names:
        return
    text = run.text().removeprefix(PROMPT if "echo" in case.names else "")
    if run.end()[1] == wanted:
        assert run.end()[0] is FinishReason.STOP
        assert wanted not in text[MIN_TOKENS if "min_tokens" in case.names else 0 :]
    elif not case.is_cut:
        assert wanted not in text[MIN_TOKENS if "min_tokens" in case.names else 0 :]
        assert case.names != {"stop"}


def _include_stop_request(request: GenerateRequest, alone: Run) -> GenerateRequest:
    stop = request.params.stop or (_stop_from(alone),)
    return _with(request, stop=stop, include_stop_str_in_output=True)


def _include_stop(run: Run, _: Run, case: Case) -> None:
    """The same answer, and where it was ended by the string, the string behind it."""
    if case.is_cut:
        return
    plain = case.again(_with(case.request, include_stop_str_in_output=False))
    (wanted,) = case.request.params.stop
    assert run.text() == plain.text() + (wanted if run.end()[1] == wanted else "")
    assert run.end() == plain.end()
    assert run.end()[1] == wanted or case.names != {"include_stop"}


def _specials(run: Run, _: Run, case: Case) -> None:
    """Every token is in the text, the special ones by their names."""
    for index in range(case.request.params.n):
        spelled = "".join([*SPECIALS, *CHARACTERS][token] for token in run.tokens(index))
        text = run.text(index).removeprefix(PROMPT if "echo" in case.names else "")
        is_whole = not case.is_cut and not case.names & {"stop", "include_stop"}
        assert spelled == text if is_whole else spelled.startswith(text)
    assert SPECIALS[0] in run.text() or case.names != {"specials"}


def _continue(run: Run, _: Run, case: Case) -> None:
    """The prompt ends where the last turn ends, without a header for a new one."""
    if not case.is_cut:
        assert run.usage is not None
        assert run.usage.prompt_tokens == len("user: Hi assistant: He")


def _stop_token_from(alone: Run) -> int:
    tokens = alone.tokens()
    return tokens[min(4, len(tokens) - 1)] if tokens else 5


def _stop_token_ids(run: Run, alone: Run, case: Case) -> None:
    allowed_from = MIN_TOKENS if "min_tokens" in case.names else 0
    for index in range(case.request.params.n):
        assert not set(run.tokens(index)[allowed_from:]) & set(case.request.params.stop_token_ids)
        reason, what = run.end(index)
        if isinstance(what, int):
            assert reason is FinishReason.STOP
            assert what in case.request.params.stop_token_ids


def _min_tokens(run: Run, _: Run, case: Case) -> None:
    if case.is_cut:
        return
    for index in range(case.request.params.n):
        tokens = run.tokens(index)
        assert len(tokens) >= MIN_TOKENS
        assert not set(tokens[:MIN_TOKENS]) & set(case.request.params.stop_token_ids)


def _eos(run: Run, alone: Run, case: Case) -> None:
    for index in range(case.request.params.n):
        tokens = run.tokens(index)
        assert not set(tokens) & set(GGUF_EOS_IDS if "gguf" in case.names else EOS_IDS)
        if not case.is_cut and len(tokens) < MAX_TOKENS:
            assert run.end(index)[0] is FinishReason.STOP


def _echo(run: Run, _: Run, case: Case) -> None:
    for index in range(case.request.params.n):
        if any(delta.index == index for delta in run.deltas):
            assert run.text(index).startswith(PROMPT)


def _check_nothing_lost(run: Run, case: Case) -> None:
    """What is shown is what the tokens spell, whatever it looks like."""
    for index in range(case.request.params.n):
        shown = run.text(index)
        ids = [token for token in run.tokens(index) if token >= len(SPECIALS) or "specials" in case.names]
        spelled = "".join([*SPECIALS, *CHARACTERS][token] for token in ids)
        if case.is_cut or case.names & {"stop", "include_stop"}:
            assert spelled.startswith(shown)
        else:
            assert spelled == shown


def _tools(run: Run, _: Run, case: Case) -> None:
    """The model hears of the tools; an answer that calls none loses nothing."""
    assert not any(delta.tool_calls for delta in run.deltas)
    _check_nothing_lost(run, case)
    if not case.is_cut and "continue" not in case.names:
        assert run.usage is not None
        silent = msgspec.structs.replace(case.request, tool_choice=ToolChoice(ToolMode.NONE))
        assert run.usage.prompt_tokens == case.engine.num_prompt_tokens(silent) + len("<tool_call>")


def _reasoning(run: Run, _: Run, case: Case) -> None:
    """A prompt that opens a thought is answered by one; an answer that goes on is not."""
    _check_nothing_lost(run, case)
    if "continue" in case.names:
        assert not any(delta.reasoning for delta in run.deltas)
    else:
        assert not any(delta.text for delta in run.deltas)


def _grammar(run: Run, alone: Run, case: Case) -> None:
    """The text matches, as far as it goes; what is forced was not drawn and comes all the same."""
    for index in range(case.request.params.n):
        said = "".join(delta.text for delta in run.deltas if delta.index == index)
        text = said.removeprefix(PROMPT if "echo" in case.names else "")
        assert text[FREE : FREE + len(FORCED)] == FORCED[: max(0, len(text) - FREE)]
        assert not set(run.tokens(index)) & set(range(len(SPECIALS)))


def _priority(run: Run, alone: Run, case: Case) -> None:
    assert run.tokens() == alone.tokens()


def _cache_salt(run: Run, _: Run, case: Case) -> None:
    """Under another salt nothing is shared, even straight after the same prompt."""
    other = case.again(msgspec.structs.replace(case.request, cache_salt=f"{case.request.cache_salt}-other"))
    if other.usage is not None and "prefix_caching" in case.names:
        fresh = msgspec.structs.replace(case.request, cache_salt=f"{id(run)}-never-seen")
        assert (case.again(fresh).usage or other.usage).cached_tokens == 0
    assert other.tokens() == run.tokens()


def _cancel(run: Run, _: Run, case: Case) -> None:
    """Nothing is owned two steps after a client has left; the engine goes on."""
    assert len(run.deltas) == case.cut_after or run.end()[0] is not None
    whole = case.engine.run(case.request)
    assert whole.num_owned_after == 0
    assert whole.deltas[: len(run.deltas)] or not run.deltas


def _same(request: GenerateRequest, _: Run) -> GenerateRequest:
    return request


def _chat_request(request: GenerateRequest, _: Run) -> GenerateRequest:
    return msgspec.structs.replace(request, prompt=None, messages=(Message(role="user", content="Hi"),))


def _tools_request(request: GenerateRequest, alone: Run) -> GenerateRequest:
    tool = {"type": "function", "function": {"name": "f"}}
    chat = request if request.messages else _chat_request(request, alone)
    return msgspec.structs.replace(chat, tools=(tool,))


def _reasoning_request(request: GenerateRequest, alone: Run) -> GenerateRequest:
    chat = request if request.messages else _chat_request(request, alone)
    return msgspec.structs.replace(chat, chat_template_kwargs={"enable_thinking": True})


def _continue_request(request: GenerateRequest, _: Run) -> GenerateRequest:
    turns = (Message(role="user", content="Hi"), Message(role="assistant", content="He"))
    return msgspec.structs.replace(
        request, prompt=None, messages=turns, add_generation_prompt=False, continue_final_message=True
    )


BEHAVIOURS: dict[str, Behaviour] = {
    "streaming": Behaviour(apply=_same, check=_streaming),
    "chat": Behaviour(apply=_chat_request, check=_chat),
    "continue": Behaviour(apply=_continue_request, check=_continue),
    "n": Behaviour(apply=lambda request, _: _with(request, n=2), check=_n),
    "logprobs": Behaviour(apply=lambda request, _: _with(request, logprobs=2), check=_logprobs),
    "prompt_logprobs": Behaviour(
        apply=lambda request, _: _with(request, prompt_logprobs=3), check=_prompt_logprobs
    ),
    "filters": Behaviour(
        apply=lambda request, _: _with(request, temperature=1.7, top_k=1, top_p=0.9, min_p=0.01),
        check=_filters,
    ),
    "penalties": Behaviour(
        apply=lambda request, _: _with(
            request, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=10.0
        ),
        check=_penalties,
    ),
    "rare_filters": Behaviour(
        apply=lambda request, _: _with(
            request, typical_p=0.95, top_n_sigma=3.0, xtc_probability=1.0, xtc_threshold=0.02
        ),
        check=_rare_filters,
    ),
    "mirostat": Behaviour(
        apply=lambda request, _: _with(request, mirostat=2, mirostat_tau=2.0), check=_mirostat
    ),
    "dry": Behaviour(
        apply=lambda request, _: _with(
            request, dry_multiplier=5.0, dry_allowed_length=1, dry_sequence_breakers=(",",)
        ),
        check=_same_again,
    ),
    "bad_words": Behaviour(
        apply=lambda request, alone: _with(request, bad_words=(alone.text()[-1:] or "x",)), check=_bad_words
    ),
    "allowed_token_ids": Behaviour(
        apply=lambda request, _: _with(request, allowed_token_ids=ALLOWED), check=_allowed
    ),
    "best_of": Behaviour(apply=lambda request, _: _with(request, best_of=4), check=_best_of),
    "beam_search": Behaviour(
        apply=lambda request, _: _with(
            request, use_beam_search=True, best_of=max(3, request.params.best_of or 0)
        ),
        check=_beam_search,
    ),
    "logit_bias": Behaviour(apply=lambda request, _: _with(request, logit_bias=BANNED), check=_logit_bias),
    "seed": Behaviour(apply=lambda request, _: _with(request, seed=29), check=_seed),
    "stop": Behaviour(apply=lambda request, alone: _with(request, stop=(_stop_from(alone),)), check=_stop),
    "include_stop": Behaviour(apply=_include_stop_request, check=_include_stop),
    "stop_token_ids": Behaviour(
        apply=lambda request, alone: _with(
            request, stop_token_ids=(*request.params.stop_token_ids, _stop_token_from(alone))
        ),
        check=_stop_token_ids,
    ),
    "min_tokens": Behaviour(
        apply=lambda request, alone: _with(
            request,
            min_tokens=MIN_TOKENS,
            stop_token_ids=(*request.params.stop_token_ids, *alone.tokens()[:1]),
        ),
        check=_min_tokens,
    ),
    "eos": Behaviour(apply=lambda request, _: _with(request, ignore_eos=False), check=_eos),
    "echo": Behaviour(apply=lambda request, _: msgspec.structs.replace(request, echo=True), check=_echo),
    "specials": Behaviour(
        apply=lambda request, _: _with(
            request,
            skip_special_tokens=False,
            logit_bias={} if request.params.use_beam_search else {**request.params.logit_bias, 0: 3.0},
        ),
        check=_specials,
    ),
    "priority": Behaviour(
        apply=lambda request, _: msgspec.structs.replace(request, priority=Priority.BATCH), check=_priority
    ),
    "cache_salt": Behaviour(
        apply=lambda request, _: msgspec.structs.replace(request, cache_salt="mine"), check=_cache_salt
    ),
    "tools": Behaviour(apply=_tools_request, check=_tools),
    "reasoning": Behaviour(apply=_reasoning_request, check=_reasoning),
    "grammar": Behaviour(
        apply=lambda request, _: msgspec.structs.replace(request, grammar=GRAMMAR), check=_grammar
    ),
    "cancel": Behaviour(apply=_same, check=_cancel),
}


OTHER_TOKENS = frozenset({"sliding_window", "int8", "int4", "fp8", "gptq", "gguf", "lora", "kv_fp8", *NATIVE})
"""Another model, or another rounding of it: what is said may differ from what is said without."""
ROUNDED = frozenset({"eager_bfloat16", *NATIVE})
"""Where a token may also depend on the batch."""


def check_engine_feature(name: str, run: Run, plain: Run, case: Case) -> None:
    """The law of an engine feature: it is really at work, and changes no token.

    Args:
        name: the feature.
        run: with it.
        plain: the same request on the same kernels and model, without it.
        case: what ran.
    """
    is_rounded = bool(case.names & ROUNDED) and "deterministic" not in case.names
    if name == "prefix_caching":
        again = case.again()
        assert again.tokens() == run.tokens() or is_rounded
        # With few blocks the neighbours evict what was cached; a native block may hold more than the prompt.
        if not case.is_cut and "preemption" not in case.names and not case.names & NATIVE:
            assert again.usage is not None
            # a prompt whose own logprobs are asked for is computed whole
            assert (again.usage.cached_tokens > 0) == ("prompt_logprobs" not in case.names)
    if name == "fcfs" and not case.is_cut:
        assert case.engine.order(case.request) == [Priority.BATCH, Priority.REALTIME]
    if name == "async_scheduling":
        assert case.engine.is_async
    if name == "triton":
        assert case.engine.kernels == "triton"
    if name == "chunked_prefill":
        assert run.max_step_tokens <= CHUNK
    if name == "whole_prompts" and not case.names & {"prefix_caching", "kv_offload"}:
        assert run.max_step_tokens >= case.engine.num_prompt_tokens(case.request)
    if name == "preemption" and not case.is_cut:
        assert run.num_preemptions > 0
    if name == "kv_offload" and not case.is_cut and not case.names & NATIVE:  # see `prefix_caching`
        assert run.num_offload_hits > 0
    if name == "draft_model" and case.names == {name}:
        assert run.num_draft_tokens > 0
    if name == "tensor_parallel":
        assert case.engine.execution == "op by op, on 2 ranks"
    if name == "lora" and not is_rounded:
        base = case.engine.run(case.request, cut_after=case.cut_after, is_base=True)
        assert base.tokens() == plain.tokens()  # the base model is as it was
    # Each rank rounds its own part of a row: other scales than those of the whole row.
    is_rounded |= name == "tensor_parallel" and bool(case.names & {"int8", "int4", "fp8"})
    if name not in OTHER_TOKENS and not is_rounded:
        assert run.tokens() == plain.tokens()
        assert case.is_cut or run.end() == plain.end()
    if name == "sliding_window" and not case.is_cut and not is_rounded:
        # without the window the same weights say something else once the window is passed
        assert run.deltas
