"""The engines that the pairs run on: one for each combination of engine features, kept for the session."""

import asyncio
import math
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager, aclosing, nullcontext
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from unittest.mock import patch

import msgspec
import pytest

from penstock.cli.local_model import LocalModel, LoopThread, StepTotals, open_local_model
from penstock.cli.model_source import find_model
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.pooled import EmbedRequest
from penstock.core.text import FinishReason, GenerateRequest, Priority, TextDelta, Usage
from penstock.core.tokens import EngineRequest, Pooling
from penstock.engine.config import (
    EngineConfig,
    KvConfig,
    LoraConfig,
    LoraModule,
    SchedulerConfig,
    SpeculativeConfig,
)
from penstock.engine.core import EngineCore
from tests.docs.tiny_model import HEAD_DIM, MLP, make_tiny_adapter, make_tiny_model
from tests.fakes.thread_ranks import ThreadRanks
from tools.quantized.checkpoint import write_quantized
from tools.quantized.gguf_file import write_gguf

BLOCK_SIZE = 4
WINDOW = 8
CHUNK = 5
"""Tokens in a step with `chunked_prefill`: a prompt of 13 takes three steps."""
FEW_BLOCKS = 16
"""Blocks with `preemption`: the request and its neighbours need about thirty."""
FEW_WINDOW_BLOCKS = 11
"""As `FEW_BLOCKS`, where blocks behind the window are given back."""
SHORT_OF_BLOCKS = frozenset({"preemption", "kv_offload"})
OFFLOADING_BYTES = 1 << 24
NATIVE = frozenset({"native_bfloat16", "kv_int8"})
"""Features of the native kernels, whose heads and blocks are larger."""
GGUF_MLP = 64
"""Its blocks have 32 numbers."""
NATIVE_BLOCK_SIZE = 16
NATIVE_HEAD_DIM = 32
FEW_NATIVE_BLOCKS = 5
POOLED_PROMPT = "A prompt of many blocks"
POOLED_TOLERANCE = 0.02
"""Of numbers below 1, between the same prompt alone and in company, on kernels that round to bfloat16."""
NUM_NEIGHBOURS = 3
ADAPTER = "adapter"
NUM_SEATS = NUM_NEIGHBOURS + 2


@dataclass(slots=True)
class Run:
    """What one request gave."""

    deltas: list[TextDelta] = field(default_factory=list)
    usage: Usage | None = None
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_offload_hits: int = 0
    num_prefill_steps: int = 0
    max_step_tokens: int = 0
    num_owned_after: int = 0

    def text(self, index: int = 0) -> str:
        """All that was shown, thoughts and answer."""
        return "".join(delta.reasoning + delta.text for delta in self.deltas if delta.index == index)

    def tokens(self, index: int = 0) -> list[int]:
        return [token for delta in self.deltas if delta.index == index for token in delta.token_ids]

    def end(self, index: int = 0) -> tuple[FinishReason | None, int | str | None]:
        """Finish reason and stop reason; (None, None) if the answer was cut off."""
        ends = [(d.finish_reason, d.stop_reason) for d in self.deltas if d.index == index and d.finish_reason]
        assert len(ends) <= 1, "exactly one terminal delta"
        return ends[0] if ends else (None, None)


class WatchedTotals(StepTotals):
    """Also remembers the largest step."""

    max_step_tokens = 0

    def on_step(self, _model, stats) -> None:  # type: ignore[no-untyped-def]
        super().on_step(_model, stats)
        self.max_step_tokens = max(self.max_step_tokens, stats.num_batched_tokens)


