"""A trace file: when requests came and how long they were, one JSON object a line.

```
{"timestamp": 0, "input_length": 512, "output_length": 64}
{"timestamp": 27, "input_length": 1100, "output_length": 120, "hash_ids": [4, 9, 31]}
```

`hash_ids` name the prompt's blocks of `HASH_BLOCK_TOKENS` tokens: equal ids are equal tokens, so that the
prefixes shared in the trace are shared in the load.

**Source:** field names, milliseconds and block size are those of the published Mooncake traces (arXiv
2407.00079, section 4).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from penstock.bench.lengths import MAX_LENGTH
from penstock.bench.workload import MAX_REQUESTS
from penstock.core.errors import StartupError

HASH_BLOCK_TOKENS: Final = 512
MAX_LINE_BYTES: Final = 1 << 20
TimeUnit = Literal["ms", "s"]
_SECONDS: Final[dict[TimeUnit, float]] = {"ms": 1e-3, "s": 1.0}


class TraceError(StartupError):
    """The trace cannot be used; the message names file and line, correct that line."""

    default_code = "bad_trace"


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRequest:
    """One line."""

    arrival_s: float
    """Seconds after the first line's."""
    input_len: int
    """Prompt tokens, at least 1."""
    output_len: int
    """Answer tokens, at least 1."""
    hash_ids: tuple[int, ...]
    """Of the blocks of the prompt; empty if the prompt shares nothing."""


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    timestamp: Annotated[float, msgspec.Meta(ge=0)]
    input_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    output_length: Annotated[int, msgspec.Meta(ge=1, le=MAX_LENGTH)]
    hash_ids: list[Annotated[int, msgspec.Meta(ge=0)]] = msgspec.field(default_factory=list)


def read_trace(
    path: Path, *, unit: TimeUnit = "ms", speed: float = 1.0, num_requests: int | None = None
) -> tuple[TraceRequest, ...]:
    """Read a trace; the first line's time is 0.

    Args:
        path: the file; blank lines are skipped.
        unit: of `timestamp`.
        speed: above 0; 2 replays it twice as fast.
        num_requests: read no more than these; None reads all.

    Raises:
        TraceError: the file or a line cannot be used.
    """
    limit = MAX_REQUESTS if num_requests is None else num_requests
    scale = _SECONDS[unit] / speed
    found: list[TraceRequest] = []
    first: float | None = None
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if not data.strip():
                    continue
                if len(found) == limit:
                    _check_rest(path, number=number, is_chosen=num_requests is not None)
                    break
                line = _parse(data, where=f"{path} line {number}")
                first = line.timestamp if first is None else first
                found.append(_request(line, arrival_s=(line.timestamp - first) * scale))
                _check_order(found, where=f"{path} line {number}")
    except OSError as error:
        raise TraceError(f"{path} cannot be read: {error.strerror}", param="dataset_path") from None
    if not found:
        raise TraceError(f"{path} has no lines", param="dataset_path")
    return tuple(found)


def _parse(data: bytes, *, where: str) -> _Line:
    if len(data) > MAX_LINE_BYTES:
        raise TraceError(f"{where} has over {MAX_LINE_BYTES} bytes", param="dataset_path")
    try:
        line = msgspec.json.decode(data, type=_Line)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise TraceError(f"{where}: {error}", param="dataset_path") from None
    num_blocks = -(-line.input_length // HASH_BLOCK_TOKENS)
    if line.hash_ids and len(line.hash_ids) != num_blocks:
        raise TraceError(
            f"{where}: {len(line.hash_ids)} hash_ids, {line.input_length} tokens have {num_blocks} blocks "
            f"of {HASH_BLOCK_TOKENS}",
            param="dataset_path",
        )
    return line


def _request(line: _Line, *, arrival_s: float) -> TraceRequest:
    return TraceRequest(
        arrival_s=arrival_s,
        input_len=line.input_length,
        output_len=line.output_length,
        hash_ids=tuple(line.hash_ids),
    )


def _check_order(found: list[TraceRequest], *, where: str) -> None:
    if len(found) > 1 and found[-1].arrival_s < found[-2].arrival_s:
        raise TraceError(f"{where}: timestamp goes back", param="dataset_path")
    if found[0].arrival_s < 0:
        raise TraceError(f"{where}: timestamp goes back", param="dataset_path")


def _check_rest(path: Path, *, number: int, is_chosen: bool) -> None:
    """There are lines left: fine if fewer were asked for, else the file is over the limit."""
    if not is_chosen:
        raise TraceError(
            f"{path} line {number}: over {MAX_REQUESTS} requests, choose how many with --num-prompts",
            param="dataset_path",
        )
