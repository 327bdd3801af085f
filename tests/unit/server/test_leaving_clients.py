"""A client that leaves is counted once, however it asked; nothing of its request is left running or unheard."""

import asyncio
import gc
import json

import pytest

from penstock.server.app import make_app
from penstock.server.exchange import Exchange, SlowReaderError
from penstock.server.limits import Limits
from penstock.server.replies import StreamReply
from penstock.server.sse import ABORT_EXTENSION, KEEPALIVE, EventStream
from tests.fakes.http_server import services_for
from tests.fakes.model_client import FakeModelClient

LEFT = [
    ("/v1/completions", {"prompt": "hi", "stream": False}, 1),
    ("/v1/completions", {"prompt": "hi", "stream": True}, 1),
    ("/v1/embeddings", {"input": ["a", "b"]}, 0),
    ("/rerank", {"query": "a", "documents": ["b", "c"]}, 0),
]
"""Route, body, and after how many deltas the client leaves."""


@pytest.mark.parametrize(("path", "fields", "hold_after"), LEFT)
async def test_a_client_that_leaves_is_counted_whatever_it_asked(path, fields, hold_after):
    model = FakeModelClient(hold_after=hold_after)
    services = services_for(model)
    body = json.dumps(fields).encode()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive():
        if messages:
            return messages.pop()
        await model.held.wait()
        return {"type": "http.disconnect"}

    async def send(_message):
        pass

    scope = {
        "type": "http",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }
    async with asyncio.timeout(10):
        await make_app(services)(scope, receive, send)
    assert b'connections_closed_total{reason="client_gone"} 1.0' in services.events.exposition()[0]
    assert model.num_open == 0


async def test_a_keepalive_that_cannot_be_sent_ends_its_stream():
    unheard, noted, closed = [], [], asyncio.Event()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))

    async def frames():
        yield b"data: 1\n\n"
        await asyncio.Event().wait()

    async def close():
        closed.set()

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message.get("body") == KEEPALIVE:
            raise OSError("the connection is broken")

    limits = Limits(keepalive_interval_s=0.01)
    events = EventStream(StreamReply(frames=frames(), close=close), limits=limits, request_id="r")
    async with asyncio.timeout(10):
        await events.run({}, receive, send, exchange=Exchange(), on_error=noted.append)
    del events
    gc.collect()
    assert [str(error) for error in noted] == ["the connection is broken"]
    assert closed.is_set()
    assert unheard == []


async def test_a_client_that_does_not_read_the_end_of_its_stream_is_cut():
    noted, aborted = [], []

    async def frames():
        yield b"data: [DONE]\n\n"

    async def close():
        pass

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message.get("more_body") is False:
            await asyncio.Event().wait()  # the buffers are full

    limits = Limits(slow_reader_timeout_s=0.01)
    events = EventStream(StreamReply(frames=frames(), close=close), limits=limits, request_id="r")
    scope = {"extensions": {ABORT_EXTENSION: lambda: aborted.append(True)}}
    async with asyncio.timeout(10):
        await events.run(scope, receive, send, exchange=Exchange(), on_error=noted.append)
    assert [type(error) for error in noted] == [SlowReaderError]
    assert aborted == [True]
