"""`best_of`: more answers are made than are given; the likeliest ones are given.

Wraps the stream of the larger request; nothing can be told before all answers have ended. Made by `service`.
"""

from collections import deque
from collections.abc import AsyncGenerator

from msgspec.structs import replace

from penstock.core.closing_stream import ClosingStream
from penstock.core.params import SamplingParams
from penstock.core.text import GenerateRequest, TextDelta, TextLogprob


def widened(params: SamplingParams) -> SamplingParams:
    """What the engine is asked for: all the answers, and the logprobs that rank them."""
    if params.best_of is None or params.best_of <= params.n or params.use_beam_search:
        return params
    return replace(params, n=params.best_of, logprobs=params.logprobs or 0)


class BestAnswers(ClosingStream[TextDelta]):
    """The best `n` of the answers in a stream, renumbered from 0, best first.

    Ranked by the mean log-probability of their tokens, as OpenAI's completions are. All answers are billed.
    """

    def __init__(self, stream: AsyncGenerator[TextDelta], *, request: GenerateRequest) -> None:
        """Take over `stream`, whose request was `widened`; `request` is what the client asked for."""
        self._stream = stream
        self._params = request.params
        self._ready: deque[TextDelta] | None = None

    async def __anext__(self) -> TextDelta:
        """The next delta; the first one comes when every answer has ended.

        Raises:
            StopAsyncIteration: after the last one, and after an error.
            EngineError: the request failed.
        """
        if self._ready is None:
            self._ready = deque()  # an error ends it
            self._ready = deque(self._best([delta async for delta in self._stream]))
        if not self._ready:
            raise StopAsyncIteration
        return self._ready.popleft()

    async def aclose(self) -> None:
        """End the request; safe at any time."""
        self._ready = deque()
        await self._stream.aclose()

    def _best(self, deltas: list[TextDelta]) -> list[TextDelta]:
        answers: dict[int, list[TextDelta]] = {}
        for delta in deltas:
            answers.setdefault(delta.index, []).append(delta)
        ranked = sorted(answers, key=lambda index: (-_mean_logprob(answers[index]), index))
        usage = next(delta.usage for delta in reversed(deltas) if delta.usage is not None)
        best = [
            replace(delta, index=rank, usage=None, logprobs=self._told(delta))
            for rank, index in enumerate(ranked[: self._params.n])
            for delta in answers[index]
        ]
        return [*best[:-1], replace(best[-1], usage=usage)]

    def _told(self, delta: TextDelta) -> tuple[TextLogprob, ...] | None:
        return None if self._params.logprobs is None else delta.logprobs


def _mean_logprob(answer: list[TextDelta]) -> float:
    """Of the answer's own tokens; an empty answer is as good as certain."""
    logprobs = [
        entry.logprob
        for delta in answer
        if delta.logprobs and delta.logprobs[0].logprob is not None  # not the echoed prompt
        for entry in delta.logprobs
        if entry.logprob is not None
    ]
    return sum(logprobs) / len(logprobs) if logprobs else 0.0
