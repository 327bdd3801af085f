"""The engine's side of the conversation: take messages, step, answer.

`EngineLoop` turns in the engine process over a zmq socket and in a thread for the in-process client; the
difference is the `Channel`. It knows no asyncio.
"""

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

from penstock.core.error_info import error_to_info
from penstock.core.errors import GenerateError, InvalidParameterError, PenstockError
from penstock.core.ids import RequestId
from penstock.core.tokens import EngineRequest
from penstock.engine.core import ADAPTER_WAIT_S, EngineCore
from penstock.engine.lora.host import AdapterHost, LoadOrder
from penstock.engine.scheduler.settlement import StepOutput
from penstock.engine.sleep import Sleeper, SleepState
from penstock.engine.wire import (
    Abort,
    Accepted,
    Answer,
    Ask,
    FromEngine,
    Grammar,
    LoadAdapter,
    Output,
    Ping,
    Pong,
    Refused,
    Shutdown,
    Sleep,
    Start,
    Submit,
    ToEngine,
    UnloadAdapter,
    WakeUp,
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
        self._was_idle = False
        self._sleeper = Sleeper(core)
        core.grammars.wake = channel.wake

    def run(self) -> None:
        """Turn until `Shutdown`.

        Raises:
            EngineDeadError: the runner cannot go on; the process must be restarted.
        """
        try:
            while not self._stopped:
                self._turn()
        finally:  # an engine that fails takes its other ranks along
            self._core.grammars.close()
            self._core.ranks.close()

    def _turn(self) -> None:
        is_idle = self._is_idle()
        self._use_idle_time(is_idle)
        for message in self._channel.receive(block=is_idle):
            self._handle(message)
        for done in self._core.grammars.take_done():
            self._channel.send(Grammar(done.outcome_word, done.compile_s))
            self._answer_submit(done.request.request_id, partial(self._core.add_compiled, done))
        self._answer_orders()
        if self._sleeper.has_work and not self._stopped:
            self._tell(self._core.step())
        self._rest()

    def _is_idle(self) -> bool:
        """True if there is nothing to do but to wait for messages."""
        if self._sleeper.has_work or self._is_loading:
            return False
        return self._sleeper.state is SleepState.ASLEEP or not self._core.prepare()

    def _use_idle_time(self, is_idle: bool) -> None:
        """Idle since the last message, mostly a ping of a second ago: get ready for the first grammar.

        Not at start: whoever waits for the engine would wait longer, and few of the first requests have one.
        """
        if is_idle and self._was_idle and self._sleeper.state is SleepState.AWAKE:
            self._core.grammars.warm_up()
        self._was_idle = is_idle

    def _tell(self, output: StepOutput) -> None:
        self._channel.send(Output(output.deltas, output.stats))

    def _rest(self) -> None:
        """Fall asleep if it has come to that, and tell who asked; asleep, cancelled requests still end."""
        if self._sleeper.state is SleepState.AWAKE:
            return
        last = self._sleeper.fall()
        if last is not None:
            self._tell(last)
        for question_id in self._sleeper.take_asking():
            self._channel.send(Answer(question_id))
        deltas = self._core.scheduler.take_deltas()
        if deltas:
            self._channel.send(Output(deltas))

    def _sleep(self, message: Sleep) -> None:
        try:
            self._sleeper.begin(message.question_id)
        except PenstockError as error:
            self._channel.send(Answer(message.question_id, error=error_to_info(error)))

    def _wake_up(self, message: WakeUp) -> None:
        for question_id in (*self._sleeper.wake_up(), message.question_id):
            self._channel.send(Answer(question_id))

    @property
    def _is_loading(self) -> bool:
        """True while an adapter is being read: the loop turns to see when it is there."""
        return self._core.adapters is not None and self._core.adapters.is_busy

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
            case LoadAdapter() | UnloadAdapter() | Sleep() | WakeUp():
                self._carry_out(message)
            case Shutdown():
                self._stopped = True
            case Start():
                raise AssertionError("Start is only valid as the first message")

    def _carry_out(self, order: LoadAdapter | UnloadAdapter | Sleep | WakeUp) -> None:
        match order:
            case LoadAdapter():
                self._load_adapter(order)
            case UnloadAdapter():
                self._unload_adapter(order)
            case Sleep():
                self._sleep(order)
            case WakeUp():
                self._wake_up(order)

    def _submit(self, request: EngineRequest) -> None:
        try:
            self._sleeper.refuse_requests()
        except PenstockError as error:
            self._channel.send(Refused(request.request_id, error_to_info(error)))
            return
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

    def _adapters(self) -> AdapterHost:
        if self._core.adapters is None:
            raise InvalidParameterError(
                "adapters are not enabled, the server was started without enable_lora", param="lora_name"
            )
        return self._core.adapters

    def _load_adapter(self, message: LoadAdapter) -> None:
        """Begin to load; the answer follows when it has ended."""
        order = LoadOrder(
            question_id=message.question_id, module=message.module, is_replacing=message.is_replacing
        )
        try:
            self._adapters().begin_load(order)
        except PenstockError as error:
            self._channel.send(Answer(message.question_id, error=error_to_info(error)))

    def _unload_adapter(self, message: UnloadAdapter) -> None:
        try:
            answer = Answer(message.question_id, adapters=[self._adapters().unload(message.name)])
        except PenstockError as error:
            answer = Answer(message.question_id, error=error_to_info(error))
        self._channel.send(answer)

    def _answer_orders(self) -> None:
        """Tell how orders ended that ran beside the steps; waits a little if there is no step."""
        adapters = self._core.adapters
        if adapters is None:
            return
        if adapters.is_busy and not self._core.has_work:
            adapters.wait(ADAPTER_WAIT_S)
        adapters.poll()
        for outcome in adapters.take_outcomes():
            if outcome.error is not None:
                self._channel.send(Answer(outcome.question_id, error=error_to_info(outcome.error)))
            elif outcome.adapter is not None:
                self._channel.send(Answer(outcome.question_id, adapters=[outcome.adapter]))

    def _answer(self, ask: Ask) -> Answer:
        if ask.what == "adapters":
            return Answer(ask.question_id, adapters=self._adapters().reports())
        if ask.what == "memory":
            return Answer(ask.question_id, memory=self._core.memory())
        return Answer(ask.question_id, requests=self._core.requests())
