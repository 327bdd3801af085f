"""`offline` and `kernels` on tiny sizes, and what their commands refuse."""

import json
from functools import partial

import pytest
import torch

from penstock.bench.kernel_bench import OPERATIONS, SHAPES, Case, Measured, make_cases, measure
from penstock.bench.machine_limits import MachineLimits, measure_limits
from penstock.bench.offline import OfflineSizes, medians, run_offline
from penstock.cli.main import main
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.kernels.cpu.extension import usable_isas, why_missing
from penstock.kernels.registry import select_kernels
from penstock.models.embedded_model import embedded_path

ISAS = [] if why_missing() else usable_isas()
LIMITS = MachineLimits(
    read_gb_per_s=10.0, bf16_tflops=1.0, int8_tops=2.0, isa="avx2", method="torch", num_threads=1
)


def test_offline_counts_every_token_and_tells_prefill_from_decode():
    config = EngineConfig(
        model_path=str(embedded_path()),
        num_threads=1,
        max_model_len=32,
        warmup=False,
        scheduler=SchedulerConfig(max_num_seqs=2, enable_prefix_caching=False),
        kv=KvConfig(num_blocks=16),
    )
    sizes = OfflineSizes(prompt_tokens=8, output_tokens=4, batch_sizes=(1, 2), rounds=2, seed=0)
    lines: list[str] = []
    rows = list(run_offline(build_core(config), sizes, tell=lines.append))
    assert [(row["round"], row["batch_size"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["decode_steps"] == 3 for row in rows), "the first token comes with the prompt"
    assert all(row["prefill_tokens_per_s"] > 0 and row["step_p99_ms"] > 0 for row in rows)
    assert [row["batch_size"] for row in medians(rows)] == [1, 2]
    assert len(lines) == 4


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_every_operation_runs_on_every_home(name):
    home = select_kernels(name, device="cpu", dtype=torch.bfloat16)
    cases = make_cases(
        home,
        SHAPES["tiny"],
        operations=OPERATIONS,
        formats=("bf16", "int8", "int4"),
        rows=(1, 3),
        cold_bytes=1,
    )
    found = [measure(home, case, seconds=0.0) for case in cases]
    assert len({each.case.operation for each in found}) == 5 * 3 + 4 + 2 * 2
    assert all(each.median_s >= each.least_s > 0 for each in found)


@pytest.mark.skipif("amx_emulated" not in ISAS, reason="tiles are emulated with AVX-512")
def test_kernels_accepts_the_emulated_tiles(tmp_path, monkeypatch):
    little = partial(measure_limits, read_bytes=4 << 20)  # not the gigabyte that a figure needs
    monkeypatch.setattr("penstock.cli.bench_engine.measure_limits", little)
    path = tmp_path / "kernels.json"
    argv = [
        "kernels",
        "--shapes",
        "tiny",
        "--operations",
        "norm,attention",
        "--formats",
        "int8",
        "--rows",
        "1",
    ]
    argv += ["--isa", "amx_emulated", "--seconds", "0.001", "--num-threads", "1", "--output", str(path)]
    assert main(["bench", *argv]) == 0
    record = json.loads(path.read_text())
    assert record["limits"]["isa"] == "amx_emulated"
    assert all(row["median_us"] > 0 for row in record["shapes"]["tiny"])


@pytest.mark.parametrize(
    ("num_bytes", "num_operations", "peak", "bound", "share"),
    [
        (1e9, 1e9, "bf16", "bandwidth", 0.5),  # 0.1 s at 10 GB/s, taken 0.2 s
        (1e6, 1e11, "bf16", "multiply", 0.5),  # 0.1 s at 1 T/s
        (1e6, 1e11, "int4", "multiply", 0.25),  # int4 multiplies int8, at 2 T/s
    ],
)
def test_the_share_is_the_larger_bound_over_the_time(num_bytes, num_operations, peak, bound, share):
    case = Case(
        operation="x",
        size="1",
        num_bytes=num_bytes,
        num_operations=num_operations,
        peak=peak,
        calls=(object, object),
        rows=1,
    )
    row = Measured(case=case, median_s=0.2, least_s=0.1).row(LIMITS)
    assert (row["bound"], row["share"]) == (bound, share)


def test_limits_are_measured_and_say_how():
    limits = measure_limits(num_threads=1, read_bytes=4 << 20)
    assert min(limits.read_gb_per_s, limits.bf16_tflops, limits.int8_tops) > 0
    assert limits.method in {"native probes", "torch"}
    assert limits.record()["num_threads"] == 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["compare", "--workload", "mixt"], ["workload", "'mixt'", "mixed"]),
        (["compare", "--peers", "x"], ["peers", "'x'", "vllm"]),
        (["compare", "--precision", "fp8"], ["precision", "'fp8'", "int4"]),
        (["compare", "--attach", "vllm"], ["attach", "NAME=URL"]),
        (["compare", "--attach", "vllm=http://127.0.0.1:9", "--precision", "int8,int4"], ["one with attach"]),
        (["compare", "/does/not/exist"], ["/does/not/exist"]),
        (["peer", "vllm", "--peers-dir", "/nowhere"], ["vllm is not installed", "make bench-peers"]),
        (["ladder", "--rungs", "top"], ["rungs", "'top'", "paged"]),
        (["ladder", "--output-tokens", "9:2"], ["output_tokens", "'9:2'", "LOW:HIGH"]),
        (["ladder", "--max-model-len", "64"], ["max_model_len", "320"]),
        (["offline", "--batch-sizes", "1,x"], ["batch_sizes", "'1,x'"]),
        (["kernels", "--shapes", "gpt5"], ["shapes", "'gpt5'", "llama-3.2-1b"]),
    ],
)
def test_wrong_options_are_one_line_and_an_exit_code(argv, words, capsys):
    assert main(["bench", *argv]) != 0
    told = capsys.readouterr().err.strip()
    assert len(told.splitlines()) == 1
    assert all(word in told for word in words), told


def test_a_comparison_without_peers_says_so_and_keeps_ours(tmp_path, capsys):
    """The whole command with the embedded model: its server, its client, its record."""
    path = tmp_path / "out.json"
    argv = ["compare", "--scale", "0.05", "--rounds", "1", "--peers", "vllm", "--peers-dir", str(tmp_path)]
    assert main(["bench", *argv, "--num-threads", "1", "--output", str(path)]) == 1
    record = json.loads(path.read_text())
    ours, theirs = record["contenders"]
    assert ours["rounds"]["single"][0]["num_failed"] == 0
    assert "not installed" in theirs["error"]
    assert "decode_tokens_per_s" in capsys.readouterr().out
