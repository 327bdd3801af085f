"""`POST /v1/embeddings`: vectors of texts or token ids."""

import sys
from array import array
from base64 import b64encode
from collections.abc import Sequence
from typing import Annotated, Final, Literal

from msgspec.structs import replace
from pydantic import Field

from penstock.core.pooled import Embedding, EmbedRequest
from penstock.core.text import Usage
from penstock.server.dialects.openai.asked import AskedFields, asked_model, call_fields, prompts_of
from penstock.server.dialects.openai.fields import TokenId
from penstock.server.replies import Reply, json_reply
from penstock.server.services import Call
from penstock.server.side_by_side import each
from penstock.server.validation import WHOLE, AnswerModel, Flag, Text

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


class EmbeddingsRequest(AskedFields):
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


def field_names(name: str, count: int) -> list[str]:
    """What errors call each of `count` values of a field."""
    return [name] if count == 1 else [f"{name}.{index}" for index in range(count)]


def to_requests(body: EmbeddingsRequest, *, call: Call) -> list[EmbedRequest]:
    """Wire to domain, one request per input.

    Raises:
        NotFoundError: no such model.
    """
    model = asked_model(body, call=call).name
    base = EmbedRequest(
        **call_fields(body, model=model, call=call),
        prompt="",
        pooling=body.pooling_type,
        dimensions=body.dimensions,
        normalize=body.normalize is not False,
        truncate_prompt_tokens=body.truncate_prompt_tokens,
        add_special_tokens=body.add_special_tokens is not False,
    )
    inputs = prompts_of(body.input)
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
