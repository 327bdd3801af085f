"""The API side of an engine: token streams and acceptance.

`StreamTable` keeps one `TokenStream` for each request in flight and feeds it from the engine's messages;
`InProcessEngine` (a thread, for tests and the offline API) and `SubprocessEngine` (supervisor.py) share
it. What it is not: it does not restart anything, knows no text and loads no torch.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from typing import Final

from penstock.core.closing_stream import ClosingStream
from penstock.core.error_info import info_to_error
from penstock.core.errors import InvalidParameterError, NotReadyError, PenstockError
from penstock.core.ids import ModelName, RequestId
from penstock.core.ports import EngineEvents
from penstock.core.tokens import AdapterReport, EngineRequest, MemoryReport, RequestReport, TokenDelta
from penstock.engine.config import LoraModule
from penstock.engine.wire import (
    Abort,
    Accepted,
    Answer,
    Ask,
    FromEngine,
    Grammar,
    LoadAdapter,
    Output,
    Refused,
    Sleep,
    Submit,
    ToEngine,
    UnloadAdapter,
    WakeUp,
)

ANSWER_TIMEOUT_S: Final = 10.0
"""An operator's question waits for the running step at most this long."""
SLEEP_TIMEOUT_S: Final = 120.0
"""The step under way ends, and memory goes to the host or comes back, within this time."""
LOAD_TIMEOUT_S: Final = 120.0
"""An adapter is read and prepared within this time."""


class TokenStream(ClosingStream[TokenDelta]):
    """Deltas of one request; a class, so that closing it before the first read cancels too."""

    def __init__(self, request: EngineRequest, on_close: Callable[["TokenStream"], None]) -> None:
        self.request = request
        self.has_tokens = False
        """True once a token has arrived: such a request cannot be queued again."""
        self.was_resubmitted = False
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._items: asyncio.Queue[TokenDelta | PenstockError] = asyncio.Queue()
        self._on_close = on_close
        self._ended = False

    def feed(self, delta: TokenDelta) -> None:
        """Hand over a delta from the engine."""
        self.has_tokens = self.has_tokens or bool(delta.token_ids)
        self._items.put_nowait(delta if delta.error is None else info_to_error(delta.error))

    def fail(self, error: PenstockError) -> None:
        """End the stream with an error; before acceptance `generate` raises it."""
        if self.accepted.done():
            self._items.put_nowait(error)
        else:
            self.accepted.set_exception(error)

    def accept(self) -> None:
        """Let `generate` return."""
        if not self.accepted.done():
            self.accepted.set_result(None)

    async def __anext__(self) -> TokenDelta:
        """Next delta; raises the request's error, or StopAsyncIteration after the last delta."""
        if self._ended:
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, PenstockError):
            self._ended = True
            raise item
        self._ended = item.is_last
        return item

    async def aclose(self) -> None:
        """Cancel the request if it has not ended."""
        self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_close(self)


