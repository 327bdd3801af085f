"""How one would serve a model with transformers alone: `generate` behind HTTP, the ladder's lowest rungs.

One thread generates, one batch after another. A batch takes what waits, up to `batch_size`; with a batch size
above 1 it waits `batch_timeout_s` for more to come. It is padded on the left to its longest prompt and runs
until its longest answer is done; each answer is streamed token by token and ends when it has its own length.
So nothing is held back that the method could give; only what it cannot do is missing.

Run by `climb` as `python -m penstock.bench.ladder.naive_server MODEL --port N ...`; needs transformers (the
`bench` extra). It speaks just enough of the completions API for the load generator, with token ids as prompt,
and tells at `/metrics` what Penstock tells under the same names.
"""

import argparse
import asyncio
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import msgspec
import torch
from aiohttp import web
from tokenizers import Tokenizer

from penstock.core.errors import StartupError

MAX_WAITING: Final = 1024
MISSING: Final = (
    "the lowest rungs need transformers, which is not installed: pip install 'penstock[bench]', "
    "or leave them out with --rungs"
)


class CompletionBody(msgspec.Struct):
    """The part of a completion request that is served; unknown fields are the load generator's own."""

    prompt: list[int]
    max_tokens: int


@dataclass(slots=True)
class Job:
    """One request and where its tokens go."""

    prompt: list[int]
    max_tokens: int
    send: Callable[[int | None], None]
    """Called in the generating thread with each token, then with None."""
    num_sent: int = 0


@dataclass(slots=True)
class Totals:
    """Sums that `/metrics` tells; written by the generating thread, read by the other."""

    num_running: int = 0
    slots_owned_s: float = 0.0
    slots_used_s: float = 0.0
    num_prompt_tokens: int = 0
    num_generated_tokens: int = 0

    def text(self) -> str:
        """Prometheus's text form, with Penstock's names."""
        values = {
            "penstock_num_requests_running": self.num_running,
            "penstock_kv_cache_owned_slot_seconds_total": self.slots_owned_s,
            "penstock_kv_cache_used_slot_seconds_total": self.slots_used_s,
            "penstock_prompt_tokens_computed_total": self.num_prompt_tokens,
            "penstock_generation_tokens_total": self.num_generated_tokens,
        }
        return "".join(f"{name} {value}\n" for name, value in values.items())


class BatchStream:
    """What `generate` calls a streamer: hands every new token to its job.

    Slots of a static batch after t steps, with prompts of 3 and 5 tokens and answers of 4 and 1:

        owned  2 * (5 + t)                 every row is as wide as the widest
        used   (3 + min(t, 4)) + (5 + min(t, 1))    padding and ended answers hold nothing
    """

    def __init__(self, jobs: Sequence[Job], totals: Totals) -> None:
        self._jobs = jobs
        self._totals = totals
        self._width = max(len(job.prompt) for job in jobs)
        self._num_steps = -1
        self._last_s = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """The prompts first, then [batch] token ids a step."""
        self._count_slots()
        self._num_steps += 1
        if self._num_steps == 0:
            return
        for job, token in zip(self._jobs, value.tolist(), strict=True):
            if job.num_sent < job.max_tokens:
                job.num_sent += 1
                self._totals.num_generated_tokens += 1
                job.send(token)
                if job.num_sent == job.max_tokens:
                    job.send(None)

    def end(self) -> None:
        """All is generated."""
        self._count_slots()

    def _count_slots(self) -> None:
        now_s = time.perf_counter()
        elapsed_s, self._last_s = now_s - self._last_s, now_s
        num_steps = max(0, self._num_steps)
        used = sum(len(job.prompt) + min(num_steps, job.max_tokens) for job in self._jobs)
        self._totals.slots_owned_s += len(self._jobs) * (self._width + num_steps) * elapsed_s
        self._totals.slots_used_s += used * elapsed_s


