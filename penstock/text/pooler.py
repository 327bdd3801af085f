"""Vectors, scores and classes of texts: the part of `service` that generates nothing.

A request is tokenized, submitted to the engine with a `Pooling` and answered by its one delta; what the
engine gives is normalised here. One `RequestRecord` is emitted for each, however it ends.

**Source:** for the yes/no form the model card of Qwen3-Reranker (2025): one conversation a pair, the score is
the softmax over the logits of the two words.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final, Protocol

from penstock.core.error_info import info_to_error
from penstock.core.errors import GenerateError, InvalidParameterError, PenstockError, StartupError
from penstock.core.ids import ModelName, RequestId
from penstock.core.params import SamplingParams
from penstock.core.pooled import (
    WHOLE_CONTEXT,
    Classification,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    PromptRequest,
    Score,
    ScoreRequest,
)
from penstock.core.ports import Clock, EngineClient, EngineEvents
from penstock.core.text import FinishReason, GenerateRequest, Message, Usage
from penstock.core.tokens import EngineRequest, Pooling, RequestStats, TokenDelta
from penstock.text.barrier import behind_barrier
from penstock.text.pooling_config import PoolingConfig
from penstock.text.stream import RequestMeter
from penstock.text.tokenizer import Tokenizer

JUDGE: Final = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct provided. "
    'Note that the answer can only be "{yes}" or "{no}".'
)
DEFAULT_INSTRUCTION: Final = "Given a web search query, retrieve relevant passages that answer the query"
PLACE: Final = "\ue000pair\ue001"
"""Stands in a rendered conversation where the pair will be; of characters that nobody writes."""
MAX_SCORED_LABELS: Final = 2
NOTHING: Final = Usage(prompt_tokens=0, completion_tokens=0)


class PromptEncoder(Protocol):
    """The service's own way from a prompt to checked token ids."""

    async def __call__(
        self, request: GenerateRequest, *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[int]:
        """Token ids, each in the vocabulary, not more than the context holds."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """A conversation with a gap for what is judged."""

    before: str
    after: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What the engine gave for one prompt."""

    values: tuple[float, ...]
    usage: Usage
    stats: RequestStats | None


class Pooler:
    """Answers `PromptRequest`s with the model behind `engine`."""

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        *,
        encode: PromptEncoder,
        render: Callable[[GenerateRequest], Coroutine[None, None, str]],
        name: ModelName,
        events: EngineEvents,
        clock: Clock,
        config: PoolingConfig,
        thoughts_off: Mapping[str, object],
    ) -> None:
        """Join the parts.

        Args:
            engine: where vectors come from; its `info` must be valid when requests come.
            tokenizer: the model's.
            encode: prompts to checked token ids.
            render: conversations to text, by the model's chat template.
            name: the model's name in records.
            events: told of ended requests.
            clock: for times.
            config: what requests do not say.
            thoughts_off: variables under which the chat template asks for an answer without thoughts.

        Raises:
            StartupError: an option names what is no single token.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._encode = encode
        self._render = render
        self._name = name
        self._events = events
        self._clock = clock
        self._config = config
        self._thoughts_off = dict(thoughts_off)
        self._frame: Frame | None = None
        self._check_config()

    def _check_config(self) -> None:
        """The default words may be unknown to a model that never scores; those of an operator may not."""
        default = PoolingConfig()
        for field in ("score_yes_token", "score_no_token"):
            if getattr(self._config, field) != getattr(default, field):
                try:
                    self._word_id(field)
                except InvalidParameterError as error:
                    raise StartupError(error.message, param=field) from None

    async def embed(self, request: EmbedRequest) -> Embedding:
        """As `ModelClient.embed`."""
        meter = self._meter(request)
        outcome = await _recorded(meter, self._embed(request, meter))
        return Embedding(
            values=_finished(outcome.values, dimensions=request.dimensions, normalize=request.normalize),
            usage=outcome.usage,
        )

    async def score(self, request: ScoreRequest) -> Score:
        """As `ModelClient.score`."""
        meter = self._meter(request)
        outcome = await _recorded(meter, self._score(request, meter))
        return Score(value=_probabilities(outcome.values)[-1], usage=outcome.usage)

    async def classify(self, request: ClassifyRequest) -> Classification:
        """As `ModelClient.classify`."""
        meter = self._meter(request)
        outcome = await _recorded(meter, self._classify(request, meter))
        return Classification(
            labels=self._engine.info.labels,
            probabilities=_probabilities(outcome.values),
            usage=outcome.usage,
        )

    def _meter(self, request: PromptRequest) -> RequestMeter:
        return RequestMeter(request, model=self._name, events=self._events, clock=self._clock)

    async def _embed(self, request: EmbedRequest, meter: RequestMeter) -> Outcome:
        self._check_dimensions(request.dimensions)
        if request.truncate_prompt_tokens is None:
            token_ids = await self._encode_prompt(
                request, request.prompt, add_special_tokens=request.add_special_tokens
            )
        else:
            token_ids = await self._encode_cut(request, limit=request.truncate_prompt_tokens)
        return await self._ask(request, token_ids, Pooling(request.pooling or self._config.pooling), meter)

    async def _classify(self, request: ClassifyRequest, meter: RequestMeter) -> Outcome:
        if not self._engine.info.labels:
            raise InvalidParameterError(
                f"the model {self._name!r} cannot classify: it has no sequence classification head",
                code="no_classes",
                param="model",
            )
        token_ids = await self._encode_prompt(request, request.prompt, add_special_tokens=True)
        return await self._ask(request, token_ids, Pooling("classify"), meter)

    async def _score(self, request: ScoreRequest, meter: RequestMeter) -> Outcome:
        labels = self._engine.info.labels
        if len(labels) > MAX_SCORED_LABELS:
            raise InvalidParameterError(
                f"the model {self._name!r} has {len(labels)} classes, a score needs one, or two of which the "
                "second is the fitting one; ask /classify",
                code="no_score",
                param="model",
            )
        if labels:
            return await self._ask(request, await self._encode_pair(request), Pooling("classify"), meter)
        words = (self._word_id("score_no_token"), self._word_id("score_yes_token"))
        frame = await self._get_frame()
        pair = (
            f"<Instruct>: {request.instruction or DEFAULT_INSTRUCTION}\n<Query>: {request.query}\n"
            f"<Document>: {request.document}"
        )
        # As in the Hugging Face stack: a chat template writes BOS itself.
        token_ids = await self._encode_prompt(
            request, frame.before + pair + frame.after, add_special_tokens=False
        )
        return await self._ask(request, token_ids, Pooling("logits", words), meter)

    async def _encode_prompt(
        self, request: PromptRequest, prompt: str | tuple[int, ...], *, add_special_tokens: bool
    ) -> list[int]:
        asked = GenerateRequest(request_id=request.request_id, model=request.model, prompt=prompt)
        token_ids = await self._encode(asked, add_special_tokens=add_special_tokens, param=request.field)
        limit = self._engine.info.max_model_len
        if len(token_ids) > limit:
            raise InvalidParameterError(
                f"{request.field} has {len(token_ids)} tokens, the model's context holds {limit}",
                code="context_length_exceeded",
                param=request.field,
            )
        return token_ids

    async def _encode_pair(self, request: ScoreRequest) -> list[int]:
        """Both texts by the tokenizer's own rule for pairs, which says what stands between them."""
        token_ids = await asyncio.to_thread(
            self._tokenizer.encode_pair, request.query, request.document, param=request.field
        )
        return await self._encode_prompt(request, tuple(token_ids), add_special_tokens=False)

    async def _encode_cut(self, request: EmbedRequest, *, limit: int) -> list[int]:
        """The first `limit` tokens; what the tokenizer adds at the end stays."""
        most = self._engine.info.max_model_len
        if limit != WHOLE_CONTEXT and not 1 <= limit <= most:
            raise InvalidParameterError(
                f"truncate_prompt_tokens is {limit}, it must be from 1 to the context of {most}, or -1",
                param="truncate_prompt_tokens",
            )
        limit = most if limit == WHOLE_CONTEXT else limit
        if isinstance(request.prompt, str):
            token_ids = await asyncio.to_thread(
                self._tokenizer.encode_cut,
                request.prompt,
                limit=limit,
                add_special_tokens=request.add_special_tokens,
                param=request.field,
            )
        else:
            token_ids = list(request.prompt[:limit])
        return await self._encode_prompt(request, tuple(token_ids), add_special_tokens=False)

    def _check_dimensions(self, dimensions: int | None) -> None:
        limit = self._engine.info.hidden_size
        if dimensions is not None and not 1 <= dimensions <= limit:
            raise InvalidParameterError(
                f"dimensions is {dimensions}, it must be from 1 to the model's hidden size of {limit}",
                param="dimensions",
            )

    def _word_id(self, option: str) -> int:
        """The one token of a word of the config."""
        word: str = getattr(self._config, option)
        token_ids = self._tokenizer.encode(word, add_special_tokens=False)
        if len(token_ids) != 1:
            raise InvalidParameterError(
                f"{option} is {word[:64]!r}, which is {len(token_ids)} tokens in the vocabulary of "
                f"{self._name!r}; it must be one token",
                code="no_score",
                param="model",
            )
        return token_ids[0]

    async def _get_frame(self) -> Frame:
        """Rendered once: the pairs differ in one place."""
        if self._frame is None:
            self._frame = await self._make_frame()
        return self._frame

    async def _make_frame(self) -> Frame:
        judge = JUDGE.format(yes=self._config.score_yes_token, no=self._config.score_no_token)
        text = await self._render(
            GenerateRequest(
                request_id=RequestId("frame"),
                model=self._name,
                messages=(Message(role="system", content=judge), Message(role="user", content=PLACE)),
                chat_template_kwargs=self._thoughts_off,
            )
        )
        before, place, after = text.partition(PLACE)
        if not place or PLACE in after:
            raise InvalidParameterError(
                f"the chat template of {self._name!r} does not show a user's message as it is, so that pairs "
                "cannot be judged",
                code="no_score",
                param="model",
            )
        return Frame(before=before, after=after)

    async def _ask(
        self, request: PromptRequest, token_ids: list[int], pooling: Pooling, meter: RequestMeter
    ) -> Outcome:
        deltas = await self._engine.generate(
            EngineRequest(
                request_id=request.request_id,
                prompt_token_ids=token_ids,
                params=SamplingParams(max_tokens=0),
                priority=request.priority,
                tenant_id=request.tenant_id,
                cache_salt=request.cache_salt,
                pooling=pooling,
                adapter=request.adapter,
            )
        )
        meter.is_accepted = True
        async with aclosing(deltas):
            async for delta in deltas:
                return _outcome(delta, num_prompt_tokens=len(token_ids))
        raise GenerateError("the engine's answer ended early")