class FeatureEngine:
    """One engine in this process with some engine features on."""

    def __init__(self, folder: Path, features: frozenset[str]) -> None:
        self._features = features
        self._thread = LoopThread()
        self._totals = WatchedTotals()
        self._num_requests = 0
        window = WINDOW if "sliding_window" in features else None
        head_dim = NATIVE_HEAD_DIM if features & NATIVE else HEAD_DIM
        mlp = GGUF_MLP if "gguf" in features else MLP
        made = make_tiny_model(folder / "model", window=window, head_dim=head_dim, mlp=mlp)
        if "gptq" in features:
            made = write_quantized(made, folder / "gptq", "gptq-all-inputs")
        if "gguf" in features:
            write_gguf(made, folder / "model.gguf", kind="Q8_0")
            made = folder / "model.gguf"
        source = find_model(str(made))
        draft = make_tiny_model(folder / "draft", head_dim=head_dim, seed=6)
        config = _config(source.path, features, draft=draft)
        if "lora" in features:
            adapter = make_tiny_adapter(folder / "adapter", head_dim=head_dim, mlp=mlp)
            module = LoraModule(name=ADAPTER, path=str(adapter))
            config = msgspec.structs.replace(config, lora=LoraConfig(enable_lora=True, modules=(module,)))
        if {"triton", "tensor_parallel"} <= features:
            _let_launches_take_turns()
        # Ranks as threads: as processes they cost seconds each, for the same plans and sums.
        with patch("penstock.engine.build.StartedRanks", new=ThreadRanks):
            self._local: LocalModel = self._thread.run(open_local_model(source, config, events=self._totals))

    @property
    def execution(self) -> str:
        return self._local.info.execution

    @property
    def kernels(self) -> str:
        return self._local.info.kernels

    @property
    def is_async(self) -> bool:
        """True if steps are launched before the outcome of the last is known."""
        return self._local.info.async_scheduling

    def close(self) -> None:
        self._thread.run(self._local.close())
        self._thread.close()

    def run(self, request: GenerateRequest, *, cut_after: int | None = None, is_base: bool = False) -> Run:
        """One request, with neighbours where the engine is short of blocks.

        It asks for the adapter where the engine has one, unless `is_base`; the neighbours do not.
        """
        if "lora" in self._features and not is_base:
            request = msgspec.structs.replace(request, adapter=ADAPTER)
        return self._thread.run(self._run(request, cut_after=cut_after))

    def pooled(self, name: str, request: GenerateRequest) -> tuple[float, ...]:
        """A vector or a score of a prompt, while `request` and its neighbours are answered; made twice.

        The second time its blocks may be in the cache.
        """
        return self._thread.run(self._pooled(name, request))

    async def _pooled(self, name: str, request: GenerateRequest) -> tuple[float, ...]:
        others = [await self._generate(each) for each in (*self._neighbours(request), request)]
        first, second = [await self._pool_once(name, request) for _ in range(2)]
        for each in others:
            async for _ in each:
                pass
        assert second == pytest.approx(first, abs=POOLED_TOLERANCE), "not the same again"
        assert (await self._local.engine.memory()).kv_bytes_owned == 0
        return first

    async def _pool_once(self, name: str, request: GenerateRequest) -> tuple[float, ...]:
        self._num_requests += 1
        key = RequestId(f"pooled-{self._num_requests}")
        if name in {"mean", "last"}:
            asked = EmbedRequest(request_id=key, model=request.model, prompt=POOLED_PROMPT, pooling=name)
            return (await self._local.service.embed(asked)).values
        ids = await self._local.service.tokenize(
            GenerateRequest(request_id=key, model=request.model, prompt=POOLED_PROMPT),
            add_special_tokens=True,
        )
        params = SamplingParams(max_tokens=0)
        pooling = Pooling("logits", (5, 6))
        stream = await self._local.engine.generate(
            EngineRequest(request_id=key, prompt_token_ids=ids, params=params, pooling=pooling)
        )
        (delta,) = [delta async for delta in stream]
        logit, other = delta.pooled
        return (1 / (1 + math.exp(logit - other)),)

    def order(self, request: GenerateRequest) -> list[Priority]:
        """Priorities in the order of their ends, of a batch request and a realtime one that came after it.

        Each takes every seat, and the engine takes its first step when both are queued.
        """
        return self._thread.run(self._order(request))

    def num_prompt_tokens(self, request: GenerateRequest) -> int:
        """Tokens of the prompt or rendered conversation."""
        is_text = request.messages is None
        return len(self._thread.run(self._local.service.tokenize(request, add_special_tokens=is_text)))

    async def _run(self, request: GenerateRequest, *, cut_after: int | None) -> Run:
        run = Run()
        preempted, found = self._totals.num_preemptions, self._totals.num_offload_hit_tokens
        drafted = self._totals.num_draft_tokens
        self._totals.max_step_tokens = 0
        with self._without_steps():
            neighbours = [await self._generate(each) for each in self._neighbours(request)]
            own = await self._generate(request)
        await self._local.engine.memory()  # a message, after which there is work again
        async with aclosing(own) as stream:
            async for delta in stream:
                run.deltas.append(delta)
                run.usage = delta.usage or run.usage
                if len(run.deltas) == cut_after:
                    break
        for each in neighbours:
            async for _ in each:
                pass
        run.num_preemptions = self._totals.num_preemptions - preempted
        run.num_draft_tokens = self._totals.num_draft_tokens - drafted
        run.num_offload_hits = self._totals.num_offload_hit_tokens - found
        run.max_step_tokens = self._totals.max_step_tokens
        memory = await self._local.engine.memory()
        run.num_owned_after = memory.kv_bytes_owned // self._local.info.bytes_per_block
        return run

    def _without_steps(self) -> AbstractContextManager[object]:
        """Where blocks are short all requests are there before the first step: they must meet.

        The engine answers messages meanwhile.
        """
        if not self._features & SHORT_OF_BLOCKS:
            return nullcontext()
        return patch.object(EngineCore, "has_work", new=False)

    async def _order(self, request: GenerateRequest) -> list[Priority]:
        params = SamplingParams(n=NUM_SEATS, max_tokens=2, ignore_eos=True)
        kept = msgspec.structs.replace(request, prompt="x", messages=None, params=params, echo=False)
        kept = msgspec.structs.replace(kept, continue_final_message=False, tools=())
        ended: list[Priority] = []

        async def read(stream, priority: Priority) -> None:  # type: ignore[no-untyped-def]
            async for _ in stream:
                pass
            ended.append(priority)

        order = (Priority.BATCH, Priority.REALTIME)
        requests = [msgspec.structs.replace(kept, priority=priority) for priority in order]
        with patch.object(EngineCore, "has_work", new=False):  # it answers messages, and takes no step
            streams = [await self._generate(each) for each in requests]
            readers = [asyncio.create_task(read(s, p)) for s, p in zip(streams, order, strict=True)]
            await self._local.engine.memory()  # the readers wait by now, and hear in the order of the ends
        await self._local.engine.memory()  # a message, after which there is work again
        await asyncio.gather(*readers)
        return ended

    async def _generate(self, request: GenerateRequest):  # type: ignore[no-untyped-def]
        self._num_requests += 1
        fresh = msgspec.structs.replace(request, request_id=RequestId(str(self._num_requests)))
        return await self._local.service.generate(fresh)

    def _neighbours(self, request: GenerateRequest) -> Iterable[GenerateRequest]:
        if not self._features & SHORT_OF_BLOCKS:
            return
        params = msgspec.structs.replace(
            request.params,
            n=1,
            best_of=None,
            use_beam_search=False,
            max_tokens=20,
            ignore_eos=True,
            stop=(),
            logprobs=None,
        )
        params = msgspec.structs.replace(params, stop_token_ids=(), min_tokens=0)
        for number in range(NUM_NEIGHBOURS):
            yield GenerateRequest(
                request_id=request.request_id,
                model=request.model,
                prompt=f"neighbour {number}",
                params=params,
                priority=Priority.REALTIME,
            )


