"""The engine's side of the conversation: take messages, step, answer.

`EngineLoop` turns in the engine process over a zmq socket and in a thread for the in-process client; the
difference is the `Channel`. It knows no asyncio.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from penstock.core.error_info import error_to_info
from penstock.core.errors import GenerateError, PenstockError
from penstock.core.ids import RequestId
from penstock.core.tokens import EngineRequest
from penstock.engine.core import EngineCore
from penstock.engine.wire import (
    Abort,
    Accepted,
    Answer,
    Ask,
    FromEngine,
    Output,
    Ping,
    Pong,
    Refused,
    Shutdown,
    Start,
    Submit,
    ToEngine,
)

log = logging.getLogger("penstock.engine")


class Channel(Protocol):
    """Carries messages to and from the API side, in order."""

    def receive(self, *, block: bool) -> Iterable[ToEngine]:
        """All messages that are there; if `block`, wait for at least one (bounded, may return none)."""
        ...

    def send(self, message: FromEngine) -> None:
        """Hand over a message; waits if the other side is far behind."""
        ...

    def wake(self) -> None:
        """Let a blocked `receive` return, or the next one; called from any thread."""
        ...


class EngineLoop:
    """Steps the engine while there is work and sleeps in `receive` while there is none."""

    def __init__(self, core: EngineCore, channel: Channel) -> None:
        self._core = core
        self._channel = channel
        self._stopped = False
        core.grammars.wake = channel.wake

    def run(self) -> None:
        """Turn until `Shutdown`.

        Raises:
            EngineDeadError: the runner cannot go on; the process must be restarted.
        """
        while not self._stopped:
            for message in self._channel.receive(block=not self._core.has_work):
                self._handle(message)
            for done in self._core.grammars.take_done():
                self._answer_submit(done.request.request_id, partial(self._core.add_compiled, done))
            if self._core.has_work and not self._stopped:
                output = self._core.step()
                self._channel.send(Output(output.deltas, output.stats))

    def _handle(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message.request)
            case Abort(request_id=request_id):
                self._core.abort(request_id)
            case Ping():
                self._channel.send(Pong())
            case Ask():
                self._channel.send(self._answer(message))
            case Shutdown():
                self._stopped = True
            case Start():
                raise AssertionError("Start is only valid as the first message")

    def _submit(self, request: EngineRequest) -> None:
        if request.grammar is None:
            self._answer_submit(request.request_id, partial(self._core.add, request))
            return
        try:
            self._core.grammars.submit(request)  # answered when it is compiled
        except PenstockError as error:
            self._channel.send(Refused(request.request_id, error_to_info(error)))

    def _answer_submit(self, request_id: RequestId, add: Callable[[], None]) -> None:
        try:
            add()
        except PenstockError as error:
            self._channel.send(Refused(request_id, error_to_info(error)))
        except Exception:
            log.exception("a request could not be queued")
            fault = GenerateError("the request could not be queued")
            self._channel.send(Refused(request_id, error_to_info(fault)))
        else:
            self._channel.send(Accepted(request_id))

    def _answer(self, ask: Ask) -> Answer:
        if ask.what == "memory":
            return Answer(ask.question_id, memory=self._core.memory())
        return Answer(ask.question_id, requests=self._core.requests())
