"""The stream of one request: reads the engine's tokens, yields text, and ends exactly once.

`TextStream` is an async generator written as a class, for two reasons: closing a native generator that was
never advanced runs none of its code, and a client may leave before the first token; and one layer less is
paid per token. Made by `service` after the engine has accepted the request.
"""

import logging
from collections import deque
from collections.abc import AsyncGenerator
from typing import Final

from msgspec.structs import replace

from penstock.core.closing_stream import ClosingStream
from penstock.core.error_info import info_to_error
from penstock.core.errors import GenerateError, PenstockError
from penstock.core.ids import ModelName
from penstock.core.pooled import PromptRequest
from penstock.core.ports import Clock, EngineEvents, RequestRecord
from penstock.core.text import FinishReason, GenerateRequest, TextDelta, Usage
from penstock.core.tokens import RequestStats, TokenDelta
from penstock.text.answer import Answer
from penstock.text.prompt_logprobs import PromptReader

logger: Final = logging.getLogger(__name__)

_NO_STATS: Final = RequestStats(0, 0, 0, 0.0, 0, 0.0, 0)


class RequestMeter:
    """Times and counts of one request; emits its telemetry record once."""

    __slots__ = (
        "_clock",
        "_events",
        "_first_s",
        "_gap_start_s",
        "_is_done",
        "_model",
        "_num_tokens",
        "_request",
        "_start_s",
        "_stats_s",
        "_stats_so_far",
        "is_accepted",
        "num_tool_calls",
        "ttft_s",
    )

    def __init__(
        self,
        request: GenerateRequest | PromptRequest,
        *,
        model: ModelName,
        events: EngineEvents,
        clock: Clock,
    ) -> None:
        self._request = request
        self._model = model
        self._events = events
        self._clock = clock
        self._start_s = request.arrival_s or clock.monotonic()
        self._first_s: dict[int, float] = {}
        self._gap_start_s: dict[int, float] = {}
        self._num_tokens: dict[int, int] = {}
        self._is_done = False
        self.num_tool_calls = 0
        """Counted by the stream as they begin."""
        self.is_accepted = False
        """Set by the stream: there is one only after the engine has accepted the request."""
        self.ttft_s: float | None = None
        self._stats_so_far = _NO_STATS
        self._stats_s: float | None = None
        """When they came."""

    def on_stats(self, stats: RequestStats) -> None:
        """What holds if the request ends before the engine's last word, by a stop string or its client."""
        self._stats_so_far = stats
        self._stats_s = self._clock.monotonic()

    def on_tokens(self, index: int, *, num_tokens: int) -> None:
        """Tokens of answer `index` arrived; it has `num_tokens` now."""
        now_s = self._clock.monotonic()
        last_s = self._gap_start_s.get(index)
        self._gap_start_s[index] = now_s
        self._num_tokens[index] = num_tokens
        if last_s is not None:
            self._events.on_token_gap(self._model, now_s - last_s)
            return
        self._first_s[index] = now_s
        if self.ttft_s is None:
            self.ttft_s = now_s - self._start_s

    def _tpot_s(self) -> float | None:
        """Each answer has its own tokens and its own time; tokens of different answers are not added."""
        each = [
            (self._gap_start_s[index] - self._first_s[index]) / (num_tokens - 1)
            for index, num_tokens in self._num_tokens.items()
            if num_tokens > 1
        ]
        return sum(each) / len(each) if each else None

    def done(
        self,
        reason: FinishReason,
        *,
        usage: Usage,
        stats: RequestStats | None = None,
        error_code: str | None = None,
    ) -> None:
        """Emit the record, unless that has happened."""
        if self._is_done:
            return
        self._is_done = True
        now_s = self._clock.monotonic()
        e2e_s = max(now_s - self._start_s, 0.0)
        known = stats or self._stats_so_far
        since_s = now_s - self._stats_s if stats is None and self._stats_s is not None else 0.0
        self._events.on_request(
            RequestRecord(
                request_id=self._request.client_request_id or self._request.request_id,
                model=self._model,
                tenant_id=self._request.tenant_id,
                prompt_tokens=usage.prompt_tokens,
                cached_tokens=usage.cached_tokens,
                completion_tokens=usage.completion_tokens,
                finish_reason=reason,
                error_code=error_code,
                ttft_s=self.ttft_s,
                tpot_s=self._tpot_s(),
                e2e_s=e2e_s,
                tokens_per_s=usage.completion_tokens / e2e_s if e2e_s else 0.0,
                queue_wait_s=known.queue_wait_s,
                batch_size=known.batch_size,
                kv_usage=known.kv_usage,
                num_preemptions=known.num_preemptions,
                inference_s=known.inference_s + since_s,
                num_tool_calls=self.num_tool_calls,
                adapter=self._request.adapter,
                is_accepted=self.is_accepted,
            )
        )


