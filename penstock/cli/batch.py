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
    InputRow,
    OutputRow,
    RowResponse,
    custom_id_of,
    done_ids,
    error_row,
    parse_row,
    read_rows,
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
    """

    def __init__(self, services: Services, *, source: Path, target: Path) -> None:
        if not source.is_file():
            raise StartupError(f"input {source} is not a file", param="input")
        if source.resolve() == target.resolve():
            raise StartupError(f"output {target} is the input too", param="output")
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

            async def work(row: InputRow) -> None:
                await self._row(row, done=done, output=output)
                progress.advance(task)

            await work_off(read_rows(self._source), work, num_workers=num_workers)

    async def _row(self, row: InputRow, *, done: set[str], output: BinaryIO) -> None:
        if custom_id_of(row) in done:
            self.counts.num_skipped += 1
            return
        result = await self._answer(row)
        output.write(msgspec.json.encode(result) + b"\n")
        output.flush()
        if result.error is None:
            self.counts.num_answered += 1
        else:
            self.counts.num_failed += 1

    async def _answer(self, row: InputRow) -> OutputRow:
        try:
            request = parse_row(row)
            return await with_patience(lambda: self._ask(request))
        except (CapacityError, EngineDeadError):
            raise  # not the row's fault: it stays open for the next run
        except PenstockError as error:
            return error_row(custom_id_of(row), error)

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


@contextlib.contextmanager
def _progress(console: Console) -> Iterator[Progress]:
    columns = (TextColumn("answering"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        yield progress
