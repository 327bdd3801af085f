"""Messages between the first rank and the others.

msgpack structs with closed tags, over a private `ipc://` socket for each rank. The first rank sends a plan
and all compute it; what they exchange meanwhile goes through `parallel/collectives`, not through here.
"""

import msgspec

from penstock.core.tokens import ErrorInfo
from penstock.engine.config import EngineConfig
from penstock.engine.scheduler.plan import StepPlan


class RankStart(msgspec.Struct, frozen=True, tag="start"):
    """First message: meet the others and load; answered by `RankLoaded` or `RankFailed`."""

    config: EngineConfig
    index: int
    """From 1."""
    folder: str
    """Where the ranks meet."""


class RankBuild(msgspec.Struct, frozen=True, tag="build"):
    """Reserve the KV memory."""

    num_blocks: int


class RankWarmUp(msgspec.Struct, frozen=True, tag="warm_up"):
    """As `Runner.warm_up`."""

    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


class RankStep(msgspec.Struct, frozen=True, tag="step"):
    """Compute a plan."""

    plan: StepPlan


class RankStop(msgspec.Struct, frozen=True, tag="stop"):
    """The last message."""


class RankLoaded(msgspec.Struct, frozen=True, tag="loaded"):
    """The rank's part of the model is there."""

    weights_bytes: int


class RankFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The rank cannot start; its last message."""

    error: ErrorInfo


ToRank = RankStart | RankBuild | RankWarmUp | RankStep | RankStop
FromRank = RankLoaded | RankFailed

_encoder = msgspec.msgpack.Encoder()
_to_rank = msgspec.msgpack.Decoder(ToRank)
_from_rank = msgspec.msgpack.Decoder(FromRank)


def encode(message: ToRank | FromRank) -> bytes:
    """One message as msgpack."""
    return _encoder.encode(message)


def decode_to_rank(data: bytes) -> ToRank:
    """Read a message of the first rank."""
    message: ToRank = _to_rank.decode(data)
    return message


def decode_from_rank(data: bytes) -> FromRank:
    """Read a message to the first rank."""
    message: FromRank = _from_rank.decode(data)
    return message
