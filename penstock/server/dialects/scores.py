"""Scores and classes of texts: `/score` and `/classify` as vLLM has them, `/rerank` as Jina, Cohere and vLLM.

`/v1/...` and `/v2/rerank` are the same routes by other names. Every pair is a request of its own; all of a
client's request share the engine's steps.
"""

from collections.abc import Sequence
from typing import Annotated, Final, Literal

from msgspec.structs import replace
from pydantic import Field

from penstock.core.ids import ModelName
from penstock.core.pooled import ClassifyRequest, Score, ScoreRequest, pairs_of_texts
from penstock.server.dialects.openai.asked import AskedFields, asked_model, call_fields, prompts_of
from penstock.server.dialects.openai.embeddings import (
    Inputs,
    PromptUsage,
    field_names,
    prompt_usage,
)
from penstock.server.replies import Reply, json_reply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call
from penstock.server.side_by_side import each
from penstock.server.validation import WHOLE, AnswerModel, Flag, Text, WireModel

MAX_TEXTS: Final = 1024
MAX_INSTRUCTION_CHARS: Final = 2048

PairText = Annotated[Text, Field(min_length=1)]
PairTexts = PairText | Annotated[list[PairText], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)]
Instruction = Annotated[Text, Field(min_length=1, max_length=MAX_INSTRUCTION_CHARS)] | None
_INSTRUCTION_HELP: Final = "What the task is, for models that answer yes or no; default: web search."


class ScoresRequest(AskedFields):
    """Body of `/score`: one text against each of several, or as many pairs as there are texts."""

    text_1: PairTexts = Field(description="A query, or several.")
    text_2: PairTexts = Field(description="A document, or several; as many as queries, unless there is one.")
    instruction: Instruction = Field(default=None, description=_INSTRUCTION_HELP)


class ScoreItem(AnswerModel):
    """The score of one pair, 0 to 1."""

    index: int
    object: Literal["score"] = "score"
    score: float


class ScoresAnswer(AnswerModel):
    """Answer of `/score`; `data` is in the order of the pairs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ScoreItem]
    usage: PromptUsage


class TextDocument(WireModel):
    """A document as an object."""

    text: PairText


class RerankRequest(AskedFields):
    """Body of `/rerank`."""

    query: PairText
    documents: Annotated[
        list[PairText | TextDocument], Field(fail_fast=True, min_length=1, max_length=MAX_TEXTS)
    ]
    top_n: Annotated[int, Field(strict=True, ge=0, le=1 << 31), WHOLE] | None = Field(
        default=None, description="Tell so many of the best; 0 and absent: all."
    )
    return_documents: Flag | None = Field(default=None, description="Tell the texts as well; default true.")
    instruction: Instruction = Field(default=None, description=_INSTRUCTION_HELP)


class ShownDocument(AnswerModel):
    """A document, as it was sent."""

    text: str


class RerankItem(AnswerModel):
    """One document; `index` is its place in the request."""

    index: int
    relevance_score: float
    document: ShownDocument | None = None


class RerankAnswer(AnswerModel):
    """Answer of `/rerank`; `results` are the best first, equal ones in the order of the request."""

    id: str
    model: str
    results: list[RerankItem]
    usage: PromptUsage


class ClassesRequest(AskedFields):
    """Body of `/classify`."""

    input: Inputs = Field(
        union_mode="left_to_right", description="A text, several texts, token ids, or lists of them."
    )


class ClassItem(AnswerModel):
    """The classes of one input."""

    index: int
    label: str
    """The likeliest."""
    probs: list[float]
    num_classes: int


class ClassesAnswer(AnswerModel):
    """Answer of `/classify`; `data` is in the order of the inputs."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[ClassItem]
    usage: PromptUsage


def _as_list(texts: str | list[str]) -> list[str]:
    return [texts] if isinstance(texts, str) else texts


def _pairs(body: ScoresRequest) -> list[tuple[str, str, str]]:
    """Query, document and the document's name in the request.

    Raises:
        InvalidParameterError: neither one query nor as many as documents.
    """
    pairs = pairs_of_texts(_as_list(body.text_1), _as_list(body.text_2))
    names = field_names("text_2", len(pairs))
    return [(query, document, name) for (query, document), name in zip(pairs, names, strict=True)]


