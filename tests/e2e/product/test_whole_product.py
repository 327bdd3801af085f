"""The whole product over a real socket: the unmodified client, kills, drains, disconnects, refusals."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import aiohttp
import httpx
import openai
import psutil
import pytest

from tests.e2e.product.server_process import ROOT, ServerProcess, start_server

MODEL = "penstock-tales"
LONG = {"model": MODEL, "prompt": "Once upon a time", "stream": True, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    server = start_server("--admin-key", "s3cret", "--admin-port", "0")
    yield server
    server.stop()


@pytest.fixture
def own_server() -> Iterator[ServerProcess]:
    server = start_server("--shutdown-timeout", "20")
    yield server
    server.stop()


@pytest.fixture
def client(server: ServerProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def until(condition: Callable[[], bool], *, timeout_s: float = 15) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "timed out"
        time.sleep(0.02)


def kv_owned(url: str) -> int:
    engines = httpx.get(f"{url}/health").json()["memory"]["engines"]
    return sum(engine["kv_bytes_owned"] for engine in engines)


def events_of(response: httpx.Response) -> Iterator[dict[str, object] | str]:
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            yield data if data == "[DONE]" else json.loads(data)


def test_the_embedded_model_knows_the_capital_of_france(client: openai.OpenAI) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client.chat.completions.create(model=MODEL, messages=question, temperature=0)  # type: ignore[arg-type]
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"


def test_a_schema_is_followed_streamed_or_not_and_a_bad_one_is_a_400(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "maximum": 99}},
        "required": ["colour", "count"],
        "additionalProperties": False,
    }
    arguments = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Describe a flower."}],
        "response_format": {"type": "json_schema", "json_schema": {"name": "flower", "schema": schema}},
        "seed": 1,
        "n": 2,
    }
    whole = client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    texts = {choice.index: choice.message.content for choice in whole.choices}
    assert all(set(json.loads(text)) == {"colour", "count"} for text in texts.values())
    assert {choice.finish_reason for choice in whole.choices} == {"stop"}
    streamed = {0: "", 1: ""}
    for chunk in client.chat.completions.create(stream=True, **arguments):  # type: ignore[call-overload]
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert streamed == texts
    schema["uniqueItems"] = True
    with pytest.raises(openai.BadRequestError, match="uniqueItems") as caught:
        client.chat.completions.create(**arguments)  # type: ignore[call-overload]
    assert (caught.value.code, caught.value.param) == ("invalid_grammar", "response_format")


def test_streamed_text_equals_the_whole_text(client: openai.OpenAI) -> None:
    arguments = {"model": MODEL, "prompt": "The king said", "max_tokens": 40, "temperature": 0.9, "seed": 7}
    whole = client.completions.create(**arguments)  # type: ignore[call-overload]
    stream = client.completions.create(stream=True, stream_options={"include_usage": True}, **arguments)  # type: ignore[call-overload]
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == whole.choices[0].text
    assert (
        chunks[-1].usage == whole.usage or chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )


def test_n_answers_share_the_prompt_and_differ(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="Long ago", n=4, max_tokens=20, temperature=1, seed=3
    )
    texts = [choice.text for choice in answer.choices]
    assert len(set(texts)) > 1
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    again = client.completions.create(
        model=MODEL, prompt="Long ago", n=4, max_tokens=20, temperature=1, seed=3
    )
    assert [choice.text for choice in again.choices] == texts


def test_a_second_request_hits_the_prefix_tree(client: openai.OpenAI) -> None:
    prompt = "There was once a soldier who had served the king faithfully for many years. " * 4
    client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert (answer.usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_a_prompt_can_be_scored_without_a_new_token(client: openai.OpenAI) -> None:
    """What evaluation harnesses ask: echo, logprobs, no new token."""
    text = "The capital of France is Paris."
    answer = client.completions.create(model=MODEL, prompt=text, max_tokens=0, echo=True, logprobs=2)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (text, "length")
    told = choice.logprobs
    assert told is not None
    assert "".join(told.tokens or ()).endswith(text)
    assert (told.token_logprobs or [0])[0] is None
    assert all(logprob <= 0 for logprob in (told.token_logprobs or ())[1:])
    again = client.completions.create(
        model=MODEL, prompt=text, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 0}
    )
    about_prompt = again.choices[0].model_dump()["prompt_logprobs"]
    scores = [next(iter(entry.values()))["logprob"] for entry in about_prompt[1:]]
    assert scores == pytest.approx((told.token_logprobs or [])[1:], abs=0.05)  # bfloat16, another batch


def test_bad_requests_are_the_sdks_exceptions_and_harm_nobody(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="penstock-tales"):
        client.completions.create(model="no-such-model", prompt="a")
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model=MODEL, prompt="a", temperature=3)
    with pytest.raises(openai.BadRequestError, match="4096"):
        client.completions.create(model=MODEL, prompt="a " * 5000)
    assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices


def test_a_client_that_hangs_up_frees_its_blocks(server: ServerProcess) -> None:
    for is_stream in (True, False):
        body = {**LONG, "stream": is_stream, "max_tokens": 3500}
        with socket.create_connection(
            (server.url.split(":")[1][2:], int(server.url.rsplit(":", 1)[1]))
        ) as raw:
            data = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
            raw.sendall(head.encode() + data)
            until(lambda: kv_owned(server.url) > 0)
        until(lambda: kv_owned(server.url) == 0, timeout_s=5)


def test_only_the_public_and_the_admin_port_listen(server: ServerProcess) -> None:
    processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
    listening = [
        connection.laddr
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 2
    assert {address.ip for address in listening} == {"127.0.0.1"}


def test_metrics_tell_what_was_served(server: ServerProcess, client: openai.OpenAI) -> None:
    client.completions.create(model=MODEL, prompt="a", max_tokens=3, extra_body={"ignore_eos": True})
    text = httpx.get(f"{server.url}/metrics").text
    for name in ("penstock_generation_tokens_total", "penstock_time_to_first_token_seconds_count"):
        line = next(line for line in text.splitlines() if line.startswith(name + "{"))
        assert float(line.split()[-1]) > 0, line


async def test_many_streams_at_once_all_end_well(server: ServerProcess) -> None:
    async def one(session: aiohttp.ClientSession, index: int) -> int:
        body = {**LONG, "max_tokens": 24, "temperature": 1, "seed": index}
        async with session.post(f"{server.url}/v1/completions", json=body) as response:
            assert response.status == 200
            text = (await response.read()).decode()
        assert text.rstrip().endswith("data: [DONE]")
        assert '"error"' not in text
        return text.count("data: ") - 1

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        counts = await asyncio.gather(*(one(session, index) for index in range(100)))
    assert min(counts) > 0
    assert kv_owned(server.url) == 0


def test_a_killed_engine_ends_started_streams_with_an_error_and_comes_back(own_server: ServerProcess) -> None:
    with httpx.Client(base_url=own_server.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000}) as response:
            events = events_of(response)
            next(events)
            os.kill(own_server.engine_pid, signal.SIGKILL)
            killed_s = time.monotonic()
            rest = list(events)
        assert time.monotonic() - killed_s < 3
        assert any(isinstance(event, dict) and "error" in event for event in rest)
        assert "[DONE]" not in rest
        until(lambda: http.get("/health/ready").status_code == 200, timeout_s=30)
        answer = http.post("/v1/completions", json={"model": MODEL, "prompt": "a", "max_tokens": 2})
        assert answer.status_code == 200
    assert own_server.process.poll() is None


def test_sigterm_lets_running_streams_finish_and_exits_0(own_server: ServerProcess) -> None:
    body = {**LONG, "max_tokens": 150}
    with httpx.Client(base_url=own_server.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json=body) as response:
            events = events_of(response)
            first = next(events)
            own_server.terminate()
            rest = list(events)
    assert isinstance(first, dict)
    assert rest[-1] == "[DONE]"
    assert own_server.wait() == 0


def test_a_second_sigterm_ends_streams_with_an_error_event(own_server: ServerProcess) -> None:
    with httpx.Client(base_url=own_server.url, timeout=30) as http:
        with http.stream("POST", "/v1/completions", json={**LONG, "max_tokens": 4000}) as response:
            events = events_of(response)
            next(events)
            own_server.terminate()
            # Two signals at once are one to the kernel: the second must come after the first was seen.
            until(lambda: httpx.get(f"{own_server.url}/health/ready").status_code == 503)
            own_server.terminate()
            rest = list(events)
    assert any(isinstance(event, dict) and "error" in event for event in rest)
    assert own_server.wait(10) == 0


@pytest.mark.parametrize(
    ("arguments", "code", "word"),
    [
        (("/no/such/folder",), 2, "no such folder"),
        (("--trust-remote-code",), 2, "trust_remote_code"),
        (("--port", "70000"), 2, "port"),
        (("--no-such-flag",), 2, "no-such-flag"),
        (("--block-size", "3"), 2, "block-size"),
        (("--kv-cache-memory-bytes", "1"), 2, "kv_cache_memory_bytes"),
    ],
)
def test_a_wrong_start_is_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "serve", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert word in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


def test_a_damaged_checkpoint_is_one_line_and_exit_code_3(tmp_path: Path) -> None:
    from penstock.models.embedded_model import embedded_path

    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((embedded_path() / name).read_bytes())
    weights = (embedded_path() / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "serve", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 3, done.stderr
    assert "model.safetensors" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
