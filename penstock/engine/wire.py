"""Messages between the API side and the engine side.

msgpack structs with closed tags: a message that is not in the union is refused by the decoder. Used by
`client` and `supervisor` on one side, by `loop` and `process` on the other.
"""

import msgspec

from penstock.core.ids import RequestId
from penstock.core.tokens import (
    AdapterReport,
    EngineInfo,
    EngineRequest,
    ErrorInfo,
    MemoryReport,
    RequestReport,
    StepStats,
    TokenDelta,
)
from penstock.engine.config import EngineConfig, LoraModule


class Start(msgspec.Struct, frozen=True, tag="start"):
    """First message to a fresh engine process."""

    config: EngineConfig


class Submit(msgspec.Struct, frozen=True, tag="submit"):
    """A new request; answered by `Accepted` or `Refused`."""

    request: EngineRequest


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """The client has gone; an unknown id is ignored."""

    request_id: RequestId


class Ping(msgspec.Struct, frozen=True, tag="ping"):
    """Prove that the step loop turns; answered by `Pong` between two steps."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """An operator's question; answered by `Answer` with the same `question_id`."""

    question_id: int
    what: str
    """`memory`, `requests` or `adapters`"""


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """An operator's order, carried out beside the steps; answered by `Answer` with `adapters` or `error`."""

    question_id: int
    module: LoraModule
    is_replacing: bool
    """The name may be taken."""


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Forget an adapter's name; requests that have begun go on. Answered as `LoadAdapter`."""

    question_id: int
    name: str


class Sleep(msgspec.Struct, frozen=True, tag="sleep"):
    """Put running requests back into the queue and give memory back; answered by `Answer` when asleep."""

    question_id: int


class WakeUp(msgspec.Struct, frozen=True, tag="wake_up"):
    """Undo `Sleep`; answered by `Answer` when awake."""

    question_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """End the process; requests in flight are dropped, the API side has told their clients."""


class Loading(msgspec.Struct, frozen=True, tag="loading"):
    """Progress of loading the weights, in bytes."""

    done_bytes: int
    total_bytes: int


class Started(msgspec.Struct, frozen=True, tag="started"):
    """The engine is warm and ready."""

    info: EngineInfo


class Accepted(msgspec.Struct, frozen=True, tag="accepted"):
    """The request is in the queue; from here it ends in exactly one terminal delta."""

    request_id: RequestId


class Refused(msgspec.Struct, frozen=True, tag="refused"):
    """The request was not queued."""

    request_id: RequestId
    error: ErrorInfo


class Grammar(msgspec.Struct, frozen=True, tag="grammar"):
    """What came of a request's grammar, for the metrics; `Accepted` or `Refused` follows."""

    outcome: str
    """`compiled`, `cached` or `refused`."""
    compile_s: float
    """0 if it was known already."""


class Output(msgspec.Struct, frozen=True, tag="output"):
    """What a step gave; `stats` is None for deltas outside a step (cancellations)."""

    deltas: list[TokenDelta]
    stats: StepStats | None = None


class Pong(msgspec.Struct, frozen=True, tag="pong"):
    """Answer to `Ping`."""


class Answer(msgspec.Struct, frozen=True, tag="answer"):
    """Answer to `Ask` and to orders; at most one field is set."""

    question_id: int
    memory: MemoryReport | None = None
    requests: list[RequestReport] | None = None
    adapters: list[AdapterReport] | None = None
    error: ErrorInfo | None = None


class Fatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine ends; `error` says why (a `StartupError` before `Started`)."""

    error: ErrorInfo


ToEngine = Start | Submit | Abort | Ping | Ask | LoadAdapter | UnloadAdapter | Sleep | WakeUp | Shutdown
FromEngine = Loading | Started | Accepted | Refused | Grammar | Output | Pong | Answer | Fatal

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_to_engine(data: bytes) -> ToEngine:
    """Read a message on the engine side."""
    message: ToEngine = _to_engine.decode(data)
    return message


def decode_from_engine(data: bytes) -> FromEngine:
    """Read a message on the API side."""
    message: FromEngine = _from_engine.decode(data)
    return message
