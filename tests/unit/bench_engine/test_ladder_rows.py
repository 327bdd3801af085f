"""The ladder: what each rung is started with, and how its row is made."""

import pytest

from penstock.bench.client import RequestRecord
from penstock.bench.compare.figures import Observation
from penstock.bench.compare.scenarios import Draw
from penstock.bench.ladder.climb import (
    Climb,
    Crowd,
    Row,
    Yardstick,
    make_load,
    make_warmup,
    row_figures,
    with_speedups,
)
from penstock.bench.ladder.gauges import COMPUTED, OWNED, RUNNING, USED, Gauges, parse_metrics
from penstock.bench.ladder.report import draw_picture, make_table
from penstock.bench.ladder.rungs import RUNGS, Site, make_rung
from penstock.bench.machine_limits import MachineLimits
from penstock.bench.model_cost import ModelCost, read_model_cost
from penstock.bench.target import TargetError
from penstock.core.errors import CheckpointError
from penstock.models.embedded_model import embedded_path

CROWD = Crowd(
    num_users=4,
    requests_per_user=2,
    shared_tokens=8,
    prompt_low=2,
    prompt_high=4,
    output_low=3,
    output_high=5,
)
LIMITS = MachineLimits(
    read_gb_per_s=40.0, bf16_tflops=1e-3, int8_tops=2e-3, isa="avx2", method="torch", num_threads=2
)
YARDSTICK = Yardstick(cost=ModelCost(body_flops=100, head_flops=50), limits=LIMITS, price_per_hour=3.6)
BY_NAME = {rung.name: rung for rung in RUNGS}


def command(name: str, tmp_path) -> str:
    site = Site(
        model=tmp_path, num_users=50, max_model_len=1024, kv_contexts=12, static_batch_size=8,
        static_timeout_ms=100.0, num_threads=2, dtype="bfloat16", penstock_flags=("--isa", "avx2"),
        work_dir=tmp_path,
    )  # fmt: skip
    return make_rung(BY_NAME[name], site=site).facts["command"]


def test_contiguous_and_paged_have_the_same_bytes_of_kv(tmp_path):
    assert "--block-size 1024 --num-kv-blocks 12 " in command("contiguous", tmp_path)
    assert "--block-size 16 --num-kv-blocks 768 " in command("paged", tmp_path)


def test_each_rung_adds_one_idea(tmp_path):
    paged, prefix, chunked = (command(name, tmp_path) for name in ("paged", "prefix", "chunked"))
    assert "--no-enable-prefix-caching --no-enable-chunked-prefill" in paged
    assert " --enable-prefix-caching --no-enable-chunked-prefill" in prefix
    assert " --enable-prefix-caching --enable-chunked-prefill" in chunked
    assert "--quantization int8 --isa avx2" in command("int8", tmp_path)
    assert "--batch-size 1 " in command("naive", tmp_path)
    assert "--batch-size 8 --batch-timeout-ms 100.0" in command("static", tmp_path)


def test_all_users_ask_the_same_beginning():
    load = make_load(CROWD, draw=Draw(vocab_size=5000)).load
    assert (len(load.requests), load.max_concurrency) == (8, 4)
    assert len({request.prompt[:8] for request in load.requests}) == 1
    assert all(10 <= r.num_prompt_tokens <= 12 and 3 <= r.num_output_tokens <= 5 for r in load.requests)
    assert load == make_load(CROWD, draw=Draw(vocab_size=5000)).load


def seen(num_requests: int, *, duration_s: float) -> Observation:
    records = []
    for index in range(num_requests):
        made = RequestRecord(
            index=index, num_output_tokens_asked=5, start_s=0.0, num_prompt_tokens=10, num_output_tokens=5
        )
        made.pieces_s.extend([0.5, 1.0])
        made.last_s = 1.0
        records.append(made)
    return Observation(records=tuple(records), duration_s=duration_s)


