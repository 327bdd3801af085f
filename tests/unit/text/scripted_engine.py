"""An `EngineClient` that plays prepared deltas, and sinks that remember what they were told."""

import asyncio
from collections.abc import AsyncGenerator, Iterable

from penstock.core.ids import ModelName
from penstock.core.ports import RequestRecord
from penstock.core.text import FinishReason
from penstock.core.tokens import EngineInfo, EngineRequest, RequestStats, StepStats, TokenDelta

STATS = RequestStats(3, 2, 9, 0.25, 4, 0.5, 1, 2.5)


def make_info(*, vocab_size: int = 500, max_model_len: int = 64) -> EngineInfo:
    return EngineInfo(
        architecture="Scripted",
        num_parameters=1,
        dtype="float32",
        kernels="reference",
        device="cpu",
        vocab_size=vocab_size,
        weights_bytes=1,
        kv_bytes=1,
        bytes_per_block=1,
        block_size=16,
        num_blocks=64,
        num_cache_groups=1,
        max_model_len=max_model_len,
        max_num_seqs=4,
        max_num_batched_tokens=64,
        load_time_s=0.0,
        warmup_time_s=0.0,
    )


def tokens(ids: Iterable[int], *, index: int = 0, **fields: object) -> TokenDelta:
    return TokenDelta("r", index, tuple(ids), **fields)


def last(*, index: int = 0, reason: FinishReason = FinishReason.STOP, **fields: object) -> TokenDelta:
    return TokenDelta("r", index, finish_reason=reason, **({"stats": STATS} | fields))


class ScriptedEngine:
    """Yields `script` (an exception in it is raised; `None` waits for ever); remembers its requests and closings."""

    def __init__(
        self, script: Iterable[TokenDelta | Exception | None] = (), *, info: EngineInfo | None = None
    ) -> None:
        self.info = info or make_info()
        self.not_ready_reason: str | None = None
        self.refusal: Exception | None = None
        self.script = list(script)
        self.requests: list[EngineRequest] = []
        self.num_played = 0
        self.num_closed = 0

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenDelta]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        return _ScriptedStream(self)


class _ScriptedStream:
    """Counts its closing even if it was never advanced, as the engine's stream does."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._closed = False

    def __aiter__(self) -> "_ScriptedStream":
        return self

    async def __anext__(self) -> TokenDelta:
        engine = self._engine
        if self._closed or engine.num_played == len(engine.script):
            raise StopAsyncIteration
        item = engine.script[engine.num_played]
        engine.num_played += 1
        if item is None:
            await asyncio.Event().wait()
        if isinstance(item, Exception):
            raise item
        return item

    async def aclose(self) -> None:
        self._engine.num_closed += not self._closed
        self._closed = True


class Sink:
    """`EngineEvents` that remembers."""

    def __init__(self) -> None:
        self.records: list[RequestRecord] = []
        self.gaps_s: list[float] = []

    def on_step(self, model: ModelName, stats: StepStats) -> None:
        raise AssertionError

    def on_token_gap(self, model: ModelName, gap_s: float) -> None:
        self.gaps_s.append(gap_s)

    def on_request(self, record: RequestRecord) -> None:
        self.records.append(record)

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        raise AssertionError

    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None:
        raise AssertionError


class TickingClock:
    """Each look at the clock takes one second."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def monotonic(self) -> float:
        self.now_s += 1.0
        return self.now_s

    def wall(self) -> float:
        return 1_700_000_000.5
