"""Logs: one JSON object a line, written by a thread, never a prompt, an output or a key.

The event loop only puts records into a bounded queue; when a reader of the log is slow, lines are dropped and
counted, requests never wait. `RequestLog` is the sink that writes one telemetry line per request.
"""

import contextlib
import json
import logging
import queue
import sys
import threading
from datetime import UTC, datetime
from logging.handlers import QueueHandler
from typing import Final, TextIO

import msgspec

from penstock.core.ids import ModelName
from penstock.core.ports import EngineEvents, RequestRecord
from penstock.core.tokens import StepStats

_QUEUE_LINES: Final = 10_000
_STOP_S: Final = 2.0
_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "taskName"}


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON in ASCII, so that nothing in it can move a terminal.

    Fields given by `extra` are kept. Times are UTC (RFC 3339).
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end; DEL, which JSON leaves alone, is escaped too."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= {name: value for name, value in record.__dict__.items() if name not in _STANDARD}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str).replace("\x7f", "\\u007f")


class _DroppingHandler(QueueHandler):
    """Puts records into the queue, or counts them as dropped."""

    def __init__(self, records: "queue.Queue[logging.LogRecord | None]") -> None:
        super().__init__(records)
        self.num_dropped = 0

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """Format later, in the writing thread, with the exception's own text."""
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Never wait."""
        try:
            self.queue.put_nowait(record)
        except queue.Full:
            self.num_dropped += 1


class LogWriter:
    """The process's log from `start` to `stop`; `stop` writes what is left."""

    def __init__(self, *, level: int = logging.INFO, stream: TextIO | None = None) -> None:
        """Prepare to write to `stream` (standard error if None)."""
        self._records: queue.Queue[logging.LogRecord | None] = queue.Queue(_QUEUE_LINES)
        self._writer = logging.StreamHandler(stream or sys.stderr)
        self._writer.setFormatter(JsonFormatter())
        self._handler = _DroppingHandler(self._records)
        self._thread: threading.Thread | None = None
        self._level = level

    @property
    def num_dropped(self) -> int:
        """Lines that were not written because the queue was full."""
        return self._handler.num_dropped

    def start(self) -> None:
        """Take over the `penstock` loggers, and uvicorn's errors."""
        for name, level in (("penstock", self._level), ("uvicorn.error", logging.ERROR)):
            logger = logging.getLogger(name)
            logger.addHandler(self._handler)
            logger.setLevel(level)
            logger.propagate = False
        self._thread = threading.Thread(target=self._write, name="penstock-log", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        num_told, record = 0, self._records.get()
        while record is not None:
            self._writer.handle(record)
            # Told when the queue has been caught up with, and then once for all that were lost.
            if self.num_dropped > num_told and self._records.qsize() <= 1:
                self._writer.handle(_dropped(self.num_dropped - num_told))
                num_told = self.num_dropped
            record = self._records.get()

    def stop(self) -> None:
        """Let the loggers go and write what is left, for two seconds at most."""
        for name in ("penstock", "uvicorn.error"):
            logger = logging.getLogger(name)
            logger.removeHandler(self._handler)
            logger.setLevel(logging.NOTSET)
            logger.propagate = True
        if self._thread is not None:
            with contextlib.suppress(queue.Full):
                self._records.put(None, timeout=_STOP_S)
            self._thread.join(timeout=_STOP_S)
            self._thread = None


def _dropped(num_lines: int) -> logging.LogRecord:
    return logging.makeLogRecord(
        {
            "name": "penstock.observe",
            "levelno": logging.WARNING,
            "levelname": "WARNING",
            "msg": "log lines dropped, the reader of the log is too slow",
            "num_dropped": num_lines,
        }
    )


class RequestLog:
    """Implements `core.ports.EngineEvents`: one line per ended request, one per engine restart."""

    def __init__(self) -> None:
        self._logger = logging.getLogger("penstock.request")

    def on_step(self, model: ModelName, stats: StepStats) -> None:
        """Steps are not logged: state changes are, tokens are not."""

    def on_token_gap(self, model: ModelName, gap_s: float) -> None:
        """Tokens are not logged."""

    def on_request(self, record: RequestRecord) -> None:
        """Write the telemetry record."""
        self._logger.info("request ended", extra=msgspec.to_builtins(record))

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        """Write that an engine was started again."""
        self._logger.warning("engine restarted", extra={"model": model, "reason": reason})

    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None:
        """Grammars are counted, not logged."""


class Fanout:
    """Implements `core.ports.EngineEvents`: hands every event to several sinks, in order."""

    def __init__(self, *sinks: EngineEvents) -> None:
        self._sinks = sinks

    def on_step(self, model: ModelName, stats: StepStats) -> None:
        """After each engine step."""
        for sink in self._sinks:
            sink.on_step(model, stats)

    def on_token_gap(self, model: ModelName, gap_s: float) -> None:
        """Between two deltas of one answer."""
        for sink in self._sinks:
            sink.on_token_gap(model, gap_s)

    def on_request(self, record: RequestRecord) -> None:
        """Once per request, at its end."""
        for sink in self._sinks:
            sink.on_request(record)

    def on_engine_restart(self, model: ModelName, reason: str) -> None:
        """When an engine is started again."""
        for sink in self._sinks:
            sink.on_engine_restart(model, reason)

    def on_grammar(self, model: ModelName, outcome: str, compile_s: float) -> None:
        """When a request's grammar is compiled, found or refused."""
        for sink in self._sinks:
            sink.on_grammar(model, outcome, compile_s)
