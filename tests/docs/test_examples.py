"""The examples and the README's commands run as they stand, against a real server process."""

import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRON = {**os.environ, "PYTHONPATH": str(ROOT)}
START_TIMEOUT_S = 90


def _run(*command: str, timeout_s: float = 90) -> str:
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRON, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


@contextmanager
def _serving(*flags: str) -> Iterator[tuple[str, str]]:
    """Address of `penstock serve`, and the curl line that it printed; ends with exit code 0."""
    command = [
        sys.executable,
        "-m",
        "penstock.cli.main",
        "serve",
        "--port",
        "0",
        "--max-num-seqs",
        "8",
        *flags,
    ]
    process = subprocess.Popen(command, cwd=ROOT, env=ENVIRON, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines: list[str] = []
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not any(line.startswith("curl ") for line in lines) and time.monotonic() < deadline_s:
        line = process.stdout.readline()
        assert line, "".join(lines)
        lines.append(line)
    url = re.search(r"ready at (\S+?),", "".join(lines))
    assert url is not None, "".join(lines)
    yield url[1], lines[-1].strip()
    process.terminate()
    process.stdout.close()
    assert process.wait(60) == 0


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, str]]:
    """One server with its defaults for most examples."""
    with _serving() as found:
        yield found


def test_the_printed_curl_line_gets_an_answer(server: tuple[str, str]) -> None:
    _, line = server
    answer = json.loads(_run(*shlex.split(line), "-fsS"))
    assert answer["choices"][0]["message"]["role"] == "assistant"


def test_the_example_of_speculation_runs() -> None:
    assert "same answer: True" in _run(sys.executable, "examples/speculation.py")


def test_evicted_prompts_come_back_from_host_memory() -> None:
    out = _run(sys.executable, "examples/kv_offload.py")
    assert "the same answers: True" in out
    assert int(out.rsplit(":", 1)[1]) > 0


def test_the_example_of_a_quantized_checkpoint_runs(tmp_path: Path) -> None:
    """A GGUF file in the place of a folder: text in, text out, ended by the template's own end of turn."""
    from tools.quantized.gguf_file import write_gguf

    file = tmp_path / "tales.gguf"
    write_gguf(ROOT / "penstock/models/embedded", file, kind="Q8_0", pre="smollm")
    out = _run(sys.executable, "examples/quantized_checkpoint.py", str(file))
    assert "weights: gguf (11 F32, 36 Q8_0)" in out
    assert "Paris" in out


def test_the_openai_example_runs(server: tuple[str, str]) -> None:
    out = _run(sys.executable, "examples/openai_client.py", server[0])
    assert "answer: " in out
    assert "stream: " in out


def test_the_guided_example_gets_what_it_asks_for(server: tuple[str, str]) -> None:
    out = _run(sys.executable, "examples/guided_json.py", server[0])
    assert "person: name=" in out
    assert re.search(r"choice: (red|green|blue)\n", out)
    assert re.search(r"number: [0-9]{3}-[0-9]{4}\n", out)


def test_the_agent_example_calls_its_functions_and_answers_with_their_results(
    server: tuple[str, str],
) -> None:
    out = _run(sys.executable, "examples/tool_agent.py", server[0])
    assert 'calls: get_weather {"city": "Paris"}' in out
    assert "answer: The weather in Paris is sunny, 21 degrees." in out
    assert 'calls: add {"a": 345, "b": 77}' in out
    assert "answer: The sum of 345 and 77 is 422." in out


def test_the_embeddings_example_orders_texts(server: tuple[str, str]) -> None:
    out = _run(sys.executable, "examples/embeddings.py", server[0])
    *ordered, tokens = out.splitlines()
    cosines = [float(line.split()[0]) for line in ordered]
    assert cosines == sorted(cosines, reverse=True)
    assert len(cosines) == 3
    assert tokens.startswith("tokens: ")


def test_the_shell_example_streams(server: tuple[str, str]) -> None:
    out = _run("bash", "examples/stream.sh", server[0])
    assert "event: close" in out
    assert "data: [DONE]" in out


def test_the_readme_curl_command_runs(server: tuple[str, str]) -> None:
    block = re.search(r"```bash\n(curl .*?)```", README, re.DOTALL)
    assert block is not None
    command = block[1].replace("http://127.0.0.1:8000", server[0])
    answer = json.loads(_run("bash", "-c", command.strip() + " -fsS"))
    assert answer["object"] == "chat.completion"


def test_the_readme_python_client_runs(server: tuple[str, str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    client = next(block for block in blocks if "OpenAI" in block)
    assert _run(sys.executable, "-c", client.replace("http://127.0.0.1:8000", server[0])).strip()


def test_chat_talks_to_the_server(server: tuple[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock.cli.main", "chat", "--url", server[0], "--max-tokens", "4"],
        cwd=ROOT,
        env=ENVIRON,
        input="Hi\n/exit\n",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens" in done.stdout


def test_the_server_shows_its_document(server: tuple[str, str]) -> None:
    with urllib.request.urlopen(f"{server[0]}/docs", timeout=10) as reply:
        assert reply.status == 200


def test_the_offline_example_runs() -> None:
    out = _run(sys.executable, "examples/offline_batch.py")
    assert out.count("->") == 3
    assert "chat:" in out


def test_the_batch_example_is_answered_row_by_row(tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    _run(
        sys.executable,
        "-m",
        "penstock.cli.main",
        "run",
        "examples/batch.jsonl",
        str(target),
        "--max-num-seqs",
        "4",
    )
    rows = {row["custom_id"]: row for row in map(json.loads, target.read_text().splitlines())}
    assert set(rows) == {"capital", "story", "row-3"}
    assert all(row["error"] is None for row in rows.values())


def test_every_example_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f"examples/{path.name}" in source for path in (ROOT / "examples").iterdir() if path.is_file())


def test_the_lora_example_asks_base_and_adapter(tmp_path: Path) -> None:
    """An adapter of the embedded model, given at start, is listed with its parent and answers."""
    adapter = _write_adapter(tmp_path / "fox")
    with _serving("--enable-lora", "--lora-modules", f"fox={adapter}") as (url, _):
        out = _run(sys.executable, "examples/lora_adapter.py", url, "fox")
    assert "fox is an adapter of penstock-tales" in out
    assert "\nfox: " in out


def _write_adapter(folder: Path) -> Path:
    """Rank 2 on the query of the first layer of the embedded model, with small random weights."""
    import torch
    from safetensors.torch import save_file

    config = json.loads((ROOT / "penstock/models/embedded/config.json").read_text())
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    num_out = heads * config.get("head_dim", hidden // heads)
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    folder.mkdir()
    save_file(
        {
            f"{name}.lora_A.weight": torch.randn(2, hidden, generator=generator),
            f"{name}.lora_B.weight": torch.randn(num_out, 2, generator=generator),
        },
        folder / "adapter_model.safetensors",
    )
    fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["layers.0.self_attn.q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder
