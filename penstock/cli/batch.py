"""`penstock run`: an offline batch, JSONL in and JSONL out, through the same routes and checks as over HTTP.

Rows are written as they finish; a row that cannot be answered becomes an error row. What the output holds
already is skipped, so a second run goes on where the first stopped.
"""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from penstock.cli.batch_rows import (
    URLS,
    BatchRequest,
    NamedRow,
    OutputRow,
    RowResponse,
    done_ids,
    error_row,
    named_rows,
    parse_row,
    read_rows,
    refuse_duplicate,
)
from penstock.cli.feed import with_patience
from penstock.cli.workers import work_off
from penstock.core.errors import (
    CapacityError,
    EngineDeadError,
    InvalidParameterError,
    PenstockError,
    StartupError,
)
from penstock.core.ids import DEFAULT_TENANT, RequestId
from penstock.server.app import PUBLIC_ROUTES
from penstock.server.replies import Reply
from penstock.server.routes import Route
from penstock.server.services import Call, Services
from penstock.server.validation import validate

ROUTES: Final[dict[str, Route]] = {route.path: route for route in PUBLIC_ROUTES if route.path in URLS}


@dataclass(slots=True, kw_only=True)
class BatchCounts:
    """What became of the rows."""

    num_answered: int = 0
    num_failed: int = 0
    num_skipped: int = 0


class Batch:
    """One run over an input file.

    Args:
        services: what the routes need; its catalog holds the model.
        source: JSONL to read.
        target: JSONL to append to; made if it is not there.

    Raises:
        StartupError: one cannot be read or written, or they are the same.
    """

    def __init__(self, services: Services, *, source: Path, target: Path) -> None:
        _check_source(source)
        if source.resolve() == target.resolve():
            raise StartupError(f"output {target} is the input too", param="output")
        _check_target(target)
        self._services = services
        self._source = source
        self._target = target
        self.counts = BatchCounts()

    async def run(self, console: Console, *, num_workers: int) -> None:
        """Answer every row that the output lacks.

        Raises:
            CapacityError, EngineDeadError: the engine failed as a whole; run again to go on.
        """
        done = done_ids(self._target)
        num_rows = sum(1 for _ in read_rows(self._source))
        with self._target.open("ab") as output, _progress(console) as progress:
            task = progress.add_task("rows", total=num_rows)

            async def work(named: NamedRow) -> None:
                await self._row(named, done=done, output=output)
                progress.advance(task)

            await work_off(named_rows(self._source), work, num_workers=num_workers)

    async def _row(self, named: NamedRow, *, done: set[str], output: BinaryIO) -> None:
        if named.custom_id in done:
            self.counts.num_skipped += 1
            return
        result = await self._answer(named)
        output.write(msgspec.json.encode(result) + b"\n")
        output.flush()
        if result.error is None:
            self.counts.num_answered += 1
        else:
            self.counts.num_failed += 1

    async def _answer(self, named: NamedRow) -> OutputRow:
        try:
            refuse_duplicate(named)
            request = parse_row(named.row)
            return await with_patience(lambda: self._ask(request))
        except (CapacityError, EngineDeadError):
            raise  # not the row's fault: it stays open for the next run
        except PenstockError as error:
            return error_row(named.custom_id, error)

    async def _ask(self, request: BatchRequest) -> OutputRow:
        """Call the endpoint's own function, after the endpoint's own checks."""
        route = ROUTES[request.url]
        assert route.body is not None
        if request.body.get("stream"):
            raise InvalidParameterError("stream is true, a batch answers whole", param="stream")
        body = validate(
            route.from_json({"model": self._services.catalog.names[0], **request.body}), model=route.body
        )
        request_id = RequestId(secrets.token_hex(16))
        call = Call(
            services=self._services,
            request_id=request_id,
            tenant_id=DEFAULT_TENANT,
            arrival_s=self._services.clock.monotonic(),
            path_params={},
            body=body,
        )
        reply = await route.serve(call)
        assert isinstance(reply, Reply)
        response = RowResponse(status_code=reply.status, request_id=request_id, body=msgspec.Raw(reply.body))
        return OutputRow(custom_id=request.custom_id, response=response)


def _check_source(path: Path) -> None:
    try:
        if not path.is_file():
            raise StartupError(f"input {path} is not a file", param="input")
        path.open("rb").close()
    except OSError as error:
        raise StartupError(f"input {path} cannot be read: {error.strerror}", param="input") from None


def _check_target(path: Path) -> None:
    """Open it as the run will, and leave no file where there was none."""
    try:
        is_new = not path.exists()
        if not is_new and not path.is_file():
            raise StartupError(f"output {path} is not a file", param="output")
        path.open("ab" if is_new else "rb+").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise StartupError(f"output {path} cannot be written: {error.strerror}", param="output") from None


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
