"""An OpenAI-compatible server on the loopback that says what a test tells it to, byte for byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from penstock.bench.target import Route, Target

Handler = Callable[[web.Request, dict[str, Any]], Awaitable[web.StreamResponse]]


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text_event(text: str, *, finish: str | None = None) -> bytes:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": finish}]})


def usage_event(*, prompt: int, completion: int, cached: int | None = None) -> bytes:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if cached is not None:
        usage["prompt_tokens_details"] = {"cached_tokens": cached}
    return event({"choices": [], "usage": usage})


DONE = b"data: [DONE]\n\n"


def good_answer(num_tokens: int, *, num_prompt_tokens: int = 3) -> list[bytes]:
    """One piece a token, the last with the finish reason, then the usage."""
    pieces = [text_event(f"w{i} ") for i in range(num_tokens - 1)]
    return [
        *pieces,
        text_event("end", finish="length"),
        usage_event(prompt=num_prompt_tokens, completion=num_tokens),
        DONE,
    ]


@dataclass
class ScriptedServer:
    """Answers `/v1/models` and both routes; `handler` is asked for every request of theirs."""

    models: list[str] = field(default_factory=lambda: ["tiny"])
    max_model_len: int | None = None
    api_key: str | None = None
    takes_ids: bool = True
    tokens_per_word: int = 1
    num_extra_tokens: int = 0
    sends_usage: bool = True
    handler: Handler | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""
    runner: web.AppRunner | None = None
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the server goes, so that handlers that wait for nothing else end."""

    def target(self, *, model: str = "tiny", route: Route = "completions", **options: Any) -> Target:
        return Target(base_url=self.url, model=model, route=route, **options)

    async def list_models(self, request: web.Request) -> web.Response:
        if self.api_key and request.headers.get("Authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"message": "bad key"}}, status=401)
        length = {} if self.max_model_len is None else {"max_model_len": self.max_model_len}
        return web.json_response({"data": [{"id": name, **length} for name in self.models]})

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        if self.handler is not None:
            return await self.handler(request, body)
        if isinstance(body.get("prompt"), list) and not self.takes_ids:
            return web.json_response({"error": {"message": "prompt must be text"}}, status=400)
        num_tokens = body["max_tokens"]
        chunks = good_answer(num_tokens, num_prompt_tokens=self.count(body))
        if not self.sends_usage:
            chunks = [chunk for chunk in chunks if b'"usage"' not in chunk]
        if request.path.endswith("chat/completions"):
            chunks = [_as_chat(chunk) for chunk in chunks]
        return await stream(request, chunks)

    def count(self, body: dict[str, Any]) -> int:
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        if isinstance(prompt, list):
            return len(prompt)
        return len(prompt.split()) * self.tokens_per_word + self.num_extra_tokens

    async def stop(self) -> None:
        assert self.runner is not None
        self.closing.set()
        await self.runner.cleanup()


def _as_chat(chunk: bytes) -> bytes:
    if b'"text"' not in chunk:
        return chunk
    fields = json.loads(chunk.removeprefix(b"data: "))
    choice = fields["choices"][0]
    choice["delta"] = {"content": choice.pop("text")}
    return event(fields)


async def stream(request: web.Request, chunks: list[bytes]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
    await response.write_eof()
    return response


async def broken_stream(request: web.Request, chunks: list[bytes]) -> web.StreamResponse:
    """Writes the chunks, then cuts the connection."""
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for chunk in chunks:
        await response.write(chunk)
    assert request.transport is not None
    request.transport.abort()
    return response


@asynccontextmanager
async def scripted(server: ScriptedServer | None = None) -> AsyncIterator[ScriptedServer]:
    server = server or ScriptedServer()
    app = web.Application(client_max_size=1 << 26)
    app.router.add_get("/v1/models", server.list_models)
    app.router.add_post("/v1/completions", server.generate)
    app.router.add_post("/v1/chat/completions", server.generate)
    server.runner = web.AppRunner(app, shutdown_timeout=0.0)
    await server.runner.setup()
    site = web.TCPSite(server.runner, "127.0.0.1", 0)
    await site.start()
    server.url = f"http://127.0.0.1:{server.runner.addresses[0][1]}"
    try:
        yield server
    finally:
        await server.stop()