@cache
def _let_launches_take_turns() -> None:
    """Triton's interpreter knows one program at a time, and ranks are threads here."""
    from triton.runtime.interpreter import InterpretedFunction

    launch, turn = InterpretedFunction.run, threading.Lock()

    def run(self, *args, **options):  # type: ignore[no-untyped-def]
        with turn:
            return launch(self, *args, **options)

    InterpretedFunction.run = run


def _all_of(features: frozenset[str], words: dict[str, str], otherwise: str) -> str:
    """The values that the features ask of one option; several are refused."""
    return ",".join(word for name, word in words.items() if name in features) or otherwise


def _speculative(features: frozenset[str], draft: Path) -> SpeculativeConfig | None:
    method = _all_of(features, {"ngram": "ngram", "draft_model": "draft_model"}, "")
    if method == "draft_model":
        return SpeculativeConfig(method="draft_model", model=str(draft))
    return SpeculativeConfig(method=method, prompt_lookup_min=1) if method else None  # type: ignore[arg-type]  # a wrong one is refused


def _config(path: Path, features: frozenset[str], *, draft: Path) -> EngineConfig:
    is_native = bool(features & NATIVE)
    homes = {"eager_bfloat16": "eager", "native_bfloat16": "native", "triton": "triton"}
    kernels = _all_of(features, homes, "reference")
    if is_native and kernels == "reference":
        kernels = "native"
    return EngineConfig(
        model_path=str(path),
        dtype="bfloat16" if is_native or "eager_bfloat16" in features else "float32",
        kernels=kernels,
        quantization=_all_of(features, {"int8": "int8", "int4": "int4", "fp8": "fp8"}, "none"),
        deterministic="deterministic" in features,
        num_threads=1,
        tensor_parallel_size=2 if "tensor_parallel" in features else 1,
        max_model_len=56,
        warmup=False,
        speculative=_speculative(features, draft),
        scheduler=SchedulerConfig(
            max_num_seqs=NUM_SEATS,
            max_num_batched_tokens=CHUNK if "chunked_prefill" in features else 256,
            enable_prefix_caching=bool(features & {"prefix_caching", "kv_offload"}),
            enable_chunked_prefill="whole_prompts" not in features,
            policy="fcfs" if "fcfs" in features else "fair",
            async_scheduling="async_scheduling" in features,
        ),
        kv=KvConfig(
            block_size=NATIVE_BLOCK_SIZE if is_native else BLOCK_SIZE,
            cache_dtype=_all_of(features, {"kv_int8": "int8", "kv_fp8": "fp8"}, "auto"),
            num_blocks=_num_blocks(features),
            offloading_bytes=OFFLOADING_BYTES if "kv_offload" in features else 0,
        ),
    )


def _num_blocks(features: frozenset[str]) -> int:
    if not features & SHORT_OF_BLOCKS:
        return 128
    if features & NATIVE:
        return FEW_NATIVE_BLOCKS
    return FEW_WINDOW_BLOCKS if "sliding_window" in features else FEW_BLOCKS
