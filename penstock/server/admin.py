"""The administrators' listener: its own port on the loopback address, its own key, its own table.

It is not opened without a key. Requests whose Host header is not one of ours are refused, so that a web page
cannot reach it by rebinding its own name to this machine.
"""

from collections.abc import Callable, Coroutine
from typing import Annotated, Final, Literal

from fastapi import FastAPI
from pydantic import Field

from penstock.core.errors import InvalidParameterError
from penstock.core.ports import AdapterAdmin, EngineAdmin
from penstock.core.tokens import AdapterReport
from penstock.observe.memory import resident_bytes
from penstock.server import document
from penstock.server.app import build
from penstock.server.host_guard import LOCAL_HOSTS
from penstock.server.replies import Reply, json_reply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call, Services
from penstock.server.validation import AnswerModel, Flag, Text, WireModel

TITLE: Final = "Penstock administration"
MAX_NAME_CHARS: Final = 128

Serve = Callable[[Call], Coroutine[None, None, Reply]]


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
    offload_bytes_total: int
    offload_bytes_used: int
    activation_bytes: int
    graph_bytes: int
    device_bytes_total: int
    device_bytes_used: int
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


class AdapterEntry(AnswerModel):
    """One LoRA adapter."""

    model: str
    """Whose."""
    name: str
    revision: str
    """Hash of its files."""
    rank: int
    """The largest of its ranks; 0 if it has not been read since the engine's restart."""
    num_bytes: int
    is_in_memory: bool
    num_requests: int
    """Running or waiting."""


class AdaptersAnswer(AnswerModel):
    """Answer of `/admin/adapters`."""

    adapters: list[AdapterEntry]


class LoadRequest(WireModel):
    """Body of `POST /v1/load_lora_adapter`."""

    lora_name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]
    lora_path: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)] = Field(
        description="Name of a folder in the server's lora_dir."
    )
    load_inplace: Flag = Field(default=False, description="Replace an adapter of this name.")


class UnloadRequest(WireModel):
    """Body of `POST /v1/unload_lora_adapter`."""

    lora_name: Annotated[Text, Field(min_length=1, max_length=MAX_NAME_CHARS)]


def _entry(model: str, report: AdapterReport) -> AdapterEntry:
    return AdapterEntry(
        model=model,
        name=report.name,
        revision=report.revision,
        rank=report.rank,
        num_bytes=report.num_bytes,
        is_in_memory=report.is_in_memory,
        num_requests=report.num_requests,
    )


def _one_model(call: Call) -> tuple[str, AdapterAdmin]:
    """The model that takes adapters; there is one at most in this version."""
    found = next(iter(call.services.adapters.items()), None)
    if found is None:
        raise InvalidParameterError(
            "lora_name cannot be served: no model was started with enable_lora", param="lora_name"
        )
    return found


async def adapters(call: Call) -> Reply:
    """Every adapter of every model."""
    entries = [
        _entry(model, report)
        for model, admin in call.services.adapters.items()
        for report in await admin.adapters()
    ]
    return json_reply(AdaptersAnswer(adapters=entries))


async def load_adapter(call: Call) -> Reply:
    """Load an adapter from the operator's folder."""
    body = call.body
    assert isinstance(body, LoadRequest)
    model, admin = _one_model(call)
    report = await admin.load(body.lora_name, folder=body.lora_path, is_replacing=body.load_inplace)
    return json_reply(_entry(model, report))


async def unload_adapter(call: Call) -> Reply:
    """Forget an adapter; running requests go on."""
    body = call.body
    assert isinstance(body, UnloadRequest)
    model, admin = _one_model(call)
    return json_reply(_entry(model, await admin.unload(body.lora_name)))


class SleepRequest(WireModel):
    """Body or query of `POST /admin/sleep`."""

    level: Literal[1, 2] = Field(
        default=1, description="1 keeps the weights in host memory; 2 ends the engine process."
    )


class SleepAnswer(AnswerModel):
    """Answer of the routes that put models to sleep and wake them."""

    is_sleeping: bool


def sleep_from_query(query: dict[str, object]) -> object:
    """Query to fields: the level is a number."""
    level = query.get("level")
    return {**query, "level": int(level)} if isinstance(level, str) and level in {"1", "2"} else query


def _sleep_answer(call: Call) -> Reply:
    return json_reply(
        SleepAnswer(is_sleeping=any(admin.is_sleeping for admin in call.services.admins.values()))
    )


async def sleep(call: Call) -> Reply:
    """Let every engine give its memory back."""
    body = call.body
    assert isinstance(body, SleepRequest)
    for admin in call.services.admins.values():
        await admin.sleep(body.level)
    return _sleep_answer(call)


async def wake_up(call: Call) -> Reply:
    """Let every engine take its memory again."""
    for admin in call.services.admins.values():
        await admin.wake_up()
    return _sleep_answer(call)


async def is_sleeping(call: Call) -> Reply:
    """Say whether an engine sleeps."""
    return _sleep_answer(call)


def _get(path: str, serve: Serve, *, summary: str, answer: type[AnswerModel]) -> Route:
    """A row that reads."""
    return Route(
        path=path,
        methods=("GET",),
        access=Access.ADMIN,
        serve=serve,
        document=Document(summary=summary, answer=answer),
    )


def _post(
    path: str,
    serve: Serve,
    *,
    summary: str,
    answer: type[AnswerModel],
    body: type[WireModel] | None = None,
    also: tuple[int, ...] = (),
) -> Route:
    """A row that changes something."""
    return Route(
        path=path,
        methods=("POST",),
        access=Access.ADMIN,
        serve=serve,
        body=body,
        document=Document(summary=summary, answer=answer, also=also),
    )


_SERVING: Final[tuple[Route, ...]] = (
    _get("/admin/memory", memory, summary="Who holds which bytes", answer=MemoryAnswer),
    _get("/admin/requests", requests, summary="Requests in the engines", answer=RequestsAnswer),
    Route(
        path="/admin/sleep",
        methods=("POST",),
        access=Access.ADMIN,
        serve=sleep,
        body=SleepRequest,
        from_query=sleep_from_query,
        takes_query=True,
        document=Document(summary="Give memory back", answer=SleepAnswer, also=(503,)),
    ),
    _post("/admin/wake_up", wake_up, summary="Take memory again and serve", answer=SleepAnswer, also=(503,)),
    _get("/admin/is_sleeping", is_sleeping, summary="Whether an engine sleeps", answer=SleepAnswer),
    _get("/admin/adapters", adapters, summary="LoRA adapters", answer=AdaptersAnswer),
    _post(
        "/v1/load_lora_adapter",
        load_adapter,
        summary="Load a LoRA adapter",
        answer=AdapterEntry,
        body=LoadRequest,
    ),
    _post(
        "/v1/unload_lora_adapter",
        unload_adapter,
        summary="Forget a LoRA adapter",
        answer=AdapterEntry,
        body=UnloadRequest,
        also=(404,),
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
