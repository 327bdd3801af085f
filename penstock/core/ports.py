"""The interfaces between rooms: who calls them, when, and what they may change.

A port is written here so that no room imports upward. Implementations: `ModelClient` by
`text/service` (and later by upstreams), `EngineClient` by `engine/client` (in-process and
cross-process) and by `tests/fakes`, `EngineEvents` by `observe`, `Clock` and `Rng` by `observe.clock`
and by `sim`.
"""

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from penstock.core.ids import ModelName, RequestId
from penstock.core.pooled import (
    Classification,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    Score,
    ScoreRequest,
)
from penstock.core.text import FinishReason, GenerateRequest, ModelCard, TextDelta
from penstock.core.tokens import (
    AdapterReport,
    EngineInfo,
    EngineRequest,
    MemoryReport,
    RequestReport,
    StepStats,
    TokenDelta,
)


class Clock(Protocol):
    """Time from outside, so that policy runs under a simulator."""

    def monotonic(self) -> float:
        """Seconds, never going back; for intervals."""
        ...

    def wall(self) -> float:
        """Unix time in seconds; for dates only."""
        ...


class Rng(Protocol):
    """Randomness from outside; `random.Random` fits."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...

    def getrandbits(self, k: int, /) -> int:
        """K random bits."""
        ...


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Telemetry of one request, emitted once, when it ends; never any text."""

    request_id: RequestId
    """As the client knows it."""
    model: ModelName
    tenant_id: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    finish_reason: FinishReason
    error_code: str | None
    ttft_s: float | None
    """Received to first non-empty token; None if there was none."""
    tpot_s: float | None = None
    """Per answer (last token - first token) / (tokens - 1), the mean over the answers of at least two tokens;
    None if there are none."""
    e2e_s: float
    tokens_per_s: float
    queue_wait_s: float
    batch_size: int
    kv_usage: float
    num_preemptions: int
    inference_s: float = 0.0
    """First scheduled step to the end, by the engine's clock."""
    num_tool_calls: int = 0
    """Calls of tools in its answers."""
    adapter: str = ""
    """LoRA adapter that answered; empty for the base model."""
    is_accepted: bool = True
    """False if it was refused before the engine took it; its times then say nothing about the service."""


class EngineEvents(Protocol):
    """Sink for what happens; called in the API process, must not block or raise."""

    def on_step(self, model: ModelName, stats: StepStats) -> None:
        """After each engine step."""
        ...

    def on_token_gap(self, model: ModelName, gap_s: float) -> None:
        """Between two deltas of one answer (ITL)."""
        ...

    def on_request(self, record: RequestRecord) -> None:
        """Once per request, at its terminal event."""
        ...

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        """When an engine process died or hung and is started again; `reason` is `died` or `hung`."""
        ...

    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None:
        """When a request's grammar is `compiled`, found `cached` or `refused`; seconds 0 if it was known."""
        ...


class EngineClient(Protocol):
    """The lower waist, used by `text/service`.

    `generate` is awaited until the engine side has accepted the request; it raises `CapacityError` or
    `RequestError` if not, before any token. The generator then yields `TokenDelta`s up to the terminal
    one and raises `EngineError` if the request fails. Closing it early cancels the request: its blocks
    are free within two steps.
    """

    @property
    def info(self) -> EngineInfo:
        """Resolved facts; valid once ready, kept through a restart."""
        ...

    @property
    def not_ready_reason(self) -> str | None:
        """None if requests can be served now, else a word: loading, draining, restarting, queue_full."""
        ...

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """Submit a request; see the class."""
        ...


class EngineAdmin(Protocol):
    """Questions and orders of an operator, used by `server/admin`."""

    async def memory(self) -> MemoryReport:
        """Who holds which bytes."""
        ...

    async def requests(self) -> Sequence[RequestReport]:
        """Every request in the engine, at most 10,000."""
        ...

    @property
    def is_sleeping(self) -> bool:
        """True from the order to sleep until the engine is awake again."""
        ...

    async def sleep(self, level: int) -> None:
        """Give memory back until `wake_up`; returns when it has been given. Asleep already: nothing more.

        Args:
            level: 1 keeps the weights, in host memory; requests in the engine wait and go on afterwards.
                2 ends the engine process; requests that have produced tokens end with `NotReadyError`.

        Raises:
            InvalidParameterError: this engine cannot sleep at that level.
            NotReadyError: it is loading or restarting, or did not fall asleep in time.
        """
        ...

    async def wake_up(self) -> None:
        """Be ready for requests again; nothing if it does not sleep.

        Raises:
            NotReadyError: it did not wake up in time.
            StartupError: after level 2, the engine cannot start any more.
        """
        ...