class TextStream(ClosingStream[TextDelta]):
    """Async generator of one request's `TextDelta`s; see `core.ports.ModelClient`.

    ```
    running --last answer ended--> ended (finished)
    running --engine or text stage raised--> ended (failed, the error is raised once)
    running --aclose, cancellation--> ended (cancelled)
    ```
    Every way into `ended` closes the engine's stream and emits one record.
    """

    def __init__(
        self,
        tokens: AsyncGenerator[TokenDelta],
        *,
        answers: list[Answer],
        num_prompt_tokens: int,
        meter: RequestMeter,
        first: tuple[TextDelta, ...] = (),
        prompt: PromptReader | None = None,
    ) -> None:
        """Take over `tokens`; `first` goes out before anything else (the echo of the prompt).

        `prompt` makes the first deltas of what the engine tells about the prompt, if that is asked for.
        """
        self._tokens = tokens
        self._answers = answers
        self._num_open = len(answers)
        self._num_prompt_tokens = num_prompt_tokens
        self._num_cached_tokens = 0
        self._meter = meter
        meter.is_accepted = True
        self._ready = deque(first)
        self._prompt = prompt
        self._ended = False

    async def __anext__(self) -> TextDelta:
        """The next delta.

        Raises:
            StopAsyncIteration: after the last one.
            EngineError: the request failed; it has ended.
        """
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            try:
                await self._advance()
            except PenstockError as error:
                await self._end(FinishReason.ERROR, error_code=error.code)
                raise
            except Exception:
                await self._end(FinishReason.ERROR, error_code=GenerateError.default_code)
                logger.exception("the text stage of a request failed")
                raise GenerateError("this request failed while its text was made") from None
            except BaseException:
                await self._end(FinishReason.CANCELLED)
                raise
        return self._ready.popleft()

    async def aclose(self) -> None:
        """End the request; its engine work is cancelled. Safe at any time, any number of times."""
        self._ready.clear()
        await self._end(FinishReason.CANCELLED)

    async def _advance(self) -> None:
        """Take one `TokenDelta` from the engine."""
        try:
            delta = await self._tokens.__anext__()
        except StopAsyncIteration:
            raise GenerateError("the engine's answer ended early") from None
        if delta.error is not None:
            raise info_to_error(delta.error)
        answer = self._answers[delta.index]
        if answer.finish_reason is not None:
            return
        if delta.prompt_logprobs is not None and self._prompt is not None:
            self._ready.extend(self._prompt.deltas(delta.prompt_logprobs))
        self._num_cached_tokens = max(self._num_cached_tokens, delta.num_cached_tokens)
        if delta.stats_so_far is not None:
            self._meter.on_stats(delta.stats_so_far)
        text = answer.push(delta)
        if delta.token_ids:
            self._meter.on_tokens(delta.index, num_tokens=answer.num_tokens)
        if text is None:
            return
        self._meter.num_tool_calls += sum(bool(call.id) for call in text.tool_calls)
        if text.finish_reason is not None:
            text = await self._close_answer(text, stats=delta.stats)
        self._ready.append(text)

    async def _close_answer(self, delta: TextDelta, *, stats: RequestStats | None) -> TextDelta:
        """Count an ended answer; the last one carries the usage and ends the stream."""
        self._num_open -= 1
        if self._num_open:
            return delta
        assert delta.finish_reason is not None
        if stats is not None:
            self._num_cached_tokens = max(self._num_cached_tokens, stats.num_cached_tokens)
        usage = self._usage()
        await self._end(delta.finish_reason, stats=stats)
        return replace(delta, usage=usage)

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(answer.num_tokens for answer in self._answers),
            cached_tokens=self._num_cached_tokens,
        )

    async def _end(
        self, reason: FinishReason, *, stats: RequestStats | None = None, error_code: str | None = None
    ) -> None:
        """Record the end and close the engine's stream; the second time nothing happens."""
        if self._ended:
            return
        self._ended = True
        try:
            self._meter.done(reason, usage=self._usage(), stats=stats, error_code=error_code)
        finally:
            await self._tokens.aclose()
