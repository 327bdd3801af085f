"""Whom `penstock chat` talks to: a server over HTTP, or a model in this process."""

import json
import secrets
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Protocol

import aiohttp

from penstock.core.errors import PenstockError
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.ports import ModelClient
from penstock.core.text import GenerateRequest, Message

CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_TIMEOUT_S: Final = 120.0
"""A server sends at least a comment line each 15 s."""
MAX_ERROR_CHARS: Final = 500


class TalkError(PenstockError):
    """The other side did not answer; the message says why, ask again."""

    default_code = "no_answer"


class Partner(Protocol):
    """Answers a conversation; used by `chat` alone."""

    def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        """Pieces of the next assistant turn; closing the iterator stops the answer."""
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
    """Any server with OpenAI's chat API."""

    def __init__(self, url: str, *, model: str | None, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._session: aiohttp.ClientSession | None = None

    async def answer(self, messages: Sequence[Message], params: SamplingParams) -> AsyncGenerator[str, None]:
        """See `Partner`."""
        body = {
            "model": await self._model_name(),
            "messages": [{"role": m.role, "content": m.content} for m in messages],
            "temperature": params.temperature,
            "max_tokens": params.max_tokens,
            "stream": True,
        }
        try:
            async with self._open().post("/v1/chat/completions", json=body) as response:
                await _check(response)
                async for line in response.content:
                    piece = _piece(line)
                    if piece is None:
                        return
                    yield piece
        except (aiohttp.ClientError, TimeoutError) as error:
            raise TalkError(f"{self._url}: {str(error) or type(error).__name__}") from error

    async def close(self) -> None:
        """See `Partner`."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(
                total=None, sock_connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S
            )
            self._session = aiohttp.ClientSession(self._url, timeout=timeout, headers=self._headers)
        return self._session

    async def _model_name(self) -> str:
        """The model that was asked for, else the server's first."""
        if self._model is None:
            async with self._open().get("/v1/models") as response:
                await _check(response)
                self._model = str((await response.json())["data"][0]["id"])
        return self._model


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
    event = json.loads(data)
    if "error" in event:
        raise TalkError(str(event["error"].get("message", event["error"]))[:MAX_ERROR_CHARS])
    choices = event.get("choices") or [{}]
    return str(choices[0].get("delta", {}).get("content") or "")
