"""The text service: a `ModelClient` over an `EngineClient`, once, for every dialect and the offline API.

Checks a request, renders and tokenizes it, submits it to the engine and hands back the stream of its text.
What it refuses it refuses before the engine hears of it. Not the wire (`server`), not limits per tenant
(`gateway`).
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from functools import cached_property
from typing import Final

from msgspec.structs import replace

from penstock.core.errors import InvalidParameterError, PenstockError
from penstock.core.grammar import GRAMMAR_PARAM, validate_grammar
from penstock.core.ids import ModelName
from penstock.core.params import SamplingParams, validate_sampling
from penstock.core.pooled import (
    Classification,
    ClassifyRequest,
    Embedding,
    EmbedRequest,
    Score,
    ScoreRequest,
)
from penstock.core.ports import Clock, EngineClient, EngineEvents
from penstock.core.text import FinishReason, GenerateRequest, ModelCard, TextDelta, Usage
from penstock.core.tokens import EngineRequest, TokenDelta
from penstock.core.tools import validate_tools
from penstock.text.answer import Answer
from penstock.text.barrier import behind_barrier
from penstock.text.best_of import BestAnswers, widened
from penstock.text.chat_template import ChatTemplate
from penstock.text.pooler import Pooler
from penstock.text.pooling_config import PoolingConfig
from penstock.text.prompt_logprobs import PromptReader
from penstock.text.reading import Reading
from penstock.text.stop_strings import StopAutomaton
from penstock.text.stream import RequestMeter, TextStream
from penstock.text.tokenizer import Tokenizer
from penstock.text.word_rules import WordRules

LONG_TEXT_CHARS: Final = 4096
"""Longer texts are tokenized in a thread: this many take about 1 ms."""

_NOTHING: Final = Usage(prompt_tokens=0, completion_tokens=0)


class TextService:
    """Answers `GenerateRequest`s with the model behind `engine`.

    One request's life: check > render > tokenize > check against the context > engine > `TextStream`. One
    `RequestRecord` is emitted for every request that enters `generate`, however it ends.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        template: ChatTemplate | None,
        *,
        name: ModelName,
        events: EngineEvents,
        clock: Clock,
        root: str = "",
        created_unix_s: int | None = None,
        default_sampling: SamplingParams | None = None,
        reading: Reading | None = None,
        pooling: PoolingConfig | None = None,
    ) -> None:
        """Join the parts; starts nothing.

        Args:
            engine: where tokens come from; its `info` must be valid when requests come.
            tokenizer: the model's.
            template: the model's chat template, None if it has none.
            name: the model's name in records and events.
            events: told of gaps between tokens and of ended requests.
            clock: for times.
            root: hub id or folder name of the weights, for the card.
            created_unix_s: for the card; now if None.
            default_sampling: for the card; neutral if None.
            reading: how answers are read for thoughts and tool calls; None: neither is told from the rest.
            pooling: how prompts become vectors and scores; None: the defaults.
        """
        self._engine = engine
        self._tokenizer = tokenizer
        self._template = template
        self._name = name
        self._events = events
        self._clock = clock
        self._root = root
        self._created_unix_s = int(clock.wall()) if created_unix_s is None else created_unix_s
        self._default_sampling = default_sampling or SamplingParams()
        self._reading = reading or Reading(tools=None, reasoning=None, tokenizer=tokenizer)
        self._pooler = Pooler(
            engine,
            tokenizer,
            encode=self._token_ids,
            render=self._render,
            name=name,
            events=events,
            clock=clock,
            config=pooling or PoolingConfig(),
            thoughts_off={} if template is None else template.thoughts_off,
        )

    @cached_property
    def _words(self) -> WordRules:
        """Made at the first request: this service is put together while the engine still loads."""
        return WordRules(self._tokenizer, vocab_size=self._engine.info.vocab_size)

    async def start(self) -> None:
        """Start what rendering needs and wait until it is ready; without it the first conversation waits.

        Raises:
            CheckpointError: the chat template does not compile.
        """
        if self._template is not None:
            await self._template.wait_ready()

    async def close(self) -> None:
        """End the rendering processes; the engine is not ours to close."""
        if self._template is not None:
            await asyncio.to_thread(self._template.close)

    def end(self) -> None:
        """As `close`, from any thread; waits for the end of the processes."""
        if self._template is not None:
            self._template.close()

    @property
    def card(self) -> ModelCard:
        """Name and limits."""
        return ModelCard(
            name=self._name,
            created_unix_s=self._created_unix_s,
            max_model_len=self._engine.info.max_model_len,
            root=self._root,
            default_sampling=self._default_sampling,
        )

    @property
    def not_ready_reason(self) -> str | None:
        """The engine's."""
        return self._engine.not_ready_reason

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        """Answer `request`; returns once the engine has accepted it.

        Raises:
            InvalidParameterError: a field is wrong; the message names field, value and limit.
            CapacityError: the engine has no room now.
            EngineError: the fault is ours.
        """
        meter = RequestMeter(request, model=self._name, events=self._events, clock=self._clock)
        try:
            stream = await behind_barrier(
                self._accept(replace(request, params=widened(request.params)), meter=meter)
            )
        except PenstockError as error:
            meter.done(FinishReason.ERROR, usage=_NOTHING, error_code=error.code)
            raise
        except BaseException:
            meter.done(FinishReason.CANCELLED, usage=_NOTHING)
            raise
        is_widened = widened(request.params) is not request.params
        return BestAnswers(stream, request=request) if is_widened else stream

    async def embed(self, request: EmbedRequest) -> Embedding:
        """The vector of a text.

        Raises:
            InvalidParameterError: a field is wrong; the message names field, value and limit.
            CapacityError: the engine has no room now.
            EngineError: the fault is ours.
        """
        return await self._pooler.embed(request)

    async def score(self, request: ScoreRequest) -> Score:
        """How well a document fits a query; raises as `embed`."""
        return await self._pooler.score(request)

    async def classify(self, request: ClassifyRequest) -> Classification:
        """The classes of a text; raises as `embed`."""
        return await self._pooler.classify(request)

    async def tokenize(self, request: GenerateRequest, *, add_special_tokens: bool) -> list[int]:
        """Token ids of the prompt or of the rendered conversation.

        Raises:
            InvalidParameterError: the request has not exactly one of prompt and messages, or that is wrong.
        """
        return await behind_barrier(self._token_ids(request, add_special_tokens=add_special_tokens))

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens included.

        Raises:
            InvalidParameterError: an id is not in the vocabulary, or there are more than the context holds.
        """
        self._check_length(len(token_ids), param="tokens", is_exact=True)
        self._check_token_ids(token_ids, param="tokens")
        if len(token_ids) <= LONG_TEXT_CHARS:
            return self._tokenizer.decode(list(token_ids))
        return await asyncio.to_thread(self._tokenizer.decode, list(token_ids))

    async def _accept(self, request: GenerateRequest, *, meter: RequestMeter) -> TextStream:
        _check_request(request, vocab_size=self._engine.info.vocab_size)
        self._reading.check(request)
        # As in the Hugging Face stack: a chat template writes BOS itself.
        token_ids = await self._token_ids(request, add_special_tokens=request.messages is None)
        params = self._resolve_params(request, num_prompt_tokens=len(token_ids))
        # Made first: after the engine has accepted nothing may fail before the stream owns its tokens.
        echo = self._echo_text(request, token_ids=token_ids) if request.echo else None
        answers = self._make_answers(request, token_ids=token_ids, num_chars_before=len(echo or ""))
        asks_of_prompt = params.prompt_logprobs is not None
        tokens = (
            _no_tokens(request)
            if params.max_tokens == 0 and not asks_of_prompt
            else await self._submit(request, await self._engine_request(request, token_ids, params=params))
        )
        return TextStream(
            tokens,
            answers=answers,
            num_prompt_tokens=len(token_ids),
            meter=meter,
            first=() if asks_of_prompt or echo is None else _echo(request, text=echo),
            prompt=PromptReader(self._tokenizer, request, token_ids=token_ids, echo=echo),
        )

    async def _submit(self, request: GenerateRequest, submitted: EngineRequest) -> AsyncGenerator[TokenDelta]:
        """Ask the engine; that a grammar cannot be enforced is told of the field that asked for it."""
        try:
            return await self._engine.generate(submitted)
        except InvalidParameterError as error:
            if submitted.grammar is None or error.param != GRAMMAR_PARAM:
                raise
            param = "tools" if request.grammar is None else request.grammar_param
            message = error.message.replace(GRAMMAR_PARAM, param, 1)
            raise InvalidParameterError(message, code=error.code, param=param) from None

    async def _token_ids(
        self, request: GenerateRequest, *, add_special_tokens: bool, param: str = "prompt"
    ) -> list[int]:
        """Of prompt or conversation; `param` is what the client calls the prompt."""
        prompt = request.prompt
        if (prompt is None) == (request.messages is None):
            raise InvalidParameterError("exactly one of prompt and messages must be set", param="prompt")
        if prompt is None:
            text = await self._render(request)
            return await self._encode(text, add_special_tokens=add_special_tokens, param="messages")
        if not prompt:
            raise InvalidParameterError(f"{param} is empty, it must hold at least one token", param=param)
        if isinstance(prompt, str):
            return await self._encode(prompt, add_special_tokens=add_special_tokens, param=param)
        self._check_length(len(prompt), param=param, is_exact=True)
        self._check_token_ids(prompt, param=param)
        return list(prompt)

    async def _render(self, request: GenerateRequest) -> str:
        if self._template is None:
            raise InvalidParameterError(
                f"messages cannot be used with the model {self._name!r}, it has no chat template",
                code="no_chat_template",
                param="messages",
            )
        return await self._template.render(request)

    async def _encode(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) <= LONG_TEXT_CHARS:
            return self._encode_now(text, add_special_tokens=add_special_tokens, param=param)
        return await asyncio.to_thread(
            self._encode_now, text, add_special_tokens=add_special_tokens, param=param
        )

    def _encode_now(self, text: str, *, add_special_tokens: bool, param: str) -> list[int]:
        if len(text) > self._engine.info.max_model_len:
            # A bound from below, so that no list of a million ids is made to be refused.
            self._check_length(self._tokenizer.num_tokens_min(text), param=param, is_exact=False)
        token_ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, param=param)
        if not token_ids:
            raise InvalidParameterError(f"{param} is empty, it must hold at least one token", param=param)
        self._check_token_ids(token_ids, param=param)
        return token_ids

    def _check_length(self, num_tokens: int, *, param: str, is_exact: bool) -> None:
        limit = self._engine.info.max_model_len
        if num_tokens > limit:
            words = "" if is_exact else "at least "
            raise InvalidParameterError(
                f"{param} has {words}{num_tokens} tokens, the model's context holds {limit}",
                code="context_length_exceeded",
                param=param,
            )

    def _check_token_ids(self, token_ids: Sequence[int], *, param: str) -> None:
        limit = self._engine.info.vocab_size
        if token_ids and (min(token_ids) < 0 or max(token_ids) >= limit):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < limit)
            raise InvalidParameterError(
                f"{param} holds the token id {wrong}, it must be from 0 to {limit - 1}", param=param
            )

    def _resolve_params(self, request: GenerateRequest, *, num_prompt_tokens: int) -> SamplingParams:
        """Replace an open `max_tokens` by what the context holds, and check that prompt and answer fit."""
        param = "prompt" if request.messages is None else "messages"
        self._check_length(num_prompt_tokens, param=param, is_exact=True)
        limit = self._engine.info.max_model_len
        room = limit - num_prompt_tokens
        wanted = request.params.max_tokens
        least = 1 if wanted is None else wanted
        if least > room:
            raise InvalidParameterError(
                f"{param} has {num_prompt_tokens} tokens and max_tokens is {least}, together "
                f"{num_prompt_tokens + least}; the model's context holds {limit}",
                code="context_length_exceeded",
                param=param,
            )
        return replace(
            request.params,
            max_tokens=room if wanted is None else wanted,
            prompt_logprobs=_num_prompt_logprobs(request),
        )

    async def _engine_request(
        self, request: GenerateRequest, token_ids: list[int], *, params: SamplingParams
    ) -> EngineRequest:
        vocab_size = self._engine.info.vocab_size
        return EngineRequest(
            request_id=request.request_id,
            prompt_token_ids=token_ids,
            params=params,
            eos_token_ids=tuple(i for i in self._tokenizer.eos_token_ids if i < vocab_size),
            priority=request.priority,
            tenant_id=request.tenant_id,
            cache_salt=request.cache_salt,
            banned_sequences=self._words.banned_sequences(params),
            # the first time it reads the whole vocabulary
            dry_breaker_ids=await asyncio.to_thread(self._words.dry_breaker_ids, params)
            if params.dry_multiplier
            else (),
            grammar=self._reading.grammar(request, token_ids=token_ids),
            adapter=request.adapter,
        )

    def _make_answers(
        self, request: GenerateRequest, *, token_ids: list[int], num_chars_before: int
    ) -> list[Answer]:
        params = request.params
        automaton = StopAutomaton(params.stop) if params.stop else None
        has_no_text = all(map(self._tokenizer.is_special, reversed(token_ids)))
        return [
            Answer(
                self._tokenizer,
                request_id=request.request_id,
                index=index,
                params=params,
                automaton=automaton,
                at_start=params.skip_special_tokens and has_no_text,
                num_chars_before=num_chars_before,
                reader=reader,
                kept_ids=frozenset() if reader is None else self._reading.kept_ids,
            )
            for index, reader in enumerate(self._reading.readers(request, token_ids=token_ids))
        ]

    def _echo_text(self, request: GenerateRequest, *, token_ids: list[int]) -> str:
        prompt = request.prompt
        if isinstance(prompt, str):
            return prompt
        return self._tokenizer.decode(token_ids, skip_special_tokens=request.params.skip_special_tokens)


def _check_request(request: GenerateRequest, *, vocab_size: int) -> None:
    """What can be refused before any text is touched."""
    validate_sampling(request.params, vocab_size=vocab_size, allow_zero_max_tokens=request.echo)
    if request.grammar is not None:
        validate_grammar(request.grammar, param=request.grammar_param)
    validate_tools(request)
    if not request.echo:
        return
    if request.messages is not None:
        raise InvalidParameterError("echo is True, it must be False with messages", param="echo")


def _num_prompt_logprobs(request: GenerateRequest) -> int | None:
    """What the engine is asked for: `logprobs` of an echoed prompt are logprobs of the prompt too."""
    wanted = [request.params.prompt_logprobs, request.params.logprobs if request.echo else None]
    return max((each for each in wanted if each is not None), default=None)


def _echo(request: GenerateRequest, *, text: str) -> tuple[TextDelta, ...]:
    return tuple(
        TextDelta(request_id=request.request_id, index=index, text=text) for index in range(request.params.n)
    )


async def _no_tokens(request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
    """The engine's part of a request that asks for no new token (`echo` with `max_tokens=0`)."""
    for index in range(request.params.n):
        yield TokenDelta(request.request_id, index, finish_reason=FinishReason.LENGTH)
