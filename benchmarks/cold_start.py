"""From the command to ready, and from a 20-token chat prompt to its first token, on the embedded model.

Every server must answer "What is the capital of France?" with Paris.
"""

import asyncio
import sys
import time

import aiohttp

from benchmarks.report import arguments, finish, median, percentiles
from benchmarks.served import served

READY_BAR_S = 3.0
FIRST_TOKEN_BAR_MS = 50.0
QUESTION = "What is the capital of France?"


async def first_token_s(session: aiohttp.ClientSession, *, salt: str) -> float:
    """Seconds from sending to the first text; the salt keeps the prefix tree out of it."""
    body = {
        "model": "penstock-tales",
        "messages": [{"role": "user", "content": QUESTION}],
        "max_tokens": 4,
        "stream": True,
        "cache_salt": salt,
    }
    start_s = time.perf_counter()
    first_s = None
    async with session.post("/v1/chat/completions", json=body) as response:
        assert response.status == 200, await response.text()
        async for line in response.content:
            if first_s is None and b'"content":"' in line and b'"content":""' not in line:
                first_s = time.perf_counter() - start_s
    assert first_s is not None, "the answer has text"
    return first_s


async def ask(url: str, *, count: int) -> tuple[list[float], str]:
    """Times to the first token, and the whole answer to the question."""
    async with aiohttp.ClientSession(url) as session:
        times = [await first_token_s(session, salt=str(i)) for i in range(count)]
        body = {
            "model": "penstock-tales",
            "messages": [{"role": "user", "content": QUESTION}],
            "temperature": 0,
        }
        async with session.post("/v1/chat/completions", json=body) as response:
            answer = await response.json()
    return times, str(answer["choices"][0]["message"]["content"])


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--requests", type=int, default=20, help="for each start")
    options = parser.parse_args()
    if options.tiny:
        options.rounds, options.requests = 1, 3
    ready, first, very_first, answers = [], [], [], []
    for _ in range(options.rounds):
        with served() as server:
            times, answer = asyncio.run(ask(server.url, count=options.requests))
        ready.append(server.ready_s)
        very_first.append(times[0])
        first += times[1:]
        answers.append(answer)
    is_right = all("Paris" in answer for answer in answers)
    in_time = median(ready) < READY_BAR_S and median(first) * 1e3 < FIRST_TOKEN_BAR_MS
    return finish(
        "cold_start",
        options=options,
        sizes={"starts": options.rounds, "requests": options.requests, "question": QUESTION},
        results={
            "ready_s": [round(v, 2) for v in ready],
            "ready_bar_s": READY_BAR_S,
            "first_token_ms": percentiles(first, scale=1e3),
            "first_token_of_a_fresh_server_ms": [round(v * 1e3, 1) for v in very_first],
            "first_token_bar_ms": FIRST_TOKEN_BAR_MS,
            "answers": answers,
        },
        ok=is_right and (in_time or options.tiny),
    )


if __name__ == "__main__":
    sys.exit(main())
