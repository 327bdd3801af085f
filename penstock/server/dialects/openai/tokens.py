"""`POST /tokenize` and `POST /detokenize`, as at vLLM."""

from typing import Annotated, Final

from msgspec.structs import replace
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.ids import ModelName
from penstock.core.text import GenerateRequest
from penstock.server.dialects.openai.asked import MAX_MODEL_CHARS
from penstock.server.dialects.openai.chat import MAX_MESSAGES, ChatMessage, to_messages
from penstock.server.dialects.openai.fields import TokenId
from penstock.server.replies import Reply, json_reply
from penstock.server.services import Call
from penstock.server.validation import AnswerModel, Flag, Text, WireModel

_MAX_IDS: Final = 1_048_576


class TokenizeRequest(WireModel):
    """Body of `POST /tokenize`: exactly one of prompt and messages."""

    model: Annotated[Text, Field(min_length=1, max_length=MAX_MODEL_CHARS)] | None = None
    prompt: Text | None = None
    messages: (
        Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1, max_length=MAX_MESSAGES)] | None
    ) = None
    add_special_tokens: Flag | None = Field(
        default=None, description="Default true for a prompt, false for messages."
    )
    add_generation_prompt: Flag | None = Field(default=None, description="Default true; for messages only.")


class TokenizeAnswer(AnswerModel):
    """Token ids of the prompt or the rendered conversation."""

    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeRequest(WireModel):
    """Body of `POST /detokenize`."""

    model: Annotated[Text, Field(min_length=1, max_length=MAX_MODEL_CHARS)] | None = None
    tokens: Annotated[list[TokenId], Field(fail_fast=True, max_length=_MAX_IDS)]


class DetokenizeAnswer(AnswerModel):
    """Text of the token ids, special tokens included."""

    prompt: str


def _to_request(body: TokenizeRequest, *, call: Call) -> GenerateRequest:
    if (body.prompt is None) == (body.messages is None):
        raise InvalidParameterError("exactly one of prompt and messages must be given", param="prompt")
    if body.prompt is not None and body.add_generation_prompt is not None:
        raise InvalidParameterError("add_generation_prompt needs messages", param="add_generation_prompt")
    name = ModelName(body.model) if body.model else call.services.catalog.resolve(None).card.name
    base = GenerateRequest(request_id=call.request_id, model=name, tenant_id=call.tenant_id)
    if body.messages is None:
        return replace(base, prompt=body.prompt)
    return replace(
        base,
        messages=to_messages(body.messages),
        add_generation_prompt=body.add_generation_prompt is not False,
    )


async def tokenize(call: Call) -> Reply:
    """Count and list the tokens of a prompt."""
    body = call.body
    assert isinstance(body, TokenizeRequest)
    request = _to_request(body, call=call)
    client = call.services.catalog.resolve(request.model)
    special = body.add_special_tokens
    if special is None:
        special = body.prompt is not None
    tokens = await client.tokenize(request, add_special_tokens=special)
    return json_reply(
        TokenizeAnswer(count=len(tokens), max_model_len=client.card.max_model_len, tokens=tokens)
    )


async def detokenize(call: Call) -> Reply:
    """Text of token ids."""
    body = call.body
    assert isinstance(body, DetokenizeRequest)
    name = ModelName(body.model) if body.model else None
    text = await call.services.catalog.resolve(name).detokenize(body.tokens)
    return json_reply(DetokenizeAnswer(prompt=text))
