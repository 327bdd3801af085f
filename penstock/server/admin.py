"""The administrators' listener: its own port on the loopback address, its own key, its own table.

It is not opened without a key. Requests whose Host header is not one of ours are refused, so that a web page
cannot reach it by rebinding its own name to this machine.
"""

from typing import Final

from fastapi import FastAPI

from penstock.core.ports import EngineAdmin
from penstock.observe.memory import resident_bytes
from penstock.server import document
from penstock.server.app import build
from penstock.server.host_guard import LOCAL_HOSTS
from penstock.server.replies import Reply, json_reply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call, Services
from penstock.server.validation import AnswerModel

TITLE: Final = "Penstock administration"


class ModelMemory(AnswerModel):
    """Who holds which bytes in one model's engine process."""

    model: str
    weights_bytes: int
    kv_bytes_total: int
    kv_bytes_free: int
    kv_bytes_cached: int
    kv_bytes_owned: int
    prefix_tree_nodes: int
    prefix_tree_bytes: int
    buffer_bytes: int
    process_rss_bytes: int


class MemoryAnswer(AnswerModel):
    """Answer of `/admin/memory`."""

    process_rss_bytes: int
    request_body_bytes: int
    models: list[ModelMemory]


class RequestEntry(AnswerModel):
    """One request in an engine; never its text."""

    model: str
    request_id: str
    tenant_id: str
    priority: int
    state: str
    num_prompt_tokens: int
    num_computed_tokens: int
    num_generated_tokens: int
    num_blocks: int
    num_preemptions: int
    age_s: float


class RequestsAnswer(AnswerModel):
    """Answer of `/admin/requests`."""

    requests: list[RequestEntry]


async def _model_memory(model: str, admin: EngineAdmin) -> ModelMemory:
    report = await admin.memory()
    fields = {name: getattr(report, name) for name in report.__struct_fields__}
    return ModelMemory(model=model, **fields)


async def memory(call: Call) -> Reply:
    """Who holds which bytes."""
    services = call.services
    models = [await _model_memory(name, admin) for name, admin in services.admins.items()]
    return json_reply(
        MemoryAnswer(
            process_rss_bytes=resident_bytes(), request_body_bytes=services.budget.held_bytes, models=models
        )
    )


async def requests(call: Call) -> Reply:
    """Every request in every engine."""
    found = []
    for model, admin in call.services.admins.items():
        for report in await admin.requests():
            fields = {name: getattr(report, name) for name in report.__struct_fields__}
            found.append(RequestEntry(model=model, **fields))
    return json_reply(RequestsAnswer(requests=found))


_SERVING: Final[tuple[Route, ...]] = (
    Route(
        path="/admin/memory",
        methods=("GET",),
        access=Access.ADMIN,
        serve=memory,
        document=Document(summary="Who holds which bytes", answer=MemoryAnswer),
    ),
    Route(
        path="/admin/requests",
        methods=("GET",),
        access=Access.ADMIN,
        serve=requests,
        document=Document(summary="Requests in the engines", answer=RequestsAnswer),
    ),
)
ADMIN_ROUTES: Final[tuple[Route, ...]] = (
    *_SERVING,
    *document.routes_for(_SERVING, title=TITLE, access=Access.ADMIN),
)
"""Every route of the administrators' listener."""


def make_admin_app(services: Services, *, hosts: tuple[str, ...] = LOCAL_HOSTS) -> FastAPI:
    """The administrators' app; every route asks for the admin key.

    Args:
        services: the same as the public app's; `admin_keys` must not be empty for anything to be let in.
        hosts: names and addresses, without port, that a Host header may hold.
    """
    return build(ADMIN_ROUTES, services=services, title=TITLE, hosts=hosts)