def gauges() -> Gauges:
    samples = iter([{}, {OWNED: 200.0, USED: 50.0, COMPUTED: 40.0, RUNNING: 3.0}])
    last: dict[str, float] = {}

    def read() -> dict[str, float]:
        nonlocal last
        last = next(samples, last)
        return last

    with Gauges(read) as made:
        pass
    made.most_running = 3.0
    return made


def test_a_row_counts_what_the_model_computed():
    """8 requests in 2 s: 40 prompt and 40 answer tokens of 100 operations, 40 heads of 50, at 1e9 a second."""
    scenario = make_load(CROWD, draw=Draw(vocab_size=5000))
    found = row_figures(
        BY_NAME["paged"], seen(8, duration_s=2.0), scenario=scenario, gauges=gauges(), yardstick=YARDSTICK
    )
    assert found["requests_per_s"] == 4.0
    assert found["output_tokens_per_s"] == 20.0
    assert found["kv_efficiency"] == 0.25
    assert found["users_held"] == 3.0
    assert found["cost_per_million_tokens"] == pytest.approx(3.6 / 3600 / 20 * 1e6)
    fast = YARDSTICK.cost.flops(num_computed=40, num_generated=40)
    assert fast == 100 * 80 + 50 * 40
    assert found["compute_utilisation"] == pytest.approx(round(fast / 2.0 / 1e9, 4))


def test_speedups_are_over_the_lowest_rung_that_ran():
    rows = [
        Row(rung=BY_NAME["naive"], facts={}, error="no transformers"),
        Row(rung=BY_NAME["static"], facts={}, figures={"output_tokens_per_s": 10.0}),
        Row(rung=BY_NAME["paged"], facts={}, figures={"output_tokens_per_s": 35.0}),
    ]
    assert [(row.figures or {}).get("speedup") for row in with_speedups(rows)] == [None, 1.0, 3.5]


class Fallen:
    """A server that cannot start."""

    facts: dict[str, str] = {}  # noqa: RUF012 - never changed
    url = "http://127.0.0.1:9"

    def start(self):
        raise TargetError("no room")

    def stop(self):
        pass


def test_a_rung_that_fails_leaves_its_reason_and_the_climb_goes_on():
    lines, kept = [], []
    rows = Climb(
        RUNGS[:3],
        make=lambda _: Fallen(),
        load=make_load(CROWD, draw=Draw(vocab_size=5000)),
        warmup=make_warmup(draw=Draw(vocab_size=5000)),
        yardstick=YARDSTICK,
        tell=lines.append,
        keep=lambda so_far: kept.append(len(so_far)),
    ).run()
    assert [row.error for row in rows] == ["no room"] * 3
    assert kept == [1, 2, 3]
    assert lines[0] == "naive is out: no room"


def test_table_and_picture_of_rows(tmp_path):
    from rich.console import Console

    found = {
        "output_tokens_per_s": 10.0, "speedup": 2.0, "users_held": 4.0, "requests_per_s": 1.0,
        "compute_utilisation": 0.5, "e2el_p50_ms": 1500.0, "kv_efficiency": 0.9,
    }  # fmt: skip
    rows = [Row(rung=rung, facts={}, figures=found) for rung in RUNGS[:4]]
    console = Console(width=200, record=True)
    console.print(make_table(rows, num_users=50))
    text = console.export_text()
    assert "20 to 50x" in text
    assert "90%" in text
    draw_picture(rows, tmp_path / "x.png", subtitle="s")
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_metrics_are_summed_over_labels():
    text = '# HELP x y\nx{model="a"} 1\nx{model="b"} 2.5\ny 7\n'
    assert parse_metrics(text) == {"x": 3.5, "y": 7.0}


def test_the_cost_of_the_embedded_model_is_twice_its_matrices():
    cost = read_model_cost(embedded_path())
    assert 2 * 5_000_000 < cost.body_flops + cost.head_flops < 2 * 8_000_000


def test_a_broken_header_is_told(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_model_cost(tmp_path)
