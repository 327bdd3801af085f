"""`penstock bench` against a real `penstock serve` over real sockets: the whole way, with the embedded model."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from penstock.bench.load import run_load
from penstock.bench.measure import summarize
from penstock.bench.target import Target
from penstock.bench.workload import from_lists
from penstock.cli.main import main
from tests.e2e.product.server_process import ServerProcess, start_server


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    process = start_server("--num-threads", "1", "--max-num-seqs", "8", "--num-kv-blocks", "512")
    try:
        yield process
    finally:
        process.stop()


def _kept(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize(
    "load",
    [
        ("--max-concurrency", "4"),
        ("--request-rate", "40", "--arrivals", "gamma", "--burstiness", "0.5"),
        ("--max-concurrency", "2", "--endpoint", "chat"),
        ("--max-concurrency", "2", "--prompt-format", "text"),
    ],
    ids=["closed", "open", "chat", "text"],
)
def test_every_answer_has_its_tokens(server: ServerProcess, load: tuple[str, ...], tmp_path: Path) -> None:
    code = main([
        "bench", "serve", "--url", server.url, "--num-prompts", "8", "--random-input-len", "uniform:24:60",
        "--random-output-len", "uniform:2:6", "--ignore-eos", "--no-progress", "--save-detailed",
        "--result-dir", str(tmp_path), "--result-filename", "r.json", "--num-warmups", "1", *load,
    ])  # fmt: skip
    kept = _kept(tmp_path, "r.json")
    assert code == 0, kept["results"]
    assert kept["server"]["model"] == "penstock-tales"
    assert kept["results"]["completed"] == 8
    assert all(row["output_tokens"] == row["output_tokens_asked"] for row in kept["requests"])
    assert all(row["finish_reason"] == "length" for row in kept["requests"])
    assert all(row["ttft_ms"] <= row["e2el_ms"] for row in kept["requests"])
    # a word of the list may be two tokens in a text; token ids are counted exactly
    slack = 0 if kept["workload"]["prompts"] == "token ids" else 8
    assert all(24 - slack <= row["input_tokens"] <= 60 + slack for row in kept["requests"])


def test_a_shared_prefix_is_found_in_the_cache(server: ServerProcess, tmp_path: Path) -> None:
    code = main([
        "bench", "serve", "--url", server.url, "--num-prompts", "6", "--max-concurrency", "1", "--random-prefix-len",
        "64", "--random-input-len", "16", "--random-output-len", "2", "--no-progress", "--save-result", "--seed", "9",
        "--result-dir", str(tmp_path), "--result-filename", "r.json",
    ])  # fmt: skip
    assert code == 0
    assert _kept(tmp_path, "r.json")["results"]["cached_input_tokens"] == 5 * 64


def test_explicit_lists_from_a_script(server: ServerProcess) -> None:
    target = Target(base_url=server.url, model="penstock-tales", ignore_eos=True)
    workload = from_lists([[400, 500, 600]] * 3, output_lens=[2, 3, 4], arrival_s=[0.0, 0.01, 0.02])
    result = run_load(workload, target)
    assert [record.num_output_tokens for record in result.records] == [2, 3, 4]
    summary = summarize(result)
    assert (summary.num_ok, summary.num_prompt_tokens, summary.status) == (3, 9, "complete")


def test_a_sweep_of_a_real_server(server: ServerProcess, tmp_path: Path) -> None:
    code = main([
        "bench", "sweep", "--url", server.url, "--loads", "1,2", "--num-prompts", "4", "--random-input-len", "16",
        "--random-output-len", "4", "--no-progress", "--num-warmups", "1", "--save-result",
        "--result-dir", str(tmp_path), "--result-filename", "s.json",
    ])  # fmt: skip
    assert code == 0
    assert [point["results"]["completed"] for point in _kept(tmp_path, "s.json")["points"]] == [4, 4]


def test_a_server_that_is_killed_in_mid_run_ends_with_5(tmp_path: Path) -> None:
    doomed = start_server("--num-threads", "1", "--max-num-seqs", "2", "--num-kv-blocks", "512")

    class Killer:
        """Ends the server once some answers are there."""

        def tick(self, counters: Any) -> None:
            if counters.num_done >= 3 and doomed.process.poll() is None:
                doomed.process.kill()
                doomed.process.wait(10)

    try:
        target = Target(base_url=doomed.url, model="penstock-tales", ignore_eos=True)
        num = 2000  # far more than can be answered before the watcher's first tick after three answers
        workload = from_lists([[400, 500]] * num, output_lens=[16] * num, max_concurrency=2)
        result = run_load(workload, target, watcher=Killer())
    finally:
        doomed.stop()
    summary = summarize(result)
    assert result.status == "server_died"
    assert summary.num_ok >= 3
    assert summary.num_sent < num
    assert {"disconnected", "connect"} & set(summary.failures)