class AdapterAdmin(Protocol):
    """An operator's orders about the LoRA adapters of one model, used by `server/admin`."""

    async def adapters(self) -> Sequence[AdapterReport]:
        """All that are loaded."""
        ...

    async def load(self, name: str, *, folder: str, is_replacing: bool) -> AdapterReport:
        """Load an adapter and let clients choose it by its name.

        Args:
            name: for `model`.
            folder: its name in the operator's folder of adapters, never a path.
            is_replacing: the name may be taken; running requests go on with what it stood for.

        Raises:
            InvalidParameterError: names the field at fault, of the order or the adapter; nothing has changed.
        """
        ...

    async def unload(self, name: str) -> AdapterReport:
        """Forget an adapter; running requests go on.

        Raises:
            NotFoundError: there is none of this name.
        """
        ...


class ModelClient(Protocol):
    """The upper waist, used by every dialect through the catalog.

    `generate` has the contract of `EngineClient.generate`, one floor up.
    """

    @property
    def card(self) -> ModelCard:
        """Name and limits."""
        ...

    @property
    def not_ready_reason(self) -> str | None:
        """None if requests can be served now, else a word."""
        ...

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        """Answer a request; see the class."""
        ...

    async def embed(self, request: EmbedRequest) -> Embedding:
        """The vector of a text; raises as `generate` does. Cancelling the call cancels the request."""
        ...

    async def score(self, request: ScoreRequest) -> Score:
        """How well a document fits a query; else as `embed`."""
        ...

    async def classify(self, request: ClassifyRequest) -> Classification:
        """The classes of a text, for models that were made for it; else as `embed`."""
        ...

    async def tokenize(self, request: GenerateRequest, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the prompt or rendered conversation."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included."""
        ...


class KvTransfer(msgspec.Struct, frozen=True, kw_only=True):
    """Whole KV blocks of one prefix, on their way into or out of the pool."""

    transfer_id: int
    """Names the transfer until `poll` has reported it; never reused."""
    namespace: tuple[str, ...]
    """All of the prefix key that is not tokens: model revision, KV dtype, adapter, tenant, salt."""
    token_ids: list[int]
    """The prefix from its first token to the end of the last block moved."""
    first_block: int
    """Index of the first block moved; those before it stay where they are."""
    block_ids: tuple[list[int], ...]
    """Per cache group the blocks from `first_block` on."""


class KvTransferEnd(msgspec.Struct, frozen=True, array_like=True):
    """A transfer is over; its blocks are no longer read or written."""

    transfer_id: int
    ok: bool = True
    """False if a load failed: the tokens are computed instead."""


class KvConnector(Protocol):
    """Moves KV blocks to and from outside the pool: swap, offload tiers, disaggregation.

    Called by the scheduler only, which holds the blocks of a transfer until `poll` has reported its end. A
    request whose blocks are being loaded is in state `waiting_kv` and is not scheduled. Implementations own
    the copies outside; they never allocate blocks. What is stored under one namespace is never offered to
    another.
    """

    def num_loadable_tokens(
        self, namespace: Sequence[str], token_ids: Sequence[int], *, num_computed_tokens: int
    ) -> int:
        """How many tokens beyond `num_computed_tokens` it holds, a multiple of the block size."""
        ...

    def begin_load(self, transfer: KvTransfer) -> None:
        """Start to fill the blocks; returns at once."""
        ...

    def begin_save(self, transfer: KvTransfer) -> None:
        """Start to copy the (full) blocks out; returns at once."""
        ...

    def poll(self) -> Sequence[KvTransferEnd]:
        """Transfers that ended since the last call; never blocks."""
        ...