@dataclass(slots=True, kw_only=True)
class Batcher:
    """The generating thread.

    Args:
        model: transformers' model.
        batch_size: most requests of a batch.
        batch_timeout_s: how long an unfull batch waits for more.
    """

    model: Any  # Any: transformers is not typed here
    batch_size: int
    batch_timeout_s: float
    totals: Totals = field(default_factory=Totals)
    waiting: "queue.Queue[Job]" = field(default_factory=lambda: queue.Queue(MAX_WAITING))

    def run_forever(self) -> None:
        """Take batches and generate."""
        while True:
            jobs = self.take()
            self.totals.num_running = len(jobs)
            self.generate(jobs)
            self.totals.num_running = 0

    def take(self) -> list[Job]:
        """The next batch; waits for its first request, and then at most the timeout."""
        jobs = [self.waiting.get()]
        deadline_s = time.perf_counter() + self.batch_timeout_s
        while len(jobs) < self.batch_size:
            try:
                jobs.append(self.waiting.get(timeout=max(0.0, deadline_s - time.perf_counter())))
            except queue.Empty:
                break
        return jobs

    def generate(self, jobs: Sequence[Job]) -> None:
        """One batch, left-padded, to the end of its longest answer."""
        width = max(len(job.prompt) for job in jobs)
        tokens = [[0] * (width - len(job.prompt)) + job.prompt for job in jobs]
        mask = [[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs]
        longest = max(job.max_tokens for job in jobs)
        self.totals.num_prompt_tokens += sum(len(job.prompt) for job in jobs)
        with torch.inference_mode():
            self.model.generate(
                torch.tensor(tokens),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                max_new_tokens=longest,
                min_new_tokens=longest,
                pad_token_id=0,
                streamer=BatchStream(jobs, self.totals),
            )


class NaiveServer:
    """The HTTP side."""

    def __init__(self, batcher: Batcher, tokenizer: Tokenizer) -> None:
        self._batcher = batcher
        self._tokenizer = tokenizer

    def app(self) -> web.Application:
        """Its three routes."""
        app = web.Application(client_max_size=64 << 20)
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.post("/v1/completions", self._complete),
            ]
        )
        return app

    async def _health(self, _request: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _metrics(self, _request: web.Request) -> web.Response:
        return web.Response(text=self._batcher.totals.text())

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = msgspec.json.decode(await request.read(), type=CompletionBody)
        loop = asyncio.get_running_loop()
        tokens: asyncio.Queue[int | None] = asyncio.Queue()
        job = Job(body.prompt, body.max_tokens, lambda token: _hand_over(loop, tokens, token))
        self._batcher.waiting.put_nowait(job)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        while (token := await tokens.get()) is not None:
            text = self._tokenizer.decode([token], skip_special_tokens=False)
            await response.write(_event({"choices": [{"text": text or " ", "finish_reason": None}]}))
        usage = {"prompt_tokens": len(body.prompt), "completion_tokens": job.num_sent}
        await response.write(_event({"choices": [{"text": "", "finish_reason": "length"}], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _hand_over(
    loop: asyncio.AbstractEventLoop, tokens: "asyncio.Queue[int | None]", token: int | None
) -> None:
    loop.call_soon_threadsafe(tokens.put_nowait, token)


def _event(data: dict[str, object]) -> bytes:
    return b"data: " + msgspec.json.encode(data) + b"\n\n"


def load_model(path: Path, *, dtype: str) -> Any:  # Any: transformers is not typed here
    """Transformers' model of a folder.

    Raises:
        StartupError: transformers is not installed.
    """
    try:
        transformers = import_module("transformers")
    except ImportError as error:
        raise StartupError(MISSING) from error
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), trust_remote_code=False
    ).eval()
    model.generation_config.eos_token_id = None
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until killed; the return value is the exit code."""
    parser = argparse.ArgumentParser(description="transformers' generate behind HTTP")
    parser.add_argument("model", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--batch-timeout-ms", type=float, default=0.0)
    parser.add_argument("--num-threads", type=int, default=1)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.num_threads)
    try:
        model = load_model(options.model, dtype=options.dtype)
    except StartupError as error:
        print(f"penstock: {error.message}", file=sys.stderr)
        return error.exit_code
    batcher = Batcher(
        model=model, batch_size=options.batch_size, batch_timeout_s=options.batch_timeout_ms / 1e3
    )
    threading.Thread(target=batcher.run_forever, name="generate", daemon=True).start()
    server = NaiveServer(batcher, Tokenizer.from_file(str(options.model / "tokenizer.json")))
    web.run_app(server.app(), host="127.0.0.1", port=options.port, print=None, shutdown_timeout=0.1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
