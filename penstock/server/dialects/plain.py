"""The plain API for scripts: `/generate` and `/stream`, by query or by JSON, on the default model.

A body with `inputs` is refused by name: that word is kept free for TGI's dialect on the same paths.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress
from functools import partial
from typing import Annotated, Final

from msgspec.structs import replace
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.params import INT64_MAX, validate_sampling
from penstock.core.text import GenerateRequest, Usage
from penstock.server.collect import Deltas, close_all, collect, submit
from penstock.server.dialects.openai.guided import StructuredOutputs, of_structured_outputs, only_one
from penstock.server.replies import Reply, StreamReply, json_reply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call
from penstock.server.sse import encode_text, frame
from penstock.server.validation import WHOLE, AnswerModel, Number, Text, WireModel

_NUMBERS: Final = ("max_tokens", "temperature")
_MAX_DIGITS: Final = 32


class PlainRequest(WireModel):
    """Query or body of `/generate` and `/stream`."""

    prompt: Annotated[Text, Field(min_length=1)]
    max_tokens: Annotated[int, Field(strict=True, ge=1, le=INT64_MAX), WHOLE] | None = Field(
        default=None, description="Absent: as many as the context holds."
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(default=None, description="Default 1.")
    structured_outputs: StructuredOutputs | None = Field(
        default=None, description="What the answer must look like; only in a JSON body."
    )


class PlainUsage(AnswerModel):
    """Tokens consumed."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class PlainAnswer(AnswerModel):
    """Answer of `/generate`; `text` and `response` are the same string."""

    text: str
    response: str
    usage: PlainUsage


def from_json(data: object) -> object:
    """Refuse TGI's word by name.

    Raises:
        InvalidParameterError: the body has `inputs`.
    """
    if isinstance(data, dict) and "inputs" in data:
        raise InvalidParameterError(
            "inputs is not supported by this version; write the text in prompt",
            code="unsupported_parameter",
            param="inputs",
        )
    return data


def from_query(query: dict[str, object]) -> object:
    """Make numbers of the fields that are numbers; what is none stays a string and is refused later."""
    numbers = {name: _number(query[name]) for name in _NUMBERS if name in query}
    return from_json(query | numbers)


def _number(value: object) -> object:
    """As JSON would read it; whether it must be whole is the model's affair."""
    if not (isinstance(value, str) and value.isascii() and len(value) <= _MAX_DIGITS and "_" not in value):
        return value
    for number in (int, float):
        with suppress(ValueError):
            return number(value)
    return value


def _to_request(call: Call) -> GenerateRequest:
    body = call.body
    assert isinstance(body, PlainRequest)
    card = call.services.catalog.resolve(None).card
    params = replace(card.default_sampling, max_tokens=body.max_tokens)
    if body.temperature is not None:
        params = replace(params, temperature=body.temperature)
    validate_sampling(params)
    wanted = body.structured_outputs
    asked = only_one({} if wanted is None else of_structured_outputs(wanted))
    return GenerateRequest(
        request_id=call.new_engine_id(),
        client_request_id=call.request_id,
        model=card.name,
        prompt=body.prompt,
        params=params,
        grammar=asked.spec,
        grammar_param=asked.param,
        tenant_id=call.tenant_id,
        arrival_s=call.arrival_s,
    )


def _usage(usage: Usage) -> PlainUsage:
    return PlainUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.total_tokens,
    )


async def generate(call: Call) -> Reply:
    """Answer as a whole."""
    request = _to_request(call)
    streams = await submit(call.services.catalog.resolve(request.model), [request])
    collected = await collect(streams, n=1)
    text = collected.answers[0].text
    return json_reply(PlainAnswer(text=text, response=text, usage=_usage(collected.usages[0])))


async def stream(call: Call) -> StreamReply:
    """Answer as events: `update` for each piece, `close` at the end."""
    request = _to_request(call)
    streams = await submit(call.services.catalog.resolve(request.model), [request])
    return StreamReply(frames=_frames(streams[0]), close=partial(close_all, streams))


async def _frames(deltas: Deltas) -> AsyncGenerator[bytes]:
    async with aclosing(deltas):
        async for delta in deltas:
            if delta.text:
                yield b'event: update\ndata: {"text":' + encode_text(delta.text) + b"}\n\n"
            if delta.usage is not None:
                yield frame(_usage(delta.usage).model_dump_json().encode(), event="close")


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        path="/generate",
        methods=("GET", "POST"),
        access=Access.USER,
        serve=generate,
        body=PlainRequest,
        from_json=from_json,
        from_query=from_query,
        counts_as_work=True,
        document=Document(summary="Continue a prompt", answer=PlainAnswer, tag="plain"),
    ),
    Route(
        path="/stream",
        methods=("GET", "POST"),
        access=Access.USER,
        serve=stream,
        body=PlainRequest,
        from_json=from_json,
        from_query=from_query,
        counts_as_work=True,
        document=Document(
            summary="Continue a prompt, as events", media_type="text/event-stream", tag="plain"
        ),
    ),
)
