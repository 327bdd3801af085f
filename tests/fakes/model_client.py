"""A scripted `ModelClient`: answers in microseconds, one token per piece, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

import msgspec

from penstock.core.errors import PenstockError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.pooled import (
    Classification,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    PromptRequest,
    Score,
    ScoreRequest,
)
from penstock.core.text import FinishReason, GenerateRequest, ModelCard, TextDelta, TextLogprob, Usage

NAME = ModelName("fake")
PIECES = ("Hello", ",", " world", "!")


@dataclass
class FakeModelClient:
    """Streams `pieces` for every answer; knobs say when to wait, refuse or fail."""

    name: ModelName = NAME
    pieces: tuple[str, ...] = PIECES
    refusal: PenstockError | None = None
    """Raised by `generate` itself, before anything is accepted."""
    failure: PenstockError | Exception | None = None
    fail_after: int = 0
    """Deltas before `failure` is raised."""
    hold_after: int | None = None
    """Deltas after which the stream waits for `resume`."""
    repeat: int = 1
    """How often `pieces` are said."""
    max_model_len: int = 4096
    not_ready: str | None = None
    default_sampling: SamplingParams = field(default_factory=SamplingParams)
    resume: asyncio.Event = field(default_factory=asyncio.Event)
    held: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    """Set whenever a stream ends, however it does."""
    requests: list[GenerateRequest] = field(default_factory=list)
    pooled: list[PromptRequest] = field(default_factory=list)
    cancelled: list[RequestId] = field(default_factory=list)
    num_open: int = 0

    @property
    def card(self) -> ModelCard:
        return ModelCard(
            name=self.name,
            created_unix_s=1_700_000_000,
            max_model_len=self.max_model_len,
            root="fake",
            default_sampling=self.default_sampling,
        )

    @property
    def not_ready_reason(self) -> str | None:
        return self.not_ready

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        self.requests.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.num_open += 1
        return self._watched(request)

    async def _watched(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        finished = False
        try:
            async for delta in self._deltas(request):
                yield delta
            finished = True
        except PenstockError:
            finished = True
            raise
        finally:
            self.num_open -= 1
            self.ended.set()
            if not finished:
                self.cancelled.append(request.request_id)

    async def _deltas(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        pieces = self._pieces(request)
        count = 0
        for position, piece in enumerate(pieces):
            for index in range(request.params.n):
                await self._pace(count)
                count += 1
                last = position == len(pieces) - 1
                done = last and index == request.params.n - 1
                delta = self._delta(
                    request, index=index, piece=piece, last=last, num_pieces=len(pieces), done=done
                )
                offset = sum(map(len, pieces[:position]))
                logprobs = self._logprobs(request, piece, offset=offset)
                yield msgspec.structs.replace(delta, logprobs=logprobs)
        await self._pace(count)

    async def _pace(self, count: int) -> None:
        if self.hold_after == count:
            self.held.set()
            await self.resume.wait()
        if self.failure is not None and count == self.fail_after:
            raise self.failure
        await asyncio.sleep(0)

    def _pieces(self, request: GenerateRequest) -> list[str]:
        pieces = list(self.pieces) * self.repeat
        if request.params.max_tokens is not None:
            pieces = pieces[: request.params.max_tokens]
        if request.echo and isinstance(request.prompt, str):
            pieces.insert(0, request.prompt)
        return pieces

    def _delta(
        self, request: GenerateRequest, *, index: int, piece: str, last: bool, num_pieces: int, done: bool
    ) -> TextDelta:
        cut = num_pieces < len(self.pieces) * self.repeat
        reason = FinishReason.LENGTH if cut else FinishReason.STOP
        return TextDelta(
            request_id=request.request_id,
            index=index,
            text=piece,
            finish_reason=reason if last else None,
            usage=self._usage(request, num_pieces) if done else None,
        )

    @staticmethod
    def _logprobs(request: GenerateRequest, piece: str, *, offset: int) -> tuple[TextLogprob, ...] | None:
        k = request.params.logprobs
        if k is None:
            return None
        top = tuple(
            TextLogprob(token=f"{piece}{i}", token_bytes=f"{piece}{i}".encode(), logprob=-float(i))
            for i in range(k)
        )
        return (
            TextLogprob(
                token=piece,
                token_bytes=piece.encode(),
                logprob=float("-inf"),
                top=top,
                text_offset=offset,
            ),
        )

    @staticmethod
    def _usage(request: GenerateRequest, num_pieces: int) -> Usage:
        return Usage(prompt_tokens=7, completion_tokens=request.params.n * num_pieces, cached_tokens=3)

    async def _pooled(self, request: PromptRequest) -> None:
        """Refuses, waits and fails as `generate` does, with the request as its only delta."""
        self.pooled.append(request)
        if self.refusal is not None:
            raise self.refusal
        self.num_open += 1
        try:
            await self._pace(0)
        except asyncio.CancelledError:
            self.cancelled.append(request.request_id)
            raise
        finally:
            self.num_open -= 1
            self.ended.set()

    async def embed(self, request: EmbedRequest) -> Embedding:
        await self._pooled(request)
        size = len(request.prompt)
        return Embedding(
            values=(0.5, -float(size), 0.25)[: request.dimensions],
            usage=Usage(prompt_tokens=size, completion_tokens=0),
        )

    async def score(self, request: ScoreRequest) -> Score:
        await self._pooled(request)
        size = len(request.document)
        return Score(value=size / 100, usage=Usage(prompt_tokens=size, completion_tokens=0))

    async def classify(self, request: ClassifyRequest) -> Classification:
        await self._pooled(request)
        usage = Usage(prompt_tokens=len(request.prompt), completion_tokens=0)
        return Classification(labels=("no", "yes"), probabilities=(0.25, 0.75), usage=usage)

    async def tokenize(self, request: GenerateRequest, *, add_special_tokens: bool) -> list[int]:
        text = request.prompt
        if request.messages is not None:
            text = "".join(f"{message.role}:{message.content}\n" for message in request.messages)
        ids = list(text) if isinstance(text, tuple) else [ord(character) for character in text or ""]
        return [0, *ids] if add_special_tokens else ids

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(chr(token_id) for token_id in token_ids if token_id < 0xD800)
