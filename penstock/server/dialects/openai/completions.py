"""`POST /v1/completions`: raw prompts, one or several, as text or token ids."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Annotated, Final, Literal

from msgspec.structs import replace
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.params import INT64_MAX, MAX_TOP_LOGPROBS
from penstock.core.text import GenerateRequest, TextDelta, Usage
from penstock.server.collect import Answer, Deltas, close_all, collect, merge, submit
from penstock.server.dialects.openai.answers import (
    CompletionLogprobs,
    Finish,
    PromptToken,
    UsageAnswer,
    completion_logprobs,
    finish_word,
    prompt_logprobs,
    usage_answer,
)
from penstock.server.dialects.openai.asked import prompts_of
from penstock.server.dialects.openai.fields import (
    SamplingFields,
    TokenId,
    TopLogprobs,
    base_request,
    default_sampling,
    sampling_params,
)
from penstock.server.replies import Reply, StreamReply, json_reply
from penstock.server.services import Call
from penstock.server.sse import DONE, encode, encode_text
from penstock.server.validation import WHOLE, AnswerModel, Flag, Text, describe

MAX_PROMPTS: Final = 32
_DEFAULT_MAX_TOKENS: Final = 16
_MAX_IDS: Final = 4_194_304

PromptText = Annotated[Text, Field(min_length=1)]
PromptIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=_MAX_IDS)]
Prompts = (
    PromptText
    | PromptIds
    | Annotated[list[PromptText], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
    | Annotated[list[PromptIds], Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS)]
)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: Prompts = Field(
        union_mode="left_to_right",
        description="A text, a list of texts, token ids, or a list of lists of them.",
    )
    max_tokens: (
        Annotated[int, Field(strict=True, le=INT64_MAX, json_schema_extra={"minimum": 0}), WHOLE] | None
    ) = Field(default=None, description="Default 16; at least 1, or 0 with echo.")
    logprobs: TopLogprobs | None = Field(
        default=None, description=f"How many likelier tokens to tell, up to {MAX_TOP_LOGPROBS}."
    )
    echo: Flag | None = Field(
        default=None, description="Begin the answer with the prompt; with logprobs, those of the prompt too."
    )


class CompletionChoice(AnswerModel):
    """One of n answers to one of the prompts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    prompt_logprobs: list[PromptToken | None] | None = None
    finish_reason: Finish
    stop_reason: int | str | None = None


class CompletionAnswer(AnswerModel):
    """Answer of `POST /v1/completions`; `index` is prompt times n plus answer."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer
    system_fingerprint: None = None


def _max_tokens(body: CompletionRequest) -> int:
    """One limit in one place: a schema cannot tell that it depends on `echo`."""
    max_tokens = _DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    if max_tokens < (0 if body.echo else 1):
        raise InvalidParameterError(
            f"max_tokens is {describe(max_tokens)}, it must be at least 1, or 0 with echo", param="max_tokens"
        )
    return max_tokens


def to_requests(body: CompletionRequest, *, call: Call) -> list[GenerateRequest]:
    """Wire to domain, one request per prompt.

    Raises:
        InvalidParameterError: fields that contradict each other.
        NotFoundError: no such model.
    """
    echo = body.echo is True
    params = sampling_params(
        body,
        defaults=default_sampling(body, call=call),
        max_tokens=_max_tokens(body),
        logprobs=body.logprobs,
        allow_zero_max_tokens=echo,
    )
    base = replace(base_request(body, call=call, params=params), echo=echo)
    return [
        replace(base, prompt=prompt, request_id=call.new_engine_id()) for prompt in prompts_of(body.prompt)
    ]


def _choice(answer: Answer, *, index: int, with_logprobs: bool) -> CompletionChoice:
    assert answer.finish_reason is not None
    return CompletionChoice(
        index=index,
        text=answer.text,
        logprobs=completion_logprobs(tuple(answer.logprobs)) if with_logprobs else None,
        prompt_logprobs=prompt_logprobs(answer.prompt_logprobs),
        finish_reason=finish_word(answer.finish_reason),
        stop_reason=answer.stop_reason,
    )


async def completions(call: Call) -> Reply | StreamReply:
    """Serve one request; several prompts run side by side."""
    body = call.body
    assert isinstance(body, CompletionRequest)
    requests = to_requests(body, call=call)
    model, n = requests[0].model, requests[0].params.n
    streams = await submit(call.services.catalog.resolve(model), requests)
    answer_id = f"cmpl-{call.request_id}"
    created = int(call.services.clock.wall())
    if body.stream:
        chunks = CompletionChunks(
            answer_id, created=created, model=model, n=n, include_usage=body.include_usage
        )
        return StreamReply(frames=chunks.frames(streams), close=partial(close_all, streams))
    collected = await collect(streams, n=n)
    with_logprobs = body.logprobs is not None
    choices = [
        _choice(answer, index=index, with_logprobs=with_logprobs)
        for index, answer in enumerate(collected.answers)
    ]
    return json_reply(
        CompletionAnswer(
            id=answer_id, created=created, model=model, choices=choices, usage=usage_answer(collected.usages)
        )
    )


class CompletionChunks:
    """Bytes of a completions stream: everything that does not change is encoded once per answer."""

    def __init__(self, answer_id: str, *, created: int, model: str, n: int, include_usage: bool) -> None:
        head = encode({"id": answer_id, "object": "text_completion", "created": created, "model": model})
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._usage_null = b',"usage":null' if include_usage else b""
        self._tail = b',"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}\n\n"
        self._include_usage = include_usage
        self._n = n
        self._texts: dict[int, bytes] = {}

    def text(self, index: int, text: str) -> bytes:
        """A piece of one answer: the fast path."""
        prefix = self._texts.get(index)
        if prefix is None:
            prefix = self._texts[index] = self._head + b'{"index":%d,"text":' % index
        return prefix + encode_text(text) + self._tail

    def full(self, index: int, delta: TextDelta) -> bytes:
        """A chunk with log-probabilities or the end of an answer."""
        logprobs = b"null"
        if delta.logprobs:
            logprobs = completion_logprobs(delta.logprobs).model_dump_json().encode()
        end = b"null"
        if delta.finish_reason is not None:
            end = encode(finish_word(delta.finish_reason)) + b',"stop_reason":' + encode(delta.stop_reason)
        return (
            self._head
            + b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}]'
            % (index, encode_text(delta.text), logprobs, end)
            + self._usage_null
            + b"}\n\n"
        )

    def usage(self, usages: list[Usage]) -> bytes:
        """Last chunk, without choices."""
        answer: UsageAnswer = usage_answer(usages)
        return self._head + b'],"usage":' + answer.model_dump_json().encode() + b"}\n\n"

    async def frames(self, streams: Sequence[Deltas]) -> AsyncGenerator[bytes]:
        """All frames of the stream, up to `[DONE]`; the prompts' answers come interleaved."""
        usages: list[Usage] = []
        async with aclosing(merge(streams)) as deltas:
            async for which, delta in deltas:
                index = which * self._n + delta.index
                if delta.finish_reason is None and not delta.logprobs:
                    if delta.text:
                        yield self.text(index, delta.text)
                else:
                    yield self.full(index, delta)
                if delta.usage is not None:
                    usages.append(delta.usage)
        if self._include_usage:
            yield self.usage(usages)
        yield DONE
