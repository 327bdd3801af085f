"""Whom `penstock chat` talks to: a server over HTTP, or a model in this process."""

import json
import os
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Protocol
from urllib.parse import urlsplit

import aiohttp
import msgspec

from penstock.core.errors import PenstockError, StartupError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.ports import ModelClient
from penstock.core.text import GenerateRequest, Message

CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_TIMEOUT_S: Final = 120.0
"""A server sends at least a comment line each 15 s."""
MAX_ERROR_CHARS: Final = 500
FAILURES: Final = (aiohttp.ClientError, OSError, ValueError)
"""What HTTP and JSON raise; a time-out is an OSError, a line that is too long a ValueError."""


class TalkError(PenstockError):
    """The other side did not answer; the message says why, ask again."""

    default_code = "no_answer"


class Thought(str):
    """A piece of what the model thinks before it answers; no part of the answer."""

    __slots__ = ()


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Event(msgspec.Struct):
    choices: list[_Choice] | None = None
    error: object = None


class _ListedModel(msgspec.Struct):
    id: str


class _Listing(msgspec.Struct):
    data: list[_ListedModel]


class Partner(Protocol):
    """Answers a conversation; used by `chat` alone."""

    def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        """Pieces of the next assistant turn, thoughts as `Thought`; closing the iterator stops the answer."""
        ...

    async def close(self) -> None:
        """Give up what is held."""
        ...


class ModelPartner:
    """A model in this process."""

    def __init__(self, client: ModelClient, *, close: "AsyncClose") -> None:
        self._client = client
        self._close = close

    async def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        """See `Partner`."""
        request = GenerateRequest(
            request_id=RequestId(secrets.token_hex(16)),
            model=self._client.card.name,
            messages=tuple(messages),
            params=params,
        )
        stream = await self._client.generate(request)
        try:
            async for delta in stream:
                if delta.reasoning:
                    yield Thought(delta.reasoning)
                yield delta.text
        finally:
            await stream.aclose()

    async def close(self) -> None:
        """See `Partner`."""
        await self._close()


class AsyncClose(Protocol):
    """Something to await at the end."""

    async def __call__(self) -> None:
        """Close."""
        ...


class ServerPartner:
    """Any server with OpenAI's chat API.

    Raises:
        StartupError: `url` is none of a server.
    """

    def __init__(self, url: str, *, model: str | None, api_key: str | None) -> None:
        _check_url(url)
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def connect(self) -> None:
        """Find out that the server is there, and its first model if none was named.

        Raises:
            TalkError: nobody answers at this address, or it has no models.
        """
        try:
            async with self._open().get(f"{self._url}/v1/models") as response:
                if self._model is None:
                    await _check(response)
                    self._model = _first_model(await response.json())
        except FAILURES as error:
            raise self._failed(error) from error

    async def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        """See `Partner`."""
        if self._model is None:
            await self.connect()
        body = {
            "model": self._model,
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "stream": True,
        }
        try:
            async with self._open().post(f"{self._url}/v1/chat/completions", json=body) as response:
                await _check(response)
                async for line in response.content:
                    piece = _piece(line)
                    if piece is None:
                        return
                    yield piece
        except FAILURES as error:
            raise self._failed(error) from error

    async def close(self) -> None:
        """See `Partner`."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
            )
            self._session = aiohttp.ClientSession(timeout=timeout, headers=self._headers)
        return self._session

    def _failed(self, error: Exception) -> TalkError:
        text = " ".join((str(error) or type(error).__name__).split())
        if isinstance(error, aiohttp.ClientConnectorError):
            number = error.os_error.errno
            text = f"no server answers: {os.strerror(number) if number and number > 0 else text}"
        return TalkError(f"{self._url}: {text}"[:MAX_ERROR_CHARS])


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        is_whole = False
    if not is_whole:
        raise StartupError(f"url is {url!r}, it must be like http://host:8000", param="url")


def _first_model(listing: object) -> str:
    try:
        return msgspec.convert(listing, _Listing).data[0].id
    except (msgspec.ValidationError, IndexError):
        raise TalkError("/v1/models of the server names no model") from None


async def _check(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise TalkError(f"the server answered {response.status}: {_error_text(await response.text())}")


def _error_text(body: str) -> str:
    try:
        return str(json.loads(body)["error"]["message"])[:MAX_ERROR_CHARS]
    except (ValueError, KeyError, TypeError):
        return body[:MAX_ERROR_CHARS]


def _piece(line: bytes) -> str | None:
    """Text of one line of the event stream; None at its end.

    Raises:
        TalkError: the line carries an error.
    """
    if not line.startswith(b"data:"):
        return ""
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        return None
    event = msgspec.json.decode(data, type=_Event)
    if event.error is not None:
        raise TalkError(_message_in(event.error)[:MAX_ERROR_CHARS])
    if not event.choices:
        return ""
    delta = event.choices[0].delta
    return Thought(delta.reasoning_content) if delta.reasoning_content else delta.content or ""


def _message_in(error: object) -> str:
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)