class StreamTable:
    """The requests in flight at one engine, and the questions asked of it."""

    def __init__(self, *, name: ModelName, events: EngineEvents, send: Callable[[ToEngine], None]) -> None:
        self._name = name
        self._events = events
        self._send = send
        self._streams: dict[RequestId, TokenStream] = {}
        self._questions: dict[int, asyncio.Future[Answer]] = {}
        self._question_ids = itertools.count()
        self._empty = asyncio.Event()
        self._empty.set()

    def __len__(self) -> int:
        return len(self._streams)

    @property
    def num_unaccepted(self) -> int:
        """Requests on their way to the engine."""
        return sum(not stream.accepted.done() for stream in self._streams.values())

    async def wait_empty(self) -> None:
        """Return when no request is in flight."""
        await self._empty.wait()

    async def submit(self, request: EngineRequest) -> TokenStream:
        """Send the request and wait until the engine has accepted it.

        Raises:
            PenstockError: the engine refused, or died and could not take it again.
        """
        if request.request_id in self._streams:
            raise InvalidParameterError(
                f"request_id is {request.request_id!r}, it must not be in use", param="request_id"
            )
        stream = TokenStream(request, self._cancel)
        self._streams[request.request_id] = stream
        self._empty.clear()
        try:
            self._send(Submit(request))
            await stream.accepted
        except BaseException:
            self._cancel(stream)
            raise
        return stream

    async def memory(self) -> MemoryReport:
        """See `EngineAdmin`."""
        answer = await self._ask("memory")
        assert answer.memory is not None
        return answer.memory

    async def requests(self) -> Sequence[RequestReport]:
        """See `EngineAdmin`."""
        answer = await self._ask("requests")
        assert answer.requests is not None
        return answer.requests

    async def adapters(self) -> Sequence[AdapterReport]:
        """See `AdapterEngine`."""
        answer = await self._ask("adapters")
        assert answer.adapters is not None
        return answer.adapters

    async def load_adapter(self, module: LoraModule, *, is_replacing: bool) -> AdapterReport:
        """See `AdapterEngine`."""
        return await self._order(
            lambda question_id: LoadAdapter(question_id, module, is_replacing), timeout_s=LOAD_TIMEOUT_S
        )

    async def unload_adapter(self, name: str) -> AdapterReport:
        """See `AdapterEngine`."""
        return await self._order(
            lambda question_id: UnloadAdapter(question_id, name), timeout_s=ANSWER_TIMEOUT_S
        )

    async def sleep(self) -> None:
        """Let the engine give its memory back; returns when it has. Too late is as good as not at all."""
        try:
            self._check(await self._send_question(Sleep, timeout_s=SLEEP_TIMEOUT_S))
        except NotReadyError:
            self._send(WakeUp(next(self._question_ids)))
            raise

    async def wake_up(self) -> None:
        """Undo `sleep`; returns when requests can be computed."""
        self._check(await self._send_question(WakeUp, timeout_s=SLEEP_TIMEOUT_S))

    @staticmethod
    def _check(answer: Answer) -> None:
        if answer.error is not None:
            raise info_to_error(answer.error)

    async def _order(self, make: Callable[[int], ToEngine], *, timeout_s: float) -> AdapterReport:
        answer = await self._send_question(make, timeout_s=timeout_s)
        if answer.error is not None:
            raise info_to_error(answer.error)
        assert answer.adapters is not None
        return answer.adapters[0]

    async def _ask(self, what: str) -> Answer:
        return await self._send_question(
            lambda question_id: Ask(question_id, what), timeout_s=ANSWER_TIMEOUT_S
        )

    async def _send_question(self, make: Callable[[int], ToEngine], *, timeout_s: float) -> Answer:
        """Put an operator's question or order to the engine.

        Raises:
            NotReadyError: no answer within `timeout_s`.
        """
        question_id = next(self._question_ids)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._questions[question_id] = future
        self._send(make(question_id))
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            raise NotReadyError(
                f"the engine did not answer within {timeout_s:g} s", retry_after_s=1
            ) from None
        finally:
            del self._questions[question_id]

    def on_message(self, message: FromEngine) -> None:
        """Feed what the engine sent to whom it concerns."""
        match message:
            case Output():
                self._on_output(message)
            case Grammar(outcome=outcome, compile_s=compile_s):
                self._events.on_grammar(self._name, outcome, compile_s)
            case Accepted(request_id=request_id):
                if stream := self._streams.get(request_id):
                    stream.accept()
            case Refused(request_id=request_id, error=error):
                if stream := self._remove(request_id):
                    stream.fail(info_to_error(error))
            case Answer(question_id=question_id):
                if (future := self._questions.get(question_id)) and not future.done():
                    future.set_result(message)
            case _:
                pass  # Loading, Started, Pong and Fatal concern the supervisor

    def _on_output(self, output: Output) -> None:
        for delta in output.deltas:
            stream = self._streams.get(delta.request_id)
            if stream is None:
                continue  # closed by its client while the step ran
            if delta.is_last:
                self._remove(delta.request_id)
            stream.feed(delta)
        if output.stats is not None:
            self._events.on_step(self._name, output.stats)

    def _cancel(self, stream: TokenStream) -> None:
        if self._remove(stream.request.request_id) is not None:
            self._send(Abort(stream.request.request_id))

    def _remove(self, request_id: RequestId) -> TokenStream | None:
        stream = self._streams.pop(request_id, None)
        if not self._streams:
            self._empty.set()
        return stream

    def fail_started(self, error: PenstockError) -> None:
        """The engine died: fail what has produced tokens or was queued again before; the rest waits."""
        for stream in list(self._streams.values()):
            if stream.has_tokens or stream.was_resubmitted:
                self._fail(stream, error)

    def resubmit(self) -> None:
        """Send every request in the table to a fresh engine, before any new one."""
        for stream in list(self._streams.values()):
            stream.was_resubmitted = True
            self._send(Submit(stream.request))

    def fail_all(self, error: PenstockError) -> None:
        """End every request with `error`."""
        for stream in list(self._streams.values()):
            self._fail(stream, error)

    def _fail(self, stream: TokenStream, error: PenstockError) -> None:
        self._remove(stream.request.request_id)
        stream.fail(error)
