"""The engines' own memory figures, without ever waiting long for an engine.

A busy engine answers between two steps, which may take longer than whoever asks for `/health` has time. So
a question goes on when its asker has left, and its answer is kept for the next one. Asked by `health`.
"""

import asyncio
from typing import Final

from penstock.core.errors import PenstockError
from penstock.core.ids import ModelName
from penstock.core.ports import Clock, EngineAdmin
from penstock.core.tokens import MemoryReport

WAIT_S: Final = 0.25
"""How long an asker waits for newer figures."""


class EngineReports:
    """The last report of each engine; at most one question to each is under way."""

    def __init__(self, *, clock: Clock) -> None:
        self._clock = clock
        self._kept: dict[ModelName, tuple[float, MemoryReport]] = {}
        self._asking: dict[ModelName, asyncio.Task[None]] = {}

    async def latest(self, model: ModelName, admin: EngineAdmin) -> tuple[float, MemoryReport] | None:
        """The newest report and its age in seconds; None if the engine has never answered yet.

        Args:
            model: what the report is kept under.
            admin: the engine to ask.
        """
        question = self._question(model, admin)
        await asyncio.wait({question}, timeout=WAIT_S)
        if question.done():
            question.result()
        if model not in self._kept:
            return None
        answered_s, report = self._kept[model]
        return max(0.0, self._clock.monotonic() - answered_s), report

    def _question(self, model: ModelName, admin: EngineAdmin) -> "asyncio.Task[None]":
        task = self._asking.get(model)
        if task is None or task.done():
            task = self._asking[model] = asyncio.create_task(self._ask(model, admin))
        return task

    async def _ask(self, model: ModelName, admin: EngineAdmin) -> None:
        try:
            report = await admin.memory()
        except PenstockError:
            return  # the engine is down: what it held is told with its age
        self._kept[model] = (self._clock.monotonic(), report)
