"""Reads answers to their end, one or several at a time; closing what it gave closes all of them."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from penstock.core.errors import GenerateError
from penstock.core.ports import ModelClient
from penstock.core.text import FinishReason, GenerateRequest, TextDelta, TextLogprob, Usage
from penstock.core.tools import CalledTool, add_calls

_MERGE_QUEUE: Final = 64
_Item = tuple[int, TextDelta] | Exception | None
"""A delta with its stream's index, a stream's failure, or a stream's end."""


@dataclass(slots=True, kw_only=True)
class Answer:
    """One complete answer (one `index`)."""

    pieces: list[str] = field(default_factory=list)
    thoughts: list[str] = field(default_factory=list)
    calls: list[CalledTool] = field(default_factory=list)
    logprobs: list[TextLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TextLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """The whole text."""
        return "".join(self.pieces)

    @property
    def reasoning(self) -> str:
        """All that was thought before."""
        return "".join(self.thoughts)


@dataclass(slots=True, kw_only=True)
class Collected:
    """All answers of one request."""

    answers: list[Answer]
    usages: list[Usage]


class Deltas:
    """An accepted answer. Closing it always reaches the engine, even if nobody has read from it.

    A plain asynchronous generator that was never started forgets its clean-up when it is closed.
    """

    def __init__(self, stream: AsyncGenerator[TextDelta]) -> None:
        self._stream = stream
        self._is_started = False

    def __aiter__(self) -> AsyncIterator[TextDelta]:
        return self

    def __anext__(self) -> Awaitable[TextDelta]:
        """The next delta."""
        self._is_started = True
        return self._stream.__anext__()

    async def aclose(self) -> None:
        """Cancel what is not finished."""
        if not self._is_started:
            first = asyncio.ensure_future(anext(self))
            await asyncio.sleep(0)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
        await self._stream.aclose()


async def close_all(streams: Sequence[Deltas]) -> None:
    """Close several; closing twice does nothing."""
    for stream in streams:
        await stream.aclose()


async def submit(client: ModelClient, requests: list[GenerateRequest]) -> list[Deltas]:
    """Submit several requests at once; if one is refused, none is left running.

    Raises:
        PenstockError: the first refusal.
    """
    if len(requests) == 1:
        return [Deltas(await client.generate(requests[0]))]
    tasks = [asyncio.create_task(client.generate(request)) for request in requests]
    try:
        return [Deltas(stream) for stream in await asyncio.gather(*tasks)]
    except BaseException:
        await _undo(tasks)
        raise


async def _undo(tasks: "list[asyncio.Task[AsyncGenerator[TextDelta]]]") -> None:
    for task in tasks:
        task.cancel()
    for accepted in await asyncio.gather(*tasks, return_exceptions=True):
        if not isinstance(accepted, BaseException):
            await Deltas(accepted).aclose()


async def merge(streams: Sequence[Deltas]) -> AsyncGenerator[tuple[int, TextDelta]]:
    """Deltas of several streams as they come, each with its stream's index; closes all at the end.

    Raises:
        PenstockError: one stream failed; the others have been closed.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for delta in only:
                yield 0, delta
        return
    queue: asyncio.Queue[_Item] = asyncio.Queue(_MERGE_QUEUE)
    tasks = [asyncio.create_task(_feed(queue, which, each)) for which, each in enumerate(streams)]
    open_streams = len(tasks)
    try:
        while open_streams:
            item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                open_streams -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await close_all(streams)


async def _feed(queue: "asyncio.Queue[_Item]", which: int, stream: Deltas) -> None:
    try:
        async for delta in stream:
            await queue.put((which, delta))
    except Exception as error:  # noqa: BLE001  carried to the reader, which raises it
        await queue.put(error)
    else:
        await queue.put(None)


async def collect(streams: Sequence[Deltas], *, n: int) -> Collected:
    """Read all streams to their end.

    Args:
        streams: one per prompt, each with `n` answers.
        n: answers per prompt; the answer `index` of stream `which` is `answers[which * n + index]`.

    Raises:
        PenstockError: a stream failed, or broke the port's contract.
    """
    answers = [Answer() for _ in range(n * len(streams))]
    usages: list[Usage] = []
    async with aclosing(merge(streams)) as deltas:
        async for which, delta in deltas:
            _add(answers[which * n + delta.index], delta)
            if delta.usage is not None:
                usages.append(delta.usage)
    if any(answer.finish_reason is None for answer in answers):
        raise GenerateError("a stream ended without a finish reason")
    return Collected(answers=answers, usages=usages)


def _add(answer: Answer, delta: TextDelta) -> None:
    if delta.text:
        answer.pieces.append(delta.text)
    if delta.reasoning:
        answer.thoughts.append(delta.reasoning)
    if delta.tool_calls:
        add_calls(answer.calls, delta.tool_calls)
    if delta.logprobs:
        answer.logprobs.extend(delta.logprobs)
    if delta.prompt_logprobs is not None:
        answer.prompt_logprobs = delta.prompt_logprobs
    if delta.finish_reason is not None:
        answer.finish_reason = delta.finish_reason
        answer.stop_reason = delta.stop_reason