def _score_requests(
    body: ScoresRequest | RerankRequest,
    pairs: Sequence[tuple[str, str, str]],
    *,
    model: ModelName,
    call: Call,
) -> list[ScoreRequest]:
    base = ScoreRequest(
        **call_fields(body, model=model, call=call),
        query="",
        document="",
        instruction=body.instruction,
    )
    return [
        replace(base, query=query, document=document, field=field, request_id=call.new_engine_id())
        for query, document, field in pairs
    ]


async def score(call: Call) -> Reply:
    """Score each pair."""
    body = call.body
    assert isinstance(body, ScoresRequest)
    asked = asked_model(body, call=call)
    scores = await each(_score_requests(body, _pairs(body), model=asked.name, call=call), asked.client.score)
    return json_reply(
        ScoresAnswer(
            id=f"score-{call.request_id}",
            created=int(call.services.clock.wall()),
            model=asked.name,
            data=[ScoreItem(index=index, score=one.value) for index, one in enumerate(scores)],
            usage=prompt_usage([one.usage for one in scores]),
        )
    )


async def rerank(call: Call) -> Reply:
    """Order documents by how well they fit the query."""
    body = call.body
    assert isinstance(body, RerankRequest)
    asked = asked_model(body, call=call)
    documents = [one if isinstance(one, str) else one.text for one in body.documents]
    names = field_names("documents", len(documents))
    pairs = [(body.query, document, name) for document, name in zip(documents, names, strict=True)]
    scores = await each(_score_requests(body, pairs, model=asked.name, call=call), asked.client.score)
    return json_reply(
        RerankAnswer(
            id=f"rerank-{call.request_id}",
            model=asked.name,
            results=_results(scores, documents=documents, body=body),
            usage=prompt_usage([one.usage for one in scores]),
        )
    )


def _results(scores: Sequence[Score], *, documents: Sequence[str], body: RerankRequest) -> list[RerankItem]:
    order = sorted(range(len(scores)), key=lambda index: -scores[index].value)
    return [
        RerankItem(
            index=index,
            relevance_score=scores[index].value,
            document=None if body.return_documents is False else ShownDocument(text=documents[index]),
        )
        for index in order[: body.top_n or None]
    ]


async def classify(call: Call) -> Reply:
    """Tell the classes of each input."""
    body = call.body
    assert isinstance(body, ClassesRequest)
    asked = asked_model(body, call=call)
    inputs = prompts_of(body.input)
    requests = [
        ClassifyRequest(
            **call_fields(body, model=asked.name, call=call),
            prompt=prompt,
            field=field,
        )
        for prompt, field in zip(inputs, field_names("input", len(inputs)), strict=True)
    ]
    made = await each(requests, asked.client.classify)
    items = [
        ClassItem(
            index=index,
            label=max(zip(one.probabilities, one.labels, strict=True), key=lambda pair: pair[0])[1],
            probs=list(one.probabilities),
            num_classes=len(one.labels),
        )
        for index, one in enumerate(made)
    ]
    return json_reply(
        ClassesAnswer(
            id=f"classify-{call.request_id}",
            created=int(call.services.clock.wall()),
            model=asked.name,
            data=items,
            usage=prompt_usage([one.usage for one in made]),
        )
    )


def _score_route(path: str) -> Route:
    return Route(
        path=path,
        methods=("POST",),
        access=Access.USER,
        serve=score,
        body=ScoresRequest,
        counts_as_work=True,
        document=Document(summary="Score pairs of texts", answer=ScoresAnswer, tag="scores", also=(404,)),
    )


def _rerank_route(path: str) -> Route:
    return Route(
        path=path,
        methods=("POST",),
        access=Access.USER,
        serve=rerank,
        body=RerankRequest,
        counts_as_work=True,
        document=Document(
            summary="Order documents by a query", answer=RerankAnswer, tag="scores", also=(404,)
        ),
    )


ROUTES: Final[tuple[Route, ...]] = (
    *map(_score_route, ("/score", "/v1/score")),
    *map(_rerank_route, ("/rerank", "/v1/rerank", "/v2/rerank")),
    Route(
        path="/classify",
        methods=("POST",),
        access=Access.USER,
        serve=classify,
        body=ClassesRequest,
        counts_as_work=True,
        document=Document(summary="Classes of texts", answer=ClassesAnswer, tag="scores", also=(404,)),
    ),
)
