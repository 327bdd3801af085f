"""`POST /v1/embeddings`: vectors of texts or token ids."""

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Final, Literal, cast

from msgspec.structs import replace
from pydantic import Field

from penstock.core.ids import ModelName
from penstock.core.pooled import Embedding, EmbedRequest
from penstock.core.text import Priority, Usage
from penstock.server.dialects.openai.fields import MAX_LABEL_CHARS, MAX_MODEL_CHARS, MAX_SALT_CHARS, TokenId
from penstock.server.replies import Reply, json_reply
from penstock.server.services import Call
from penstock.server.side_by_side import each
from penstock.server.validation import WHOLE, AnswerModel, Flag, Text, WireModel

MAX_INPUTS: Final = 2048
MAX_IDS: Final = 4_194_304
MAX_DIMENSIONS: Final = 1 << 20

InputText = Annotated[Text, Field(min_length=1)]
InputIds = Annotated[list[TokenId], Field(fail_fast=True, min_length=1, max_length=MAX_IDS)]
Inputs = (
    InputText
    | InputIds
    | Annotated[list[InputText], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
    | Annotated[list[InputIds], Field(fail_fast=True, min_length=1, max_length=MAX_INPUTS)]
)


class InputFields(WireModel):
    """What all requests for vectors, scores and classes may say."""

    model: Annotated[Text, Field(min_length=1, max_length=MAX_MODEL_CHARS)] | None = None
    priority: Literal["realtime", "interactive", "batch"] | None = Field(
        default=None, description="Tier; a lower one is served only when no higher one waits."
    )
    cache_salt: Annotated[Text, Field(max_length=MAX_SALT_CHARS)] | None = Field(
        default=None, description="Requests with different salts never share cached prompt blocks."
    )
    user: Annotated[Text, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="A label for the client's own use: neither stored nor logged."
    )


class EmbeddingsRequest(InputFields):
    """Body of `POST /v1/embeddings`."""

    input: Inputs = Field(
        union_mode="left_to_right",
        description=f"A text, up to {MAX_INPUTS} texts, token ids, or up to {MAX_INPUTS} lists of them.",
    )
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="base64 is the bytes of little-endian float32; default float."
    )
    dimensions: Annotated[int, Field(strict=True, ge=1, le=MAX_DIMENSIONS), WHOLE] | None = Field(
        default=None, description="Keep the first so many numbers, at most the model's hidden size."
    )
    normalize: Flag | None = Field(default=None, description="Scale vectors to length 1; default true.")
    pooling_type: Literal["mean", "last"] | None = Field(
        default=None, description="Default: as the checkpoint says, else last."
    )
    truncate_prompt_tokens: Annotated[int, Field(strict=True, ge=-1, le=MAX_IDS), WHOLE] | None = Field(
        default=None,
        description="Keep the first so many tokens of each input, -1 for the context; without it longer "
        "inputs are refused.",
    )
    add_special_tokens: Flag | None = Field(
        default=None, description="Let the tokenizer add its own tokens to texts; default true."
    )


class EmbeddingItem(AnswerModel):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class PromptUsage(AnswerModel):
    """Tokens consumed; nothing is generated."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(AnswerModel):
    """Answer of `POST /v1/embeddings`; `data` is in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[EmbeddingItem]
    model: str
    usage: PromptUsage


def prompt_usage(usages: Sequence[Usage]) -> PromptUsage:
    """The sum over all parts of a request."""
    total = sum(usage.prompt_tokens for usage in usages)
    return PromptUsage(prompt_tokens=total, total_tokens=total)


def inputs_of(value: object) -> list[str | tuple[int, ...]]:
    """One or several texts or lists of ids, as validated, to a list of them."""
    if isinstance(value, str):
        return [value]
    assert isinstance(value, list)
    if isinstance(value[0], int):
        return [tuple(value)]
    return [item if isinstance(item, str) else tuple(item) for item in cast("list[str | list[int]]", value)]


def priority_of(fields: InputFields) -> Priority:
    """The tier by its word."""
    return Priority[(fields.priority or "interactive").upper()]


def field_names(name: str, count: int) -> list[str]:
    """What errors call each of `count` values of a field."""
    return [name] if count == 1 else [f"{name}.{index}" for index in range(count)]


def to_requests(body: EmbeddingsRequest, *, call: Call) -> list[EmbedRequest]:
    """Wire to domain, one request per input.

    Raises:
        NotFoundError: no such model.
    """
    client = call.services.catalog.resolve(None if body.model is None else ModelName(body.model))
    base = EmbedRequest(
        request_id=call.new_engine_id(),
        client_request_id=call.request_id,
        model=client.card.name if body.model is None else ModelName(body.model),
        prompt="",
        pooling=body.pooling_type,
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        add_special_tokens=body.add_special_tokens is not False,
        priority=priority_of(body),
        tenant_id=call.tenant_id,
        cache_salt=body.cache_salt or "",
        arrival_s=call.arrival_s,
    )
    inputs = inputs_of(body.input)
    return [
        replace(base, prompt=prompt, field=field, request_id=call.new_engine_id())
        for prompt, field in zip(inputs, field_names("input", len(inputs)), strict=True)
    ]


def _shown(embedding: Embedding, *, as_text: bool) -> list[float] | str:
    if not as_text:
        return list(embedding.values)
    numbers = array("f", embedding.values)
    if sys.byteorder == "big":
        numbers.byteswap()
    return b64encode(numbers.tobytes()).decode()


async def embeddings(call: Call) -> Reply:
    """Serve one request; its inputs share the engine's steps."""
    body = call.body
    assert isinstance(body, EmbeddingsRequest)
    requests = to_requests(body, call=call)
    model = requests[0].model
    made = await each(requests, call.services.catalog.resolve(model).embed)
    as_text = body.encoding_format == "base64"
    data = [
        EmbeddingItem(index=index, embedding=_shown(one, as_text=as_text)) for index, one in enumerate(made)
    ]
    usage = prompt_usage([one.usage for one in made])
    return json_reply(EmbeddingsAnswer(data=data, model=model, usage=usage))
