"""The lines of an offline batch: what comes in, what goes out, and what is done already.

A row is `{"custom_id": ..., "url": ..., "body": {...}}` as in OpenAI's batches, or simply
`{"prompt": ...}` or `{"messages": [...]}` with parameters beside it. Used by `batch`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from penstock.core.errors import InvalidParameterError, PenstockError, StartupError

CHAT_URL: Final = "/v1/chat/completions"
COMPLETIONS_URL: Final = "/v1/completions"
URLS: Final = (CHAT_URL, COMPLETIONS_URL)
MAX_ROW_BYTES: Final = 4 << 20
"""As for a body over HTTP."""
MAX_CUSTOM_ID_CHARS: Final = 512
UNREADABLE: Final = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
"""What decoding a line raises that is not as it should be."""
BATCH_FIELDS: Final = frozenset({"custom_id", "method", "url", "body"})


class RowError(msgspec.Struct, frozen=True, kw_only=True):
    """Why a row has no answer."""

    code: str
    message: str
    param: str | None = None


class RowResponse(msgspec.Struct, frozen=True, kw_only=True):
    """The answer, as the endpoint would have sent it."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class OutputRow(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the output; exactly one of `response` and `error` is set."""

    custom_id: str
    response: RowResponse | None = None
    error: RowError | None = None


class _DoneRow(msgspec.Struct):
    custom_id: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InputRow:
    """One line of the input, not yet understood."""

    number: int
    """Line number, from 1."""
    data: bytes
    """At most `MAX_ROW_BYTES + 1` bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedRow:
    """A line of the input and the one output row that is its own."""

    row: InputRow
    custom_id: str
    """Of its output; no two rows of a file have the same."""
    first_number: int | None = None
    """Line that has the id already; this one is then refused."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRequest:
    """A row that says what it wants."""

    custom_id: str
    url: str
    body: dict[str, object]


def read_rows(path: Path) -> Iterator[InputRow]:
    """Lines that are not blank; of a longer one than `MAX_ROW_BYTES` the start, which then fails as a row."""
    with path.open("rb") as file:
        number = 0
        while data := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            while len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
                rest = file.readline(MAX_ROW_BYTES)
                if not rest or rest.endswith(b"\n"):
                    break
            if data.strip():
                yield InputRow(number=number, data=data)


def named_rows(path: Path) -> Iterator[NamedRow]:
    """The rows and the ids of their outputs; a second row of an id is called `row-N-duplicate`.

    An id stands for one row, so that a later run knows from the output alone which rows are open.
    """
    numbers: dict[str, int] = {}
    for row in read_rows(path):
        custom_id = custom_id_of(row)
        first_number = numbers.get(custom_id)
        if first_number is not None:
            custom_id = f"{_row_id(row)}-duplicate"
            while custom_id in numbers:
                custom_id += "-"
        numbers[custom_id] = row.number
        yield NamedRow(row=row, custom_id=custom_id, first_number=first_number)


def parse_row(row: InputRow) -> BatchRequest:
    """What the row wants; its body is checked later, by the endpoint's own rules.

    Raises:
        InvalidParameterError: the row is no JSON object, or not of a known form.
    """
    if len(row.data) > MAX_ROW_BYTES:
        raise InvalidParameterError(f"the row is over {MAX_ROW_BYTES} bytes")
    try:
        fields = msgspec.json.decode(row.data, type=dict[str, object])
    except UNREADABLE as error:
        raise InvalidParameterError(f"the row is not a JSON object: {error}", code="invalid_json") from error
    if "body" in fields:
        return _batch_form(fields, row=row)
    custom_id = _text(fields.pop("custom_id", _row_id(row)), param="custom_id")
    return BatchRequest(custom_id=custom_id, url=_url_of(fields), body=fields)


def custom_id_of(row: InputRow) -> str:
    """The row's id even if the rest of it is wrong; `row-N` if it has none."""
    try:
        return msgspec.json.decode(row.data, type=_DoneRow).custom_id[:MAX_CUSTOM_ID_CHARS]
    except UNREADABLE:
        return _row_id(row)


def _row_id(row: InputRow) -> str:
    return f"row-{row.number}"


def _batch_form(fields: dict[str, object], *, row: InputRow) -> BatchRequest:
    for name in fields:
        if name not in BATCH_FIELDS:
            raise InvalidParameterError(f"{name} is not a field of a batch row", param=name)
    body = fields["body"]
    if not isinstance(body, dict):
        raise InvalidParameterError(f"body is {type(body).__name__}, it must be an object", param="body")
    if fields.get("method", "POST") != "POST":
        raise InvalidParameterError(f"method is {fields['method']!r}, it must be POST", param="method")
    url = _text(fields.get("url", _url_of(body)), param="url")
    if url not in URLS:
        raise InvalidParameterError(f"url is {url!r}, it must be one of {', '.join(URLS)}", param="url")
    custom_id = _text(fields.get("custom_id", _row_id(row)), param="custom_id")
    return BatchRequest(custom_id=custom_id, url=url, body=body)


def _url_of(body: dict[str, object]) -> str:
    return CHAT_URL if "messages" in body else COMPLETIONS_URL


def _text(value: object, *, param: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= MAX_CUSTOM_ID_CHARS:
        limit = f"text of 1 to {MAX_CUSTOM_ID_CHARS} characters"
        raise InvalidParameterError(f"{param} is {value!r:.80}, it must be {limit}", param=param)
    return value


def error_row(custom_id: str, error: PenstockError) -> OutputRow:
    """The output of a row that could not be answered."""
    told = RowError(code=error.code, message=error.message, param=error.param)
    return OutputRow(custom_id=custom_id, error=told)


def refuse_duplicate(named: NamedRow) -> None:
    """Refuse the second row of an id: its answer could not be told from the first's.

    Raises:
        InvalidParameterError: an earlier line has the id.
    """
    if named.first_number is not None:
        value = custom_id_of(named.row)
        raise InvalidParameterError(
            f"custom_id is {value!r:.80}, line {named.first_number} has it already", param="custom_id"
        )


def done_ids(path: Path) -> set[str]:
    """Ids in an output of an earlier run; a line that was cut off by its end is removed from the file.

    Raises:
        StartupError: the file holds something else.
    """
    if not path.exists():
        return set()
    found: set[str] = set()
    good_bytes = 0
    with path.open("rb+") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                found.add(msgspec.json.decode(line, type=_DoneRow).custom_id)
            except UNREADABLE as error:
                raise StartupError(
                    f"{path} line {number} is no output row ({error}): name another file"
                ) from error
            good_bytes += len(line)
        file.truncate(good_bytes)
    return found
