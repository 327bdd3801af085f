"""Raw sockets: leaving clients, slow clients, hostile clients."""

import asyncio
import json
import socket
import struct
from contextlib import suppress

import pytest

from penstock.server.limits import Limits
from tests.fakes.http_server import Running, running
from tests.fakes.model_client import FakeModelClient

PATIENCE_S = 10


def post(path: str, body: dict, *, head: str = "") -> bytes:
    data = json.dumps(body).encode()
    return f"POST {path} HTTP/1.1\r\nhost: x\r\n{head}content-length: {len(data)}\r\n\r\n".encode() + data


def chat(**fields: object) -> bytes:
    return post("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]} | fields)


async def connect(server: Running) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_connection("127.0.0.1", server.port)


async def read_all(reader: asyncio.StreamReader) -> bytes:
    """Until the server closes, however it does."""
    data = b""
    async with asyncio.timeout(PATIENCE_S):
        with suppress(ConnectionError):
            while piece := await reader.read(65536):
                data += piece
    return data


async def exchange(server: Running, data: bytes) -> bytes:
    reader, writer = await connect(server)
    writer.write(data)
    answer = await read_all(reader)
    writer.close()
    return answer


async def ended(model: FakeModelClient) -> None:
    async with asyncio.timeout(PATIENCE_S):
        await model.ended.wait()


def leave(writer: asyncio.StreamWriter, *, how: str) -> None:
    if how == "rst":
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()
    else:
        writer.close()


@pytest.mark.parametrize(
    "head", ["", "connection: keep-alive\r\n", "connection: upgrade\r\nupgrade: h2c\r\n"]
)
@pytest.mark.parametrize("stream", [False, True])
async def test_http_1_0_gets_no_chunks_and_an_end_by_closing(stream, head):
    async with running(FakeModelClient()) as server:
        request = chat(stream=stream).replace(b"HTTP/1.1\r\n", b"HTTP/1.0\r\n" + head.encode(), 1)
        answer_head, _, body = (await exchange(server, request)).partition(b"\r\n\r\n")
    assert b" 200 " in answer_head
    assert b"transfer-encoding" not in answer_head
    assert b"connection: close" in answer_head
    if stream:
        assert b"content-length" not in answer_head
        assert body.startswith(b"data: {")
        assert body.endswith(b"data: [DONE]\n\n")
    else:
        assert f"content-length: {len(body)}".encode() in answer_head
        assert json.loads(body)["object"] == "chat.completion"


@pytest.mark.parametrize("how", ["fin", "rst"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_cancels_its_request(how, stream, n):
    model = FakeModelClient(hold_after=2)
    async with running(model) as server:
        _, writer = await connect(server)
        writer.write(chat(stream=stream, n=n))
        async with asyncio.timeout(PATIENCE_S):
            await model.held.wait()
        leave(writer, how=how)
        await ended(model)
        assert len(model.cancelled) == 1
        assert model.num_open == 0


async def test_a_client_that_leaves_cancels_every_prompt_of_its_request():
    model = FakeModelClient(hold_after=2)
    async with running(model) as server:
        _, writer = await connect(server)
        writer.write(post("/v1/completions", {"prompt": ["a", "b", "c"]}))
        async with asyncio.timeout(PATIENCE_S):
            await model.held.wait()
        writer.close()
        await ended(model)
        async with asyncio.timeout(PATIENCE_S):
            while model.num_open:
                await asyncio.sleep(0)
        assert len(model.cancelled) == 3


async def test_a_pipelining_client_that_leaves_is_noticed_too():
    model = FakeModelClient(hold_after=1)
    async with running(model) as server:
        _, writer = await connect(server)
        writer.write(chat() + chat())
        async with asyncio.timeout(PATIENCE_S):
            await model.held.wait()
        writer.write(b"x" * 100)
        writer.close()
        await ended(model)
        assert len(model.cancelled) == 1
        assert len(model.requests) == 1


async def test_a_pipelined_request_is_not_answered_and_the_connection_closes_after_the_first():
    model = FakeModelClient(hold_after=1)
    async with running(model) as server:
        reader, writer = await connect(server)
        writer.write(chat() + chat())
        async with asyncio.timeout(PATIENCE_S):
            await model.held.wait()
        model.resume.set()
        answer = await read_all(reader)
        writer.close()
    assert answer.count(b"HTTP/1.1 200") == 1
    assert b"connection: close" in answer


async def test_one_connection_serves_requests_one_after_the_other():
    async with running() as server:
        reader, writer = await connect(server)
        for _ in range(3):
            writer.write(b"GET /v1/models HTTP/1.1\r\nhost: x\r\n\r\n")
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
            assert b"fake" in await reader.readexactly(size)
        writer.close()


SHORT = Limits(receive_timeout_s=0.2)


@pytest.mark.parametrize(
    "part",
    [
        b"G",
        b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\n",
        b"GET /health HTTP/1.1\r\nhost: x\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{",
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{",
    ],
)
async def test_half_a_request_is_closed_at_the_deadline(part):
    async with running(limits=SHORT) as server:
        answer = await exchange(server, part)
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code":"receive_timeout"' in answer
        assert b"penstock_connections_closed_total" in server.services.events.exposition()[0]


async def test_a_drop_of_bytes_does_not_move_the_deadline():
    async with running(limits=SHORT) as server:
        reader, writer = await connect(server)
        answer = asyncio.create_task(read_all(reader))
        writer.write(b"GET /health HTTP/1.1\r\n")
        while not answer.done():
            writer.write(b"x: y\r\n")
            await asyncio.wait({answer}, timeout=0.03)
        assert (await answer).startswith(b"HTTP/1.1 408")
        writer.close()


async def test_the_deadline_ends_with_the_request_and_long_answers_live_on():
    model = FakeModelClient(hold_after=1)
    async with running(model, limits=Limits(receive_timeout_s=0.05)) as server:
        reader, writer = await connect(server)
        writer.write(chat(stream=True))
        async with asyncio.timeout(PATIENCE_S):
            await model.held.wait()
        asyncio.get_running_loop().call_later(0.15, model.resume.set)
        answer = await reader.readuntil(b"[DONE]")
        assert b"200 OK" in answer
        writer.close()


async def test_a_silent_connection_is_closed_after_the_keep_alive_time():
    async with running(limits=Limits(keep_alive_timeout_s=0.05)) as server:
        assert await exchange(server, b"") == b""


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"x: " + b"a" * 20_000, b"431"),
        (b"\r\n".join(b"x%d: y" % i for i in range(101)), b"431"),
        (b"a" * 20_000 + b": x", b"431"),
        (b"x: y\0z", b"400"),
        (b"content-length: 5\r\ncontent-length: 6", b"400"),
        (b"content-length: -1", b"400"),
        (b"content-length: 5\r\ntransfer-encoding: chunked", b"400"),
        (b"no colon", b"400"),
    ],
)
async def test_a_bad_head_is_refused_in_openai_shape(head, status):
    async with running() as server:
        answer = await exchange(server, b"GET /health HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 " + status), answer[:200]
    assert set(json.loads(answer.split(b"\r\n\r\n", 1)[1])["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("part", [b"GET /" + b"a" * 300_000, b"GET / HTTP/1.1\r\nx: " + b"a" * 300_000])
async def test_a_head_without_end_is_refused_long_before_the_deadline(part):
    async with running() as server:
        answer = await exchange(server, part)
    assert answer == b"" or answer.startswith(b"HTTP/1.1 431")


async def test_many_tiny_chunks_are_refused():
    chunks = b"1\r\n \r\n" * 2000
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    async with running() as server:
        answer = await exchange(server, head + chunks)
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"chunks_too_small" in answer


async def test_a_chunked_body_of_fair_chunks_is_read():
    body = json.dumps({"prompt": "x" * 5000, "max_tokens": 1}).encode()
    chunks = b"".join(
        b"%x\r\n%b\r\n" % (len(c), c) for c in (body[i : i + 1500] for i in range(0, len(body), 1500))
    )
    head = (
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    )
    async with running() as server:
        answer = await exchange(server, head + chunks + b"0\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 200")


async def test_a_huge_body_is_a_413_and_the_connection_can_be_used_again():
    async with running(limits=Limits(body_bytes_max=100_000)) as server:
        reader, writer = await connect(server)
        writer.write(post("/v1/completions", {"prompt": "x" * 1_000_000}))
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 413")
        size = int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0])
        await reader.readexactly(size)
        writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()


async def test_a_client_that_waits_for_continue_is_let_or_told_no_before_it_sends():
    body = json.dumps({"prompt": "hi"}).encode()
    head = "POST /generate HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\ncontent-length: %d\r\n\r\n"
    async with running() as server:
        reader, writer = await connect(server)
        writer.write((head % len(body)).encode())
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
        writer.write(body)
        assert (await read_all(reader)).startswith(b"HTTP/1.1 200")
        writer.close()
        answer = await exchange(server, (head % 10_000_000).encode())
        assert answer.startswith(b"HTTP/1.1 413")


async def test_connections_beyond_the_limit_are_told_so():
    async with running(limits=Limits(connections_max=2)) as server:
        kept = [await connect(server) for _ in range(2)]
        answer = await exchange(server, b"")
        assert answer.startswith(b"HTTP/1.1 503")
        assert b"too_many_connections" in answer
        for _, writer in kept:
            writer.close()


async def test_a_slow_reader_is_cut_and_its_request_cancelled():
    model = FakeModelClient(pieces=("x" * 50_000,), repeat=400)
    limits = Limits(write_buffer_bytes_max=64 * 1024, slow_reader_timeout_s=0.2)
    async with running(model, limits=limits) as server:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", server.port))
        await asyncio.get_running_loop().sock_sendall(sock, chat(stream=True, max_tokens=10_000))
        await ended(model)
        assert len(model.cancelled) == 1
        text = server.services.events.exposition()[0]
        assert b'connections_closed_total{reason="slow_reader"} 1.0' in text
        sock.close()


async def test_a_silent_stream_is_kept_alive_by_comments():
    model = FakeModelClient(hold_after=1)
    async with running(model, limits=Limits(keepalive_interval_s=0.02)) as server:
        reader, writer = await connect(server)
        writer.write(chat(stream=True))
        async with asyncio.timeout(PATIENCE_S):
            await reader.readuntil(b": keepalive\n\n")
            await reader.readuntil(b": keepalive\n\n")
            model.resume.set()
            await reader.readuntil(b"[DONE]")
        writer.close()


async def test_an_offer_to_upgrade_is_served_as_plain_http():
    head = (
        "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAARAAAAAAAIAAAAA\r\n"
    )
    async with running() as server:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(post("/generate", {"prompt": "hi"}, head=head))
            assert (await reader.readuntil(b'world!",')).startswith(b"HTTP/1.1 200")
            await reader.readuntil(b"}}")
        writer.close()


async def test_a_tunnel_is_refused():
    async with running() as server:
        answer = await exchange(server, b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 400")
