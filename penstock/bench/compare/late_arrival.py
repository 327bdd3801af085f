"""Streams that run, and a long prompt that comes among them: what a plain load generator does not send."""

import asyncio
import time
from typing import Final

from penstock.bench.client import RequestRecord, RequestSender, open_session
from penstock.bench.compare.figures import Observation
from penstock.bench.compare.scenarios import Scenario
from penstock.bench.target import Target
from penstock.bench.workload import LoadRequest

SETTLE_S: Final = 0.5
"""Between the moment when all streams run and the late request: gaps without it are seen then."""


async def drive_with_late(scenario: Scenario, target: Target) -> Observation:
    """Send the streams; once each has had its tokens, send the late request; read all to the end."""
    assert scenario.late is not None, "the scenario has a late request"
    began_s, cpu_began_s = time.perf_counter(), time.thread_time()

    def clock() -> float:
        return time.perf_counter() - began_s

    records = [_record(index, request, start_s=0.0) for index, request in enumerate(scenario.load.requests)]
    all_run = asyncio.Event()

    def on_piece(_record: RequestRecord) -> None:
        if not all_run.is_set() and all(len(r.pieces_s) >= scenario.late_after_tokens for r in records):
            all_run.set()

    async with open_session(target, num_connections=scenario.num_streams) as session:
        sender = RequestSender(session, target=target, clock=clock, on_piece=on_piece)
        asked = zip(scenario.load.requests, records, strict=True)
        streams = asyncio.gather(*(sender.send(request, record) for request, record in asked))
        await _first(all_run, streams)
        await asyncio.sleep(SETTLE_S)
        late = _record(len(records), scenario.late, start_s=clock())
        await sender.send(scenario.late, late)
        await streams
    duration_s = clock()
    cpu_s = time.thread_time() - cpu_began_s
    return Observation(
        records=tuple(records), duration_s=duration_s, late=late, client_cpu_share=cpu_s / duration_s
    )


async def _first(event: asyncio.Event, streams: "asyncio.Future[list[None]]") -> None:
    """Until the event, or until the streams have ended without it."""
    waiting = asyncio.create_task(event.wait())
    streams.add_done_callback(lambda _streams: event.set())
    await waiting


def _record(index: int, request: LoadRequest, *, start_s: float) -> RequestRecord:
    return RequestRecord(
        index=index, num_output_tokens_asked=request.num_output_tokens, start_s=start_s, sent_s=start_s
    )