async def _recorded(meter: RequestMeter, work: Awaitable[Outcome]) -> Outcome:
    """Do the work of one request and emit its record."""
    try:
        outcome = await behind_barrier(work)
    except PenstockError as error:
        meter.done(FinishReason.ERROR, usage=NOTHING, error_code=error.code)
        raise
    except BaseException:
        meter.done(FinishReason.CANCELLED, usage=NOTHING)
        raise
    meter.done(FinishReason.STOP, usage=outcome.usage, stats=outcome.stats)
    return outcome


def _outcome(delta: TokenDelta, *, num_prompt_tokens: int) -> Outcome:
    if delta.error is not None:
        raise info_to_error(delta.error)
    if delta.pooled is None:
        raise GenerateError("the engine's answer has no vector")
    stats = delta.stats
    usage = Usage(
        prompt_tokens=num_prompt_tokens,
        completion_tokens=0,
        cached_tokens=0 if stats is None else stats.num_cached_tokens,
    )
    return Outcome(values=delta.pooled, usage=usage, stats=stats)


def _finished(values: Sequence[float], *, dimensions: int | None, normalize: bool) -> tuple[float, ...]:
    """Cut, then scaled to length 1; a vector of zeros stays one."""
    kept = tuple(values[:dimensions])
    length = math.hypot(*kept)
    return tuple(value / length for value in kept) if normalize and length else kept


def _probabilities(logits: Sequence[float]) -> tuple[float, ...]:
    """Softmax over several logits; one logit is weighed against 0 (the sigmoid)."""
    if len(logits) == 1:
        return _probabilities((0.0, logits[0]))[1:]
    highest = max(logits)
    weights = [math.exp(logit - highest) for logit in logits]
    total = math.fsum(weights)
    return tuple(weight / total for weight in weights)
