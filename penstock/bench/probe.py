"""Asks a server what it is before it is measured: is it there, which models, does it take token ids.

Called once by the commands, outside the measured time.
"""

import asyncio
from dataclasses import dataclass
from typing import Final

import aiohttp
import msgspec

from penstock.bench.client import RequestRecord, RequestSender, error_text, failure_of, one_line, open_session
from penstock.bench.target import Target, TargetError
from penstock.bench.workload import LoadRequest, Prompt

RETRY_PERIOD_S: Final = 0.5
MAX_LISTED: Final = 5
MAX_BODY_BYTES: Final = 4 << 20


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None


class _Listing(msgspec.Struct):
    data: list[_Model]


class _Version(msgspec.Struct):
    version: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What a server says about itself."""

    models: tuple[str, ...]
    """Names that it lists; empty if it lists none."""
    max_model_len: int | None
    """Of the model that is measured, if it tells."""
    software: str | None
    """`Server` header, and the version from /version if there is one."""


async def find(target: Target, *, ready_timeout_s: float = 0.0) -> ServerFacts:
    """Wait until the server answers, and ask for its models.

    Args:
        target: its `model` may be empty: `choose_model` then takes the only one.
        ready_timeout_s: how long to wait for a server that is not there yet; 0 asks once.

    Raises:
        TargetError: nobody answers in time, or not as an OpenAI-compatible server does.
    """
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + ready_timeout_s
    async with open_session(target, num_connections=2) as session:
        while True:
            try:
                return await _ask(session, target)
            except TargetError:
                if loop.time() >= give_up_s:
                    raise
                await asyncio.sleep(RETRY_PERIOD_S)


async def _ask(session: aiohttp.ClientSession, target: Target) -> ServerFacts:
    url = f"{target.api_url}/models"
    try:
        async with session.get(url, headers=target.headers) as response:
            if response.status != 200:
                raise TargetError(_refusal(url, response.status, await error_text(response)))
            listing = _listing(url, await response.content.read(MAX_BODY_BYTES))
            server = response.headers.get("Server")
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise TargetError(f"no server answers at {url}: {failure_of(error).message}") from error
    names = tuple(model.id for model in listing.data)
    chosen = next((m for m in listing.data if m.id == target.model or len(names) == 1), None)
    release = await _release(session, target)
    return ServerFacts(
        models=names,
        max_model_len=chosen.max_model_len if chosen else None,
        software=" ".join(word for word in (server, release) if word) or None,
    )


def _refusal(url: str, status: int, text: str) -> str:
    if status in {401, 403}:
        return f"the server refuses the key (status {status}, {one_line(text)}): give --api-key"
    return f"{url} answers {status}, is this an OpenAI-compatible server? {one_line(text)}"


def _listing(url: str, body: bytes) -> _Listing:
    try:
        return msgspec.json.decode(body, type=_Listing)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise TargetError(f"{url} does not list models, is this an OpenAI-compatible server?") from None


async def _release(session: aiohttp.ClientSession, target: Target) -> str | None:
    """From /version, which many servers have beside the API; None if this one has not."""
    try:
        url = f"{target.api_url.rsplit('/', 1)[0]}/version"
        async with session.get(url, headers=target.headers) as response:
            body = await response.content.read(MAX_BODY_BYTES)
        return one_line(msgspec.json.decode(body, type=_Version).version)
    except (aiohttp.ClientError, OSError, ValueError):
        return None


def choose_model(facts: ServerFacts, *, wanted: str | None) -> str:
    """The model to measure.

    Raises:
        TargetError: `wanted` is not listed, or none is wanted and there is not exactly one.
    """
    listed = ", ".join(facts.models[:MAX_LISTED]) or "none"
    if wanted is None:
        if len(facts.models) != 1:
            raise TargetError(f"the server has {len(facts.models)} models ({listed}): choose with --model")
        return facts.models[0]
    if facts.models and wanted not in facts.models:
        raise TargetError(f"the server has no model {wanted!r}, it has {listed}")
    return wanted


async def ask_once(target: Target, prompt: Prompt, *, num_output_tokens: int = 1) -> RequestRecord:
    """Send one short request; how it went is in the record."""
    request = LoadRequest(prompt=prompt, num_prompt_tokens=0, num_output_tokens=num_output_tokens)
    record = RequestRecord(index=0, num_output_tokens_asked=num_output_tokens, start_s=0.0)
    clock = asyncio.get_running_loop().time
    async with open_session(target, num_connections=1) as session:
        sender = RequestSender(session, target=target, clock=clock, on_piece=lambda _record: None)
        await sender.send(request, record)
    return record
