"""`GET /v1/models` and `GET /v1/models/{model}`."""

from typing import Literal

from penstock.core.ids import ModelName
from penstock.core.text import ModelCard
from penstock.server.replies import Reply, json_reply
from penstock.server.services import Call
from penstock.server.validation import AnswerModel


class ModelAnswer(AnswerModel):
    """One model, as OpenAI writes it, with vLLM's extras."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["penstock"] = "penstock"
    root: str | None
    parent: str | None
    max_model_len: int


class ModelList(AnswerModel):
    """All names of all models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


def _answer(card: ModelCard) -> ModelAnswer:
    return ModelAnswer(
        id=card.name,
        created=card.created_unix_s,
        root=card.root or None,
        parent=card.parent,
        max_model_len=card.max_model_len,
    )


async def list_models(call: Call) -> Reply:
    """All names, aliases too."""
    return json_reply(ModelList(data=[_answer(card) for card in call.services.catalog.cards()]))


async def get_model(call: Call) -> Reply:
    """One name."""
    return json_reply(_answer(call.services.catalog.card(ModelName(call.path_params["model"]))))
