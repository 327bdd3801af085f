"""`penstock run`: one output row per input row, bad rows become error rows, a second run goes on."""

import asyncio
import io
import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from penstock.cli import commands
from penstock.cli.batch import Batch, BatchCounts
from penstock.cli.batch_rows import MAX_ROW_BYTES, done_ids, read_rows
from penstock.cli.local_options import LocalOptions
from penstock.cli.main import main
from penstock.core.errors import EngineDeadError, GenerateError, NotReadyError, QueueFullError, StartupError
from penstock.core.text import GenerateRequest, TextDelta
from penstock.gateway.catalog import Catalog
from penstock.observe.clock import SystemClock
from penstock.observe.metrics import Metrics
from penstock.server.app import make_services
from tests.fakes.model_client import FakeModelClient

GOOD = {
    "custom_id": "good",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hi"}]},
}


def _lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def _run(folder: Path, *, client: FakeModelClient | None = None) -> BatchCounts:
    catalog = Catalog()
    client = client or FakeModelClient()
    catalog.add(client, name=client.name)
    clock = SystemClock()
    services = make_services(catalog, clock=clock, events=Metrics([], clock=clock))
    batch = Batch(services, source=folder / "in.jsonl", target=folder / "out.jsonl")
    asyncio.run(batch.run(Console(file=io.StringIO()), num_workers=3))
    return batch.counts


def _output(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def test_a_row_is_answered_as_the_endpoint_would(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    _run(tmp_path)
    row = _output(tmp_path)["good"]
    assert row["error"] is None
    assert row["response"]["status_code"] == 200
    assert row["response"]["body"]["choices"][0]["message"]["content"] == "Hello, world!"


def test_simple_rows_need_neither_id_nor_url(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(
        _lines({"prompt": "Once", "max_tokens": 3}, "", {"messages": [{"role": "user", "content": "Hi"}]})
    )
    _run(tmp_path)
    output = _output(tmp_path)
    assert output["row-1"]["response"]["body"]["object"] == "text_completion"
    assert output["row-3"]["response"]["body"]["object"] == "chat.completion"


@pytest.mark.parametrize(
    ("row", "param"),
    [
        ("{", None),
        ("[1]", None),
        ({"prompt": "x", "n": 100}, "n"),
        ({"prompt": "x", "stream": True}, "stream"),
        ({"prompt": "x", "guided_json": {"type": "object"}, "guided_regex": "a"}, "guided_regex"),
        ({"prompt": "x", "model": "other"}, "model"),
        ({"body": []}, "body"),
        ({"body": {"prompt": "x"}, "url": "/admin"}, "url"),
        ({"body": {"prompt": "x"}, "method": "DELETE"}, "method"),
        ({"body": {"prompt": "x"}, "extra": 1}, "extra"),
    ],
)
def test_a_bad_row_becomes_an_error_row_and_the_next_is_answered(
    tmp_path: Path, row: object, param: str | None
) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(row, GOOD))
    counts = _run(tmp_path)
    output = _output(tmp_path)
    assert output["row-1"]["response"] is None
    assert output["row-1"]["error"]["param"] == param
    assert output["good"]["error"] is None
    assert (counts.num_answered, counts.num_failed) == (1, 1)


def test_a_row_that_is_too_long_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines('{"prompt": "' + "x" * (2 * MAX_ROW_BYTES) + '"}', GOOD))
    assert [row.number for row in read_rows(tmp_path / "in.jsonl")] == [1, 2]
    _run(tmp_path)
    assert "over" in _output(tmp_path)["row-1"]["error"]["message"]


def test_a_request_that_fails_in_the_engine_is_an_error_row(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    _run(tmp_path, client=FakeModelClient(failure=GenerateError("NaN", code="numerical_error")))
    assert _output(tmp_path)["good"]["error"]["code"] == "numerical_error"


def test_a_dead_engine_ends_the_run_and_the_next_goes_on(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    with pytest.raises(EngineDeadError):
        _run(tmp_path, client=FakeModelClient(failure=EngineDeadError("died")))
    assert _run(tmp_path).num_answered == 1


class _BusyClient(FakeModelClient):
    """Its queue is full the first few times."""

    num_refusals = 3

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TextDelta]:
        if self.num_refusals:
            self.num_refusals -= 1
            raise QueueFullError("full", retry_after_s=0.001)
        return await super().generate(request)


def test_a_full_queue_is_waited_for_and_is_no_answer(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD, {"prompt": ["x", "y"]}))
    counts = _run(tmp_path, client=_BusyClient())
    assert (counts.num_answered, counts.num_failed) == (2, 0)


def test_an_engine_that_is_closed_ends_the_run_and_writes_no_row(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    with pytest.raises(NotReadyError):
        _run(tmp_path, client=FakeModelClient(refusal=NotReadyError("the engine is dead")))
    assert (tmp_path / "out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(("rows", "code"), [([GOOD], 0), ([GOOD, {"prompt": "x", "n": 100}], 1)])
def test_the_exit_code_tells_whether_a_row_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[object], code: int
) -> None:
    async def run(*_: object, **__: object) -> BatchCounts:
        return await asyncio.to_thread(_run, tmp_path)

    monkeypatch.setattr(commands, "_run_batch", run)
    (tmp_path / "in.jsonl").write_text(_lines(*rows))
    options = LocalOptions(max_num_seqs=4)
    target = tmp_path / "out.jsonl"
    assert commands.run_batch(None, source=tmp_path / "in.jsonl", target=target, options=options) == code


def test_rows_in_the_output_are_skipped(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD, {"prompt": "x"}))
    _run(tmp_path)
    before = (tmp_path / "out.jsonl").read_bytes()
    assert _run(tmp_path) == BatchCounts(num_skipped=2)
    assert (tmp_path / "out.jsonl").read_bytes() == before


def test_a_torn_last_line_is_removed_and_answered_again(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD, {"prompt": "x"}))
    _run(tmp_path)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(lines[0] + lines[1][:-7])
    assert len(done_ids(tmp_path / "out.jsonl")) == 1
    assert _run(tmp_path).num_answered == 1
    assert set(_output(tmp_path)) == {"good", "row-2"}


