"""Every limit of the transport in one place; the protocol, the body reader and the streams obey it."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds of one listener. At each the stated thing happens; nothing is dropped silently."""

    header_bytes_max: int = 16 * 1024
    """Request line and header together; beyond: 431 and the connection closes."""
    header_lines_max: int = 100
    """Header fields; beyond: 431 and the connection closes."""
    body_bytes_max: int = 4 * 1024 * 1024
    """Body of one request, 1 to 16 MiB; beyond: 413, before more is buffered."""
    body_bytes_total_max: int = 256 * 1024 * 1024
    """Bodies of all requests that are being read or parsed; beyond: 503."""
    json_depth_max: int = 64
    """Nesting of a JSON body; beyond: 400."""
    thread_bytes_min: int = 64 * 1024
    """Bodies of this size and more are parsed in a thread, beside the event loop."""
    chunks_free: int = 64
    """Chunks of a chunked body that may be of any size."""
    chunk_bytes_min: int = 1024
    """Mean size of the chunks beyond those; smaller: 400 and the connection closes."""
    receive_timeout_s: float = 10.0
    """From the first byte of a request to its last; beyond: 408 and the connection closes."""
    keep_alive_timeout_s: float = 75.0
    """Silence of a connection without a request; beyond: it closes."""
    connections_max: int = 16_384
    """Open connections; beyond: 503 and the connection closes."""
    write_buffer_bytes_max: int = 256 * 1024
    """Answer bytes waiting for a slow reader; beyond: the stream waits."""
    slow_reader_timeout_s: float = 30.0
    """How long a stream waits for its reader; beyond: the connection is cut and the request cancelled."""
    keepalive_interval_s: float = 15.0
    """Silence of a stream after which a comment line is sent."""
    close_timeout_s: float = 2.0
    """At shutdown, what open connections get to take their last bytes; beyond: they are cut."""
