"""Sends one request, reads its stream, and writes down when each piece of text came.

Times are taken when a chunk of bytes arrives, before anything is parsed; events are then decoded by typed
structs that skip what is not needed (about a microsecond each). What the server streams is counted so:

- a *piece* is an event with text; TTFT is the first, ITL the gaps between them. A piece may stand for several
  tokens (a server that sends them in groups, a character made of two tokens): it is one gap, never divided.
- *tokens* are what the server's `usage` says. A server that sends none is counted by its pieces, and the
  record says so.

Called by `load`, which decides when.
"""

import asyncio
import contextlib
import os
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final, Literal

import aiohttp
import msgspec

from penstock.bench.event_stream import EventStream, EventTooLargeError
from penstock.bench.target import Target
from penstock.bench.workload import LoadRequest

MAX_MESSAGE_CHARS: Final = 300
MAX_ERROR_BODY_BYTES: Final = 64 << 10
KEEPALIVE_S: Final = 3.0
"""Below the 5 s after which common servers close an idle connection, so that none is used while it closes."""
MAX_RETRY_AFTER_S: Final = 60.0
TRANSPORT_KINDS: Final = frozenset({"connect", "disconnected"})
"""Failures that may mean that the server is gone."""

CountedBy = Literal["usage", "pieces"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request has no good answer."""

    kind: str
    """`connect`, `disconnected`, `timeout`, `http_429` (any status), `stream_error`, `malformed`, `cut_off`
    (no finish reason), `wrong_length`, `wrong_finish`, `cancelled`."""
    message: str


@dataclass(slots=True, kw_only=True)
class RequestRecord:
    """What became of one request; filled by `RequestSender`, then left alone.

    Times are seconds after the start of the run.
    """

    index: int
    """Place in the workload."""
    num_output_tokens_asked: int
    start_s: float
    """Latency counts from here: when it was due (open loop), or when it was sent (closed loop)."""
    sent_s: float = 0.0
    end_s: float = 0.0
    """The stream is read to its end, or has failed."""
    last_s: float = 0.0
    """Arrival of the last event of the answer."""
    pieces_s: "array[float]" = field(default_factory=lambda: array("d"))
    """Arrival of each piece of text."""
    num_prompt_tokens: int = 0
    """As the server counted; without a `usage`, as asked for."""
    num_cached_tokens: int = 0
    """Prompt tokens that the server had in its prefix cache, if it says so."""
    num_output_tokens: int = 0
    counted_by: CountedBy = "pieces"
    finish_reason: str | None = None
    failure: Failure | None = None
    retry_after_s: float = 0.0
    """A refusal's `Retry-After`, 0 to `MAX_RETRY_AFTER_S`; 0 without one."""

    @property
    def is_ok(self) -> bool:
        """It was answered, and the checks held."""
        return self.failure is None

    @property
    def ttft_s(self) -> float | None:
        """To the first piece of text; None if there was none."""
        return self.pieces_s[0] - self.start_s if self.pieces_s else None

    @property
    def e2el_s(self) -> float:
        """To the last event of the answer."""
        return self.last_s - self.start_s

    @property
    def tpot_s(self) -> float | None:
        """Time per token after the first; None with fewer than two tokens or no text."""
        if self.num_output_tokens < 2 or not self.pieces_s:
            return None
        return (self.last_s - self.pieces_s[0]) / (self.num_output_tokens - 1)

    @property
    def lateness_s(self) -> float:
        """How long after `start_s` it went out; in a closed loop only the time to write its JSON."""
        return self.sent_s - self.start_s


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def has_text(self) -> bool:
        """Something that a user would see."""
        delta = self.delta
        if delta is None:
            return bool(self.text)
        return bool(delta.content or delta.reasoning_content or delta.reasoning or delta.tool_calls)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = msgspec.field(default_factory=list)
    usage: _Usage | None = None
    error: msgspec.Raw = msgspec.Raw(b"null")


class _ErrorText(msgspec.Struct):
    message: str


class _ErrorBody(msgspec.Struct):
    error: _ErrorText


_decode_event: Final = msgspec.json.Decoder(_Event).decode
_encode: Final = msgspec.json.encode


class _FailedError(Exception):
    """Carries a failure out of the reading; never leaves this module."""

    def __init__(self, kind: str, message: str) -> None:
        self.failure = Failure(kind=kind, message=one_line(message))


class RequestSender:
    """Puts requests on the wire.

    Args:
        session: where the connections are; not closed here.
        target: the server.
        clock: seconds after the start of the run.
        on_piece: called at each piece of text with its record; cheap.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        *,
        target: Target,
        clock: Callable[[], float],
        on_piece: Callable[[RequestRecord], None],
    ) -> None:
        self._session = session
        self._target = target
        self._clock = clock
        self._on_piece = on_piece
        self._url = target.request_url
        self._headers = {"Content-Type": "application/json", **target.headers}

    async def send(self, request: LoadRequest, record: RequestRecord) -> None:
        """Ask, read to the end, check; whatever happens is in `record`, which is mutated."""
        body = request_body(request, target=self._target)
        record.num_prompt_tokens = request.num_prompt_tokens
        try:
            await self._exchange(body, record)
            _check_answer(record, target=self._target)
        except asyncio.CancelledError:
            record.failure = Failure(kind="cancelled", message="the run was stopped")
            raise
        except _FailedError as error:
            record.failure = error.failure
        except (aiohttp.ClientError, OSError, EventTooLargeError, msgspec.MsgspecError, ValueError) as error:
            record.failure = failure_of(error)
        finally:
            record.end_s = self._clock()

    async def _exchange(self, body: bytes, record: RequestRecord) -> None:
        record.sent_s = self._clock()
        async with self._session.post(self._url, data=body, headers=self._headers) as response:
            if response.status != 200:
                record.retry_after_s = _retry_after_s(response.headers.get("Retry-After", ""))
                raise _FailedError(f"http_{response.status}", await error_text(response))
            if response.content_type != "text/event-stream":
                raise _FailedError("malformed", f"the answer is {response.content_type}, not an event stream")
            stream = EventStream()
            async for chunk in response.content.iter_any():
                now_s = self._clock()
                self._read(stream.feed(chunk), record, now_s=now_s)
            self._read(stream.rest(), record, now_s=self._clock())

    def _read(self, events: Iterable[bytes], record: RequestRecord, *, now_s: float) -> None:
        for data in events:
            if data == b"[DONE]":
                continue
            event = _decode_event(data)
            if bytes(event.error) != b"null":
                raise _FailedError("stream_error", _text_in(bytes(event.error)))
            for choice in event.choices:
                self._take(choice, record, now_s=now_s)
            if event.usage is not None:
                _count(event.usage, record)

    def _take(self, choice: _Choice, record: RequestRecord, *, now_s: float) -> None:
        if choice.has_text:
            record.pieces_s.append(now_s)
            if record.counted_by == "pieces":
                record.num_output_tokens += 1
            self._on_piece(record)
        if choice.finish_reason is not None:
            record.finish_reason = choice.finish_reason
        record.last_s = now_s


def _retry_after_s(text: str) -> float:
    """Seconds that a server asks to wait; a date, which servers of models do not send, counts as none."""
    return min(MAX_RETRY_AFTER_S, float(text)) if text.isascii() and text.isdigit() else 0.0


def _count(usage: _Usage, record: RequestRecord) -> None:
    """The last usage counts: some servers send one with every event."""
    record.num_prompt_tokens = usage.prompt_tokens
    record.num_output_tokens = usage.completion_tokens
    record.counted_by = "usage"
    if usage.prompt_tokens_details is not None:
        record.num_cached_tokens = usage.prompt_tokens_details.cached_tokens or 0


def request_body(request: LoadRequest, *, target: Target) -> bytes:
    """The JSON of one request."""
    fields: dict[str, object] = {
        "model": target.model,
        "max_tokens": request.num_output_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.route == "chat":
        fields["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        fields["prompt"] = request.prompt
    if target.temperature is not None:
        fields["temperature"] = target.temperature
    if target.ignore_eos:
        fields["ignore_eos"] = True
    return _encode({**fields, **target.body, **request.body})


def _check_answer(record: RequestRecord, *, target: Target) -> None:
    """Raise if an answer that came to its end is not what was asked for."""
    asked, got = record.num_output_tokens_asked, record.num_output_tokens
    if record.finish_reason is None:
        raise _FailedError("cut_off", f"the stream ended after {got} tokens without a finish reason")
    if target.ignore_eos and record.finish_reason != "length":
        raise _FailedError("wrong_finish", f"finish_reason is {record.finish_reason}, asked with ignore_eos")
    if record.counted_by == "pieces":
        return  # a piece may stand for several tokens: nothing to check against
    is_whole = record.finish_reason == "length"
    if got > asked or (is_whole and got != asked):
        reason = record.finish_reason
        raise _FailedError(
            "wrong_length", f"{got} tokens with finish_reason {reason}, {asked} were asked for"
        )


def failure_of(error: Exception) -> Failure:
    """The kind of an exception of aiohttp, the sockets or the decoder."""
    message = one_line(str(error) or type(error).__name__)
    if isinstance(error, aiohttp.ClientConnectorError):
        reason = error.os_error
        told = os.strerror(reason.errno) if reason.errno and reason.errno > 0 else reason.strerror or message
        return Failure(kind="connect", message=one_line(f"{error.host}:{error.port}: {told}"))
    if isinstance(error, aiohttp.ConnectionTimeoutError):
        return Failure(kind="connect", message=message)
    if isinstance(error, TimeoutError):
        return Failure(kind="timeout", message="no end of the answer within the time for a request")
    if isinstance(error, aiohttp.ClientPayloadError | aiohttp.ServerDisconnectedError | OSError):
        return Failure(kind="disconnected", message="the connection broke before the answer was whole")
    return Failure(kind="malformed", message=message)


async def error_text(response: aiohttp.ClientResponse) -> str:
    """The message in an error answer: OpenAI's `error.message`, else the start of the body."""
    return _text_in(await response.content.read(MAX_ERROR_BODY_BYTES))


def _text_in(data: bytes) -> str:
    """The message, whether `data` is a whole error answer or its `error` alone; else `data` as it is."""
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(data, type=_ErrorBody).error.message
    with contextlib.suppress(msgspec.MsgspecError, UnicodeDecodeError):
        return msgspec.json.decode(data, type=_ErrorText).message
    return data.decode("utf-8", "replace")


def one_line(text: str) -> str:
    """`text` without line breaks and control characters, cut to `MAX_MESSAGE_CHARS`."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())[:MAX_MESSAGE_CHARS]


def open_session(target: Target, *, num_connections: int) -> aiohttp.ClientSession:
    """A session for `num_connections` streams at once: no proxies, no cookies, no compression."""
    connector = aiohttp.TCPConnector(limit=num_connections, keepalive_timeout=KEEPALIVE_S)
    timeout = aiohttp.ClientTimeout(total=target.timeout_s, sock_connect=target.connect_timeout_s)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        read_bufsize=1 << 18,
    )
