"""Bytes of an event stream to the data of its events, whatever the pieces they come in. Used by `client`.

**Source:** WHATWG HTML, 9.2.6 "Interpreting an event stream": a blank line ends an event, lines end with
CR LF, LF or CR, several `data` lines are joined by LF, a line that starts with a colon is a comment. Two
deliberate differences: other fields are not kept, and what stands after the last blank line counts (`rest`),
because some servers close behind `[DONE]` without one.
"""

from typing import Final

MAX_EVENT_BYTES: Final = 4 << 20


class EventTooLargeError(ValueError):
    """An event did not end within `MAX_EVENT_BYTES`."""


class EventStream:
    """Splits one stream; mutated by `feed` and `rest`."""

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer = b""

    def feed(self, chunk: bytes) -> list[bytes]:
        """Data of the events that `chunk` completes, in order.

        Raises:
            EventTooLargeError: more than `MAX_EVENT_BYTES` without a blank line.
        """
        buffer = self._buffer + chunk if self._buffer else chunk
        if b"\r" in buffer:
            # A CR at the end may be half of a CR LF: it waits for the next chunk.
            held = buffer.endswith(b"\r")
            buffer = _with_lf(buffer[:-1] if held else buffer) + (b"\r" if held else b"")
        *events, self._buffer = buffer.split(b"\n\n")
        if len(self._buffer) > MAX_EVENT_BYTES:
            raise EventTooLargeError(f"an event has over {MAX_EVENT_BYTES} bytes")
        return [data for event in events if (data := _data(event))]

    def rest(self) -> list[bytes]:
        """Data of what stands after the last blank line, at the end of the stream."""
        event, self._buffer = _with_lf(self._buffer), b""
        return [data] if (data := _data(event)) else []


def _with_lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")


def _data(event: bytes) -> bytes:
    """The data of one event: of its one line in the usual case."""
    if event.startswith(b"data:") and b"\n" not in event:
        return event[6:] if event.startswith(b"data: ") else event[5:]
    values = [line[5:].removeprefix(b" ") for line in event.split(b"\n") if line.startswith(b"data:")]
    return b"\n".join(values)
