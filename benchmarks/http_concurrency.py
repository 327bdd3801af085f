"""200 concurrent streaming requests over HTTP: none lost, no error; tokens per second, TTFT, ITL.

Every stream must have text, one finish reason, a usage that equals the tokens asked for, and `[DONE]`.
"""

import asyncio
import json
import sys
import time
from dataclasses import dataclass, field

import aiohttp

from benchmarks.report import arguments, finish, median, percentiles
from benchmarks.served import served


@dataclass(slots=True)
class StreamTimes:
    """What one stream showed."""

    start_s: float
    first_s: float | None = None
    end_s: float = 0.0
    last_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    finish_reasons: list[str] = field(default_factory=list)
    is_done: bool = False
    error: str | None = None

    def is_complete(self, max_tokens: int) -> bool:
        """Everything that a good stream has."""
        ended_well = self.error is None and self.is_done and self.finish_reasons == ["length"]
        return ended_well and self.num_tokens == max_tokens and self.first_s is not None


async def one_stream(session: aiohttp.ClientSession, *, prompt: str, max_tokens: int) -> StreamTimes:
    """Ask and read to the end."""
    body = {
        "model": "penstock-tales",
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    times = StreamTimes(start_s=time.perf_counter())
    try:
        async with session.post("/v1/chat/completions", json=body) as response:
            if response.status != 200:
                times.error = f"status {response.status}: {await response.text()}"
            async for line in response.content:
                read_line(times, line)
    except (aiohttp.ClientError, TimeoutError) as error:
        times.error = repr(error)
    times.end_s = time.perf_counter()
    return times


def read_line(times: StreamTimes, line: bytes) -> None:
    """Take in one line of the stream."""
    if not line.startswith(b"data:"):
        return
    data = line.removeprefix(b"data:").strip()
    if data == b"[DONE]":
        times.is_done = True
        return
    event = json.loads(data)
    if "error" in event:
        times.error = str(event["error"])
        return
    if event.get("usage"):
        times.num_tokens = event["usage"]["completion_tokens"]
    for choice in event["choices"]:
        if choice["delta"].get("content"):
            now_s = time.perf_counter()
            if times.first_s is None:
                times.first_s = now_s
            else:
                times.gaps_s.append(now_s - times.last_s)
            times.last_s = now_s
        if choice["finish_reason"]:
            times.finish_reasons.append(choice["finish_reason"])


async def run(url: str, *, concurrency: int, max_tokens: int, offset: int) -> tuple[list[StreamTimes], float]:
    """All streams at once; also the seconds until the last has ended."""
    timeout = aiohttp.ClientTimeout(total=600)
    connector = aiohttp.TCPConnector(limit=0)
    start_s = time.perf_counter()
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        prompts = [f"Tell me story number {offset + i}." for i in range(concurrency)]
        streams = await asyncio.gather(
            *(one_stream(session, prompt=p, max_tokens=max_tokens) for p in prompts)
        )
    return streams, time.perf_counter() - start_s


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--concurrency", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=64)
    options = parser.parse_args()
    if options.tiny:
        options.concurrency, options.max_tokens, options.rounds = 8, 4, 1
    streams: list[StreamTimes] = []
    speeds = []
    with served("--max-num-seqs", str(max(64, options.concurrency))) as server:
        asyncio.run(run(server.url, concurrency=4, max_tokens=8, offset=10_000))
        for each in range(options.rounds):
            part, elapsed_s = asyncio.run(
                run(
                    server.url,
                    concurrency=options.concurrency,
                    max_tokens=options.max_tokens,
                    offset=each * options.concurrency,
                )
            )
            streams += part
            speeds.append(options.concurrency * options.max_tokens / elapsed_s)
    incomplete = [each for each in streams if not each.is_complete(options.max_tokens)]
    for each in incomplete[:3]:
        print("incomplete:", each.error or each, file=sys.stderr)
    return finish(
        "http_concurrency",
        options=options,
        sizes={
            "concurrency": options.concurrency,
            "max_tokens": options.max_tokens,
            "rounds": options.rounds,
        },
        results={
            "num_streams": len(streams),
            "num_incomplete": len(incomplete),
            "tokens_per_s": [round(v, 1) for v in speeds],
            "tokens_per_s_median": round(median(speeds), 1),
            "ttft_ms": percentiles([s.first_s - s.start_s for s in streams if s.first_s], scale=1e3),
            "itl_ms": percentiles([gap for s in streams for gap in s.gaps_s], scale=1e3),
            "e2el_ms": percentiles([s.end_s - s.start_s for s in streams], scale=1e3),
        },
        ok=not incomplete,
    )


if __name__ == "__main__":
    sys.exit(main())
