"""Alive, ready, and the numbers: `/health`, `/health/ready`, `/metrics`.

Alive means that this process answers. Ready means that tokens can be produced now: every model's engine
is up and steps, its queue has room, and the server is not about to leave.
"""

import asyncio
from typing import Final, Literal

from penstock.core.ids import ModelName
from penstock.core.ports import EngineAdmin
from penstock.observe.memory import resident_bytes
from penstock.server.engine_reports import EngineReports
from penstock.server.replies import Reply, json_reply
from penstock.server.routes import Access, Document, Route
from penstock.server.services import Call, Services
from penstock.server.validation import AnswerModel


class EngineMemory(AnswerModel):
    """Bytes in one model's engine process."""

    model: str
    age_s: float
    """Seconds since the engine said so: 0 unless it is too busy to answer at once."""
    weights_bytes: int
    kv_bytes_total: int
    kv_bytes_owned: int
    kv_bytes_cached: int
    kv_bytes_free: int
    process_rss_bytes: int


class Memory(AnswerModel):
    """Bytes in this process and in the engines that have ever answered."""

    process_rss_bytes: int
    request_body_bytes: int
    engines: list[EngineMemory]


class Health(AnswerModel):
    """Answer of `/health`."""

    status: Literal["alive"] = "alive"
    requests_in_flight: int
    memory: Memory


class Readiness(AnswerModel):
    """Answer of `/health/ready`; 503 unless ready."""

    status: Literal["ready", "not_ready"]
    reason: str | None


async def _engine_memory(
    model: ModelName, admin: EngineAdmin, *, reports: EngineReports
) -> EngineMemory | None:
    latest = await reports.latest(model, admin)
    if latest is None:
        return None
    age_s, report = latest
    return EngineMemory(
        model=model,
        age_s=age_s,
        weights_bytes=report.weights_bytes,
        kv_bytes_total=report.kv_bytes_total,
        kv_bytes_owned=report.kv_bytes_owned,
        kv_bytes_cached=report.kv_bytes_cached,
        kv_bytes_free=report.kv_bytes_free,
        process_rss_bytes=report.process_rss_bytes,
    )


async def _memory(services: Services) -> Memory:
    asked = [_engine_memory(name, admin, reports=services.reports) for name, admin in services.admins.items()]
    reports = await asyncio.gather(*asked)
    return Memory(
        process_rss_bytes=resident_bytes(),
        request_body_bytes=services.budget.held_bytes,
        engines=[report for report in reports if report is not None],
    )


async def health(call: Call) -> Reply:
    """Say that the process lives, and what it holds."""
    services = call.services
    return json_reply(Health(requests_in_flight=len(services.in_flight), memory=await _memory(services)))


async def ready(call: Call) -> Reply:
    """Say whether a request sent now would be served."""
    services = call.services
    reason = services.gate.closed_reason or services.catalog.not_ready_reason
    if reason is None:
        return json_reply(Readiness(status="ready", reason=None))
    return json_reply(Readiness(status="not_ready", reason=reason), status=503)


async def metrics(call: Call) -> Reply:
    """All metrics in Prometheus' text format."""
    text, content_type = call.services.events.exposition()
    return Reply(body=text, content_type=content_type.encode())


ROUTES: Final[tuple[Route, ...]] = (
    Route(
        path="/health",
        methods=("GET",),
        access=Access.PUBLIC,
        serve=health,
        document=Document(summary="Alive, with memory figures", answer=Health),
    ),
    Route(
        path="/health/ready",
        methods=("GET",),
        access=Access.PUBLIC,
        serve=ready,
        document=Document(summary="Ready, or 503 and why not", answer=Readiness),
    ),
    Route(
        path="/metrics",
        methods=("GET",),
        access=Access.PUBLIC,
        serve=metrics,
        document=Document(summary="Metrics for Prometheus", media_type="text/plain"),
    ),
)
