"""`penstock bench serve` and `sweep`: flags become options, wrong ones one line, ends an exit code each."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from penstock.bench import load as load_module
from penstock.cli import bench_load
from penstock.cli.main import main
from tests.unit.bench_load.scripted_server import (
    DONE,
    ScriptedServer,
    broken_stream,
    good_answer,
    scripted,
    stream,
    text_event,
    usage_event,
)


@contextmanager
def threaded(server: ScriptedServer) -> Iterator[ScriptedServer]:
    """The server in a thread with a loop of its own: the command under test has the main one."""
    loop = asyncio.new_event_loop()
    up, down = threading.Event(), asyncio.Event()

    async def serve() -> None:
        async with scripted(server):
            up.set()
            await down.wait()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert up.wait(10)
        yield server
    finally:
        loop.call_soon_threadsafe(down.set)
        thread.join(10)
        loop.close()


SMALL = (
    "--num-prompts", "6", "--random-input-len", "20", "--random-output-len", "3", "--num-warmups", "1",
    "--no-progress",
)  # fmt: skip


def _serve(server: ScriptedServer, *argv: str) -> int:
    return main(["bench", "serve", "--url", server.url, *SMALL, *argv])


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load_module, "ALIVE_DELAYS_S", (0.0, 0.0))


def test_help_lists_the_commands_of_the_load_half(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert "serve" in out
    assert "sweep" in out


def test_a_good_run_ends_with_0_and_a_result(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with threaded(ScriptedServer()) as server:
        code = _serve(
            server, "--max-concurrency", "2", "--save-detailed", "--result-dir", str(tmp_path / "r"),
            "--result-filename", "one.json", "--metadata", "run=1", "where=here", "--goodput", "ttft:60000",
        )  # fmt: skip
    assert code == 0
    assert "6 of 6 answered well" in capsys.readouterr().out
    kept = json.loads((tmp_path / "r" / "one.json").read_text())
    assert kept["metadata"] == {"run": "1", "where": "here"}
    assert kept["results"]["num_good"] == 6
    assert len(kept["requests"]) == 6


def test_a_picture_is_drawn_beside_the_result(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with threaded(ScriptedServer()) as server:
        argv = ("--save-result", "--plot", "--result-dir", str(tmp_path), "--result-filename", "one.json")
        assert _serve(server, *argv) == 0
    assert (tmp_path / "one.png").exists()


def test_failed_requests_end_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) < 4:  # a probe, a warm-up and one that counts
            return await stream(request, good_answer(body["max_tokens"], num_prompt_tokens=16))
        usage = usage_event(prompt=3, completion=1)
        return await stream(request, [text_event("x", finish="length"), usage, DONE])

    server = ScriptedServer(handler=handler)
    with threaded(server):
        assert _serve(server) == 1
    assert "5 x wrong_length: 1 tokens with finish_reason length, 3 were asked for" in capsys.readouterr().out


def test_a_server_that_dies_ends_with_5_and_its_result_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) < 6:
            return await stream(request, good_answer(body["max_tokens"], num_prompt_tokens=16))
        assert server.runner is not None
        for site in list(server.runner.sites):
            await site.stop()
        return await broken_stream(request, good_answer(body["max_tokens"])[:1])

    server = ScriptedServer(handler=handler)
    with threaded(server):
        argv = ("--max-concurrency", "1", "--save-result", "--result-dir", str(tmp_path))
        assert _serve(server, *argv, "--result-filename", "r.json") == 5
    assert "NOT COMPLETE (server_died" in capsys.readouterr().out
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["results"]["status"] == "server_died"
    assert (
        kept["results"]["completed"] == 3
    )  # the sixth request was its last: a probe and a warm-up were first


def test_ctrl_c_ends_with_130_and_its_result_is_kept(tmp_path: Path) -> None:
    async def handler(request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        if len(server.bodies) < 6:
            return await stream(request, good_answer(body["max_tokens"], num_prompt_tokens=16))
        if len(server.bodies) == 6:
            signal_main()
        await server.closing.wait()
        return web.Response()

    def signal_main() -> None:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGINT)

    server = ScriptedServer(handler=handler)
    with threaded(server):
        argv = ("--max-concurrency", "1", "--save-result", "--result-dir", str(tmp_path))
        assert _serve(server, *argv, "--result-filename", "r.json") == 130
        server.closing.set()
    kept = json.loads((tmp_path / "r.json").read_text())
    assert kept["results"]["status"] == "interrupted"
    assert kept["results"]["completed"] == 3
    assert kept["results"]["failures"] == {"cancelled": 1}


def test_a_dead_server_ends_with_4_and_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with threaded(ScriptedServer()) as server:
        url = server.url
    assert main(["bench", "serve", "--url", url]) == 4
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith(f"penstock: no server answers at {url}/v1/models: ")
    assert told.err.count("\n") == 1


def test_a_model_that_is_not_there_ends_with_4(capsys: pytest.CaptureFixture[str]) -> None:
    with threaded(ScriptedServer()) as server:
        assert _serve(server, "--model", "nope") == 4
    assert capsys.readouterr().err == "penstock: the server has no model 'nope', it has tiny\n"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--url", "nonsense"), "base_url is 'nonsense'"),
        (("--random-input-len", "x"), "random_input_len is 'x'"),
        (("--goodput", "ttft"), "goodput is 'ttft'"),
        (("--request-rate", "-1"), "request_rate is -1"),
        (("--request-rate", "1", "--burst-size", "4"), "only bursts has one"),
        (("--percentile-metrics", "ttft,foo"), "percentile_metrics is 'ttft,foo'"),
        (("--metric-percentiles", "50,x"), "metric_percentiles is '50,x'"),
        (("--metric-percentiles", "101"), "metric_percentiles is '101'"),
        (("--extra-body", "[1]"), "extra_body is '[1]', it must be a JSON object"),
        (("--metadata", "word"), "metadata is 'word', it must be KEY=VALUE"),
        (("--random-token-ids", "5"), "random_token_ids is '5', it must be LOW:HIGH"),
        (("--dataset-name", "trace"), "name its file with --dataset-path"),
        (("--dataset-path", "x"), "dataset_path is x, it has no effect with dataset_name random"),
        (("--trace-speed", "2"), "trace_speed is 2.0, it has no effect"),
        (("--dataset-name", "trace", "--dataset-path", "x", "--random-prefix-len", "4"), "no effect with dataset_name trace"),
        (("--dataset-name", "trace", "--dataset-path", "x", "--request-rate", "4"), "a trace has its own times"),
        (("--dataset-name", "trace", "--dataset-path", "nothing.jsonl"), "nothing.jsonl cannot be read"),
        (("--num-prompts", "0"), "--num-prompts"),
        (("--nonsense",), "--nonsense"),
    ],
)  # fmt: skip
def test_a_wrong_flag_ends_with_2_and_one_line(
    argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "serve", *argv]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--loads", "2,1"), "rising"),
        (("--loads", "a"), "loads is 'a'"),
        (("--save-detailed",), "save_detailed is set"),
        (("--dataset-name", "trace", "--dataset-path", "x"), "a sweep sets the times itself"),
        (("--burst-size", "3"), "only bursts has one"),
        (("--arrivals", "constant"), "request_rate is inf, it must be finite"),
    ],
)
def test_a_wrong_flag_of_a_sweep_ends_with_2(
    argv: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "sweep", *argv]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1


def test_a_sweep_writes_its_points(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with threaded(ScriptedServer()) as server:
        code = main([
            "bench", "sweep", "--url", server.url, *SMALL, "--loads", "1,2", "--save-result",
            "--result-dir", str(tmp_path), "--result-filename", "s.json",
        ])  # fmt: skip
    assert code == 0
    kept = json.loads((tmp_path / "s.json").read_text())
    assert [point["load"] for point in kept["points"]] == [1.0, 2.0]
    assert "sweep over concurrency" in capsys.readouterr().out


def test_a_rate_sweep_offers_rates(tmp_path: Path) -> None:
    with threaded(ScriptedServer()) as server:
        code = main([
            "bench", "sweep", "--url", server.url, *SMALL, "--over", "rate", "--loads", "200,400", "--arrivals",
            "constant", "--save-result", "--result-dir", str(tmp_path), "--result-filename", "s.json",
        ])  # fmt: skip
    assert code == 0
    kept = json.loads((tmp_path / "s.json").read_text())
    assert kept["sweep"]["over"] == "rate"
    assert kept["workload"]["arrivals"] == "constant"


def test_flags_become_options() -> None:
    flags = bench_load.LoadFlags(
        target=bench_load.TargetFlags(
            endpoint="/v1/chat/completions", extra_body='{"top_k": 1}', ignore_eos=True
        ),
        prompts=bench_load.PromptFlags(random_input_len="10", random_range_ratio=0.5, seed=7),
        pace=bench_load.PaceFlags(request_rate=4.0, burstiness=0.5, max_concurrency=3),
        report=bench_load.ReportFlags(
            goodput=["itl:9"], percentile_metrics="itl", metric_percentiles="99,75"
        ),
    )
    options = bench_load.serve_options(flags)
    assert (options.target.route, options.target.body, options.target.ignore_eos) == (
        "chat",
        {"top_k": 1},
        True,
    )
    assert (str(options.recipe.input_lens), options.recipe.seed) == ("uniform:5:15", 7)
    assert (options.recipe.arrivals.kind, options.recipe.max_concurrency) == ("gamma", 3)
    assert (options.metrics, options.percentiles) == (("itl",), (75.0, 99.0))
    assert [str(slo) for slo in options.slos] == ["itl:9"]


def test_every_flag_has_its_sentence() -> None:
    """`--help` is the reference of these flags."""
    for made in (
        bench_load.TargetFlags,
        bench_load.PromptFlags,
        bench_load.PaceFlags,
        bench_load.ReportFlags,
    ):
        for name, annotation in made.__annotations__.items():
            (parameter,) = [
                word for word in annotation.__metadata__ if word.__class__.__name__ == "Parameter"
            ]
            assert parameter.help, name
            assert parameter.help.endswith("."), name


def test_the_load_half_never_imports_torch() -> None:
    import subprocess
    import sys

    code = "import sys, penstock.cli.bench_load, penstock.bench.plots; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_flag_is_in_the_guide() -> None:
    page = (Path(__file__).parents[3] / "docs/guide/benchmarking.md").read_text(encoding="utf-8")
    groups = (bench_load.TargetFlags, bench_load.PromptFlags, bench_load.PaceFlags, bench_load.ReportFlags)
    flags = {name.replace("_", "-") for group in groups for name in group.__annotations__}
    flags |= {"over", "loads", "min-gain", "min-good", "no-progress", "url"}
    flags -= {"progress"}  # told as --no-progress
    missing = [flag for flag in sorted(flags) if f"--{flag}" not in page]
    assert missing == []
