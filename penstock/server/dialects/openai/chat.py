"""`POST /v1/chat/completions`: wire to `GenerateRequest`, `TextDelta`s to an answer or a stream."""

from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Final, Literal

from msgspec.structs import replace
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.params import INT64_MAX
from penstock.core.text import GenerateRequest, Message, TextDelta, Usage
from penstock.core.tools import validate_tools
from penstock.server.body import parse_json
from penstock.server.collect import Answer, Deltas, close_all, collect, submit
from penstock.server.dialects.openai.answers import (
    ChatLogprobs,
    Finish,
    PromptToken,
    UsageAnswer,
    chat_logprobs,
    finish_word,
    prompt_logprobs,
    usage_answer,
)
from penstock.server.dialects.openai.fields import (
    SamplingFields,
    TopLogprobs,
    base_request,
    default_sampling,
    sampling_params,
)
from penstock.server.dialects.openai.tools import (
    AnsweredToolCall,
    FunctionCall,
    OmitsNull,
    ToolChoiceField,
    Tools,
    encode_call_delta,
    to_tool_choice,
    to_tools,
)
from penstock.server.replies import Reply, StreamReply, json_reply
from penstock.server.services import Call
from penstock.server.sse import DONE, encode, encode_text
from penstock.server.validation import WHOLE, AnswerModel, Flag, Text, WireModel

MAX_MESSAGES: Final = 1024
MAX_PARTS: Final = 256
MAX_TOOL_CALLS: Final = 128
MAX_NAME_CHARS: Final = 256
MAX_VARIABLES: Final = 16


class TextPart(WireModel):
    """A piece of a message; the pieces of one message are joined."""

    type: Literal["text"]
    text: Text


class CalledFunction(WireModel):
    """What an earlier answer called."""

    name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    arguments: Text = Field(description="A JSON object, as text.")


class ToolCall(WireModel):
    """One call of an earlier answer."""

    id: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = None
    type: Literal["function"]
    function: CalledFunction


class ChatMessage(WireModel):
    """One turn; `developer` is the newer word for `system`.

    The model's chat template gets every field that is set; what it makes of `name`, `tool_calls` and
    `tool_call_id` is its own affair.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Text | Annotated[list[TextPart], Field(fail_fast=True, min_length=1, max_length=MAX_PARTS)] | None
    ) = None
    name: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = Field(
        default=None,
        description="Handed to the model's chat template; it changes the prompt only if the template reads "
        "it.",
    )
    tool_calls: Annotated[list[ToolCall], Field(fail_fast=True, max_length=MAX_TOOL_CALLS)] | None = Field(
        default=None,
        description="Of an earlier answer, for role assistant. Handed to the model's chat template; they "
        "change the prompt only if the template reads them.",
    )
    tool_call_id: Annotated[Text, Field(max_length=MAX_NAME_CHARS)] | None = Field(
        default=None,
        description="The call that this message answers, for role tool. Handed to the model's chat template; "
        "it changes the prompt only if the template reads it.",
    )
    reasoning_content: Text | None = Field(
        default=None,
        description="Of an earlier answer, for role assistant. Handed to the model's chat template; it "
        "changes the prompt only if the template reads it.",
    )
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Annotated[list[None], Field(max_length=0)] | None = None


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)]
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=INT64_MAX), WHOLE] | None = Field(
        default=None, description="Older name of max_completion_tokens."
    )
    max_completion_tokens: Annotated[int, Field(strict=True, ge=1, le=INT64_MAX), WHOLE] | None = Field(
        default=None, description="Absent: as many as the context holds."
    )
    logprobs: Flag | None = None
    top_logprobs: TopLogprobs | None = Field(default=None, description="Needs logprobs.")
    add_generation_prompt: Flag | None = Field(default=None, description="Default true.")
    continue_final_message: Flag | None = Field(
        default=None, description="Go on with the last message; needs add_generation_prompt false."
    )
    echo: Literal[False] | None = None
    tools: Tools | None = Field(default=None, description="What the model may call.")
    tool_choice: ToolChoiceField | None = Field(
        default=None,
        description="Default auto. With none the model does not hear of the tools; needs tools unless none.",
    )
    parallel_tool_calls: Flag | None = Field(
        default=None,
        description="Default true; false ends the answer with its first call. Means nothing without tools.",
    )
    include_reasoning: Flag | None = Field(
        default=None, description="Default true; false leaves reasoning_content out of the answer."
    )
    chat_template_kwargs: Annotated[dict[str, object], Field(max_length=MAX_VARIABLES)] | None = Field(
        default=None, description="Variables for the model's chat template, which must read them."
    )


class ChatAnswerMessage(OmitsNull):
    """The model's turn; `content` is null if it only calls tools."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | None = None
    tool_calls: list[AnsweredToolCall] | None = None