def test_an_output_that_is_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    (tmp_path / "out.jsonl").write_text("precious notes\n")
    with pytest.raises(StartupError, match="is no output row"):
        _run(tmp_path)
    assert (tmp_path / "out.jsonl").read_text() == "precious notes\n"


def test_the_output_may_not_be_the_input(tmp_path: Path) -> None:
    (tmp_path / "out.jsonl").write_text(_lines(GOOD))
    (tmp_path / "in.jsonl").symlink_to(tmp_path / "out.jsonl")
    with pytest.raises(StartupError, match="is the input too"):
        _run(tmp_path)


def test_a_second_row_of_the_same_id_is_refused_by_name_and_no_run_loses_or_repeats_it(
    tmp_path: Path,
) -> None:
    rows = [
        {"custom_id": "a", "prompt": "x"},
        {"custom_id": "b", "prompt": "y"},
        {"custom_id": "a", "prompt": "z"},
    ]
    (tmp_path / "in.jsonl").write_text(_lines(*rows))
    counts = _run(tmp_path)
    output = _output(tmp_path)
    assert (counts.num_answered, counts.num_failed) == (2, 1)
    assert output["a"]["error"] is None
    refused = output["row-3-duplicate"]["error"]
    assert refused["param"] == "custom_id"
    assert "custom_id is 'a'" in refused["message"]
    assert "line 1" in refused["message"]
    assert _run(tmp_path) == BatchCounts(num_skipped=3)


@pytest.mark.parametrize("kept", range(3))
def test_whichever_row_was_written_first_the_next_run_writes_the_others(tmp_path: Path, kept: int) -> None:
    rows = [
        {"custom_id": "a", "prompt": "x"},
        {"custom_id": "a", "prompt": "y"},
        {"custom_id": "a", "prompt": "z"},
    ]
    (tmp_path / "in.jsonl").write_text(_lines(*rows))
    _run(tmp_path)
    lines = (tmp_path / "out.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(lines[kept])
    _run(tmp_path)
    assert set(_output(tmp_path)) == {"a", "row-2-duplicate", "row-3-duplicate"}
    assert _output(tmp_path)["a"]["error"] is None


def test_a_row_that_is_not_utf_8_fails_alone(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"custom_id": "\xff"}\n' + _lines(GOOD).encode())
    counts = _run(tmp_path)
    assert (counts.num_answered, counts.num_failed) == (1, 1)
    assert "not a JSON object" in _output(tmp_path)["row-1"]["error"]["message"]


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("nowhere/out.jsonl", "cannot be written: No such file"),
        ("folder", "is not a file"),
        ("in.jsonl/out.jsonl", "cannot be written: Not a directory"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, words: str
) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    (tmp_path / "folder").mkdir()
    assert main(["run", str(tmp_path / "in.jsonl"), str(tmp_path / target)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_an_input_that_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    monkeypatch.setattr(Path, "open", _refuse_to_open)
    with pytest.raises(StartupError, match=r"in\.jsonl cannot be read: Permission denied"):
        _run(tmp_path)


def _refuse_to_open(*_: object, **__: object) -> None:
    raise PermissionError(13, "Permission denied")


def test_looking_at_the_output_leaves_no_file_behind(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(_lines(GOOD))
    clock = SystemClock()
    services = make_services(Catalog(), clock=clock, events=Metrics([], clock=clock))
    Batch(services, source=tmp_path / "in.jsonl", target=tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()
