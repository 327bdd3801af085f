"""What requests for answers and requests for vectors, scores and classes have in common on the wire."""

from dataclasses import dataclass
from typing import Annotated, Final, Literal, TypedDict, cast

from pydantic import Field

from penstock.core.ids import ModelName, RequestId, TenantId
from penstock.core.ports import ModelClient
from penstock.core.text import Priority
from penstock.server.services import Call
from penstock.server.validation import Text, WireModel

MAX_MODEL_CHARS: Final = 128
MAX_LABEL_CHARS: Final = 512
MAX_SALT_CHARS: Final = 256


class AskedFields(WireModel):
    """Who is asked, and how; null is the same as absent."""

    model: Annotated[Text, Field(min_length=1, max_length=MAX_MODEL_CHARS)] | None = Field(
        default=None, description="A name from GET /v1/models; absent: the server's default model."
    )
    priority: Literal["realtime", "interactive", "batch"] | None = Field(
        default=None, description="Tier; a lower one is served only when no higher one waits."
    )
    cache_salt: Annotated[Text, Field(max_length=MAX_SALT_CHARS)] | None = Field(
        default=None, description="Requests with different salts never share cached prompt blocks."
    )
    user: Annotated[Text, Field(max_length=MAX_LABEL_CHARS)] | None = Field(
        default=None, description="A label for the client's own use: neither stored nor logged."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedModel:
    """Who answers."""

    client: ModelClient
    name: ModelName
    """By which the client asked; the answer bears it."""


class CallFields(TypedDict):
    """What every request of the domain takes from the call."""

    request_id: RequestId
    client_request_id: RequestId
    model: ModelName
    priority: Priority
    tenant_id: TenantId
    cache_salt: str
    arrival_s: float


def asked_model(fields: AskedFields, *, call: Call) -> AskedModel:
    """The model that `fields` names, or the default one.

    Raises:
        NotFoundError: no such model.
    """
    wanted = None if fields.model is None else ModelName(fields.model)
    client = call.services.catalog.resolve(wanted)
    return AskedModel(client=client, name=client.card.name if wanted is None else wanted)


def call_fields(fields: AskedFields, *, model: ModelName, call: Call) -> CallFields:
    """Arguments of a request of the domain; its `request_id` is fresh."""
    return CallFields(
        request_id=call.new_engine_id(),
        client_request_id=call.request_id,
        model=model,
        priority=Priority[(fields.priority or "interactive").upper()],
        tenant_id=call.tenant_id,
        cache_salt=fields.cache_salt or "",
        arrival_s=call.arrival_s,
    )


def prompts_of(value: object) -> list[str | tuple[int, ...]]:
    """One or several texts or lists of ids, as validated, to a list of them."""
    if isinstance(value, str):
        return [value]
    assert isinstance(value, list)
    if isinstance(value[0], int):
        return [tuple(value)]
    return [item if isinstance(item, str) else tuple(item) for item in cast("list[str | list[int]]", value)]