class ChatChoice(AnswerModel):
    """One of n answers."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: Finish
    stop_reason: int | str | None = None


class ChatAnswer(AnswerModel):
    """Answer of `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer
    prompt_logprobs: list[PromptToken | None] | None = None
    system_fingerprint: None = None


def _joined(content: str | list[TextPart] | None) -> str | None:
    return "".join(part.text for part in content) if isinstance(content, list) else content


def _tool_call(call: ToolCall, *, path: str) -> dict[str, object]:
    arguments: object = None
    with suppress(InvalidParameterError):
        arguments = parse_json(call.function.arguments.encode())
    if not isinstance(arguments, dict):
        raise InvalidParameterError(f"{path} must be a JSON object, as text", param=path)
    function: dict[str, object] = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _message(message: ChatMessage, *, index: int) -> Message:
    path = f"messages.{index}"
    calls = message.tool_calls or []
    if message.content is None and not (message.role == "assistant" and calls):
        raise InvalidParameterError(
            f"{path}.content is missing, only an assistant's message with tool_calls may be without",
            code="missing",
            param=f"{path}.content",
        )
    if calls and message.role != "assistant":
        raise InvalidParameterError(
            f"{path}.tool_calls is given for role {message.role}, it belongs to assistant",
            param=f"{path}.tool_calls",
        )
    if message.tool_call_id is not None and message.role != "tool":
        raise InvalidParameterError(
            f"{path}.tool_call_id is given for role {message.role}, it belongs to tool",
            param=f"{path}.tool_call_id",
        )
    if message.reasoning_content is not None and message.role != "assistant":
        raise InvalidParameterError(
            f"{path}.reasoning_content is given for role {message.role}, it belongs to assistant",
            param=f"{path}.reasoning_content",
        )
    return Message(
        role="system" if message.role == "developer" else message.role,
        content=_joined(message.content),
        reasoning_content=message.reasoning_content,
        name=message.name,
        tool_calls=tuple(
            _tool_call(each, path=f"{path}.tool_calls.{i}.function.arguments") for i, each in enumerate(calls)
        ),
        tool_call_id=message.tool_call_id,
    )


def to_messages(messages: list[ChatMessage]) -> tuple[Message, ...]:
    """A conversation in domain types.

    Raises:
        InvalidParameterError: a message whose fields do not fit its role.
    """
    return tuple(_message(message, index=index) for index, message in enumerate(messages))


def _max_tokens(body: ChatRequest) -> int | None:
    if body.max_tokens is not None and body.max_completion_tokens not in {None, body.max_tokens}:
        raise InvalidParameterError(
            f"max_tokens is {body.max_tokens} and max_completion_tokens is {body.max_completion_tokens}, "
            "they must agree",
            param="max_tokens",
        )
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def _logprobs(body: ChatRequest) -> int | None:
    if body.logprobs is not True:
        if body.top_logprobs:
            raise InvalidParameterError("top_logprobs needs logprobs to be true", param="top_logprobs")
        return None
    return body.top_logprobs or 0


def _turns(body: ChatRequest) -> tuple[bool, bool]:
    go_on = body.continue_final_message is True
    add = body.add_generation_prompt is not False
    if go_on and body.add_generation_prompt is True:
        raise InvalidParameterError(
            "continue_final_message and add_generation_prompt cannot both be true",
            param="continue_final_message",
        )
    return add and not go_on, go_on


def to_request(body: ChatRequest, *, call: Call) -> GenerateRequest:
    """Wire to domain.

    Raises:
        InvalidParameterError: fields that contradict each other.
        NotFoundError: no such model.
    """
    params = sampling_params(
        body,
        defaults=default_sampling(body, call=call),
        max_tokens=_max_tokens(body),
        logprobs=_logprobs(body),
    )
    add_generation_prompt, continue_final_message = _turns(body)
    base = base_request(body, call=call, params=params)
    request = replace(
        base,
        messages=to_messages(body.messages),
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        tools=to_tools(body.tools),
        tool_choice=to_tool_choice(body.tool_choice, has_tools=bool(body.tools)),
        parallel_tool_calls=body.parallel_tool_calls is not False,
        include_reasoning=body.include_reasoning is not False,
        chat_template_kwargs=dict(body.chat_template_kwargs or {}),
    )
    validate_tools(request)
    return request


def _answer_message(answer: Answer) -> ChatAnswerMessage:
    calls = [
        AnsweredToolCall(id=call.id, function=FunctionCall(name=call.name, arguments=call.arguments))
        for call in answer.calls
    ]
    return ChatAnswerMessage(
        content=answer.text or (None if calls else ""),
        reasoning_content=answer.reasoning or None,
        tool_calls=calls or None,
    )


def _choice(answer: Answer, *, index: int, with_logprobs: bool) -> ChatChoice:
    assert answer.finish_reason is not None
    return ChatChoice(
        index=index,
        message=_answer_message(answer),
        logprobs=chat_logprobs(tuple(answer.logprobs)) if with_logprobs else None,
        finish_reason=finish_word(answer.finish_reason),
        stop_reason=answer.stop_reason,
    )


async def chat_completions(call: Call) -> Reply | StreamReply:
    """Serve one request; the head of a stream is sent only when the engine has accepted it."""
    body = call.body
    assert isinstance(body, ChatRequest)
    request = to_request(body, call=call)
    streams = await submit(call.services.catalog.resolve(request.model), [request])
    answer_id = f"chatcmpl-{call.request_id}"
    created = int(call.services.clock.wall())
    if body.stream:
        chunks = ChatChunks(answer_id, created=created, model=request.model, include_usage=body.include_usage)
        frames = chunks.frames(streams[0], with_logprobs=bool(body.logprobs))
        return StreamReply(frames=frames, close=partial(close_all, streams))
    collected = await collect(streams, n=request.params.n)
    choices = [
        _choice(answer, index=index, with_logprobs=bool(body.logprobs))
        for index, answer in enumerate(collected.answers)
    ]
    return json_reply(
        ChatAnswer(
            id=answer_id,
            created=created,
            model=request.model,
            choices=choices,
            usage=usage_answer(collected.usages),
            prompt_logprobs=prompt_logprobs(collected.answers[0].prompt_logprobs),
        )
    )


class ChatChunks:
    """Bytes of a chat stream: everything that does not change is encoded once per answer."""

    def __init__(self, answer_id: str, *, created: int, model: str, include_usage: bool) -> None:
        head = encode(
            {"id": answer_id, "object": "chat.completion.chunk", "created": created, "model": model}
        )
        self._head = b"data: " + head[:-1] + b',"choices":['
        self._usage_null = b',"usage":null' if include_usage else b""
        self._include_usage = include_usage
        self._tail = b'},"logprobs":null,"finish_reason":null}]' + self._usage_null + b"}\n\n"
        self._texts: dict[int, bytes] = {}

    def role(self, index: int) -> bytes:
        """First chunk of one answer."""
        return self._head + b'{"index":%d,"delta":{"role":"assistant","content":""' % index + self._tail

    def text(self, index: int, text: str) -> bytes:
        """A piece of one answer: the fast path, four byte strings glued together."""
        prefix = self._texts.get(index)
        if prefix is None:
            prefix = self._texts[index] = self._head + b'{"index":%d,"delta":{"content":' % index
        return prefix + encode_text(text) + self._tail

    def full(self, delta: TextDelta, *, with_logprobs: bool) -> bytes:
        """A chunk with log-probabilities or the end of an answer."""
        logprobs = b"null"
        if with_logprobs and delta.logprobs:
            logprobs = chat_logprobs(delta.logprobs).model_dump_json().encode()
        content = b'"content":' + encode_text(delta.text) if delta.text or delta.logprobs else b""
        end = b"null"
        if delta.finish_reason is not None:
            end = encode(finish_word(delta.finish_reason)) + b',"stop_reason":' + encode(delta.stop_reason)
        return (
            self._head
            + b'{"index":%d,"delta":{%b},"logprobs":%b,"finish_reason":%b}]'
            % (delta.index, content, logprobs, end)
            + self._usage_null
            + b"}\n\n"
        )

    def part(self, index: int, name: bytes, value: bytes) -> bytes:
        """A chunk with one part of the answer that is not content; `value` is JSON."""
        return self._head + b'{"index":%d,"delta":{%b:%b' % (index, name, value) + self._tail

    def pieces(self, delta: TextDelta, *, with_logprobs: bool) -> Iterator[bytes]:
        """The chunks of one delta: thought, content with logprobs, calls, end."""
        if delta.reasoning:
            yield self.part(delta.index, b'"reasoning_content"', encode_text(delta.reasoning))
        is_end = delta.finish_reason is not None
        if not delta.tool_calls and (is_end or delta.logprobs):
            yield self.full(delta, with_logprobs=with_logprobs)
            return
        if delta.logprobs:
            yield self.full(replace(delta, finish_reason=None), with_logprobs=with_logprobs)
        elif delta.text:
            yield self.text(delta.index, delta.text)
        for call in delta.tool_calls:
            yield self.part(delta.index, b'"tool_calls"', encode_call_delta(call))
        if is_end:
            yield self.full(replace(delta, text="", logprobs=None), with_logprobs=False)

    def usage(self, usage: Usage) -> bytes:
        """Last chunk, without choices."""
        answer: UsageAnswer = usage_answer([usage])
        return self._head + b'],"usage":' + answer.model_dump_json().encode() + b"}\n\n"

    async def frames(self, deltas: Deltas, *, with_logprobs: bool) -> AsyncGenerator[bytes]:
        """All frames of the stream, up to `[DONE]`."""
        started: set[int] = set()
        async with aclosing(deltas):
            async for delta in deltas:
                if delta.index not in started:
                    started.add(delta.index)
                    yield self.role(delta.index)
                for piece in self.pieces(delta, with_logprobs=with_logprobs):
                    yield piece
                if delta.usage is not None and self._include_usage:
                    yield self.usage(delta.usage)
        yield DONE
