"""What adapters cost: 64 in one batch of 64, a thousand in turns, and one from its folder to a first token.

The model has the shape of Qwen2.5-0.5B, the adapters rank 16 on query, key, value and output. The bound of
the first: a decode step reads every adapter's matrices beside all that the base model's step reads, so it
takes longer by their bytes over the memory's bandwidth. Base and adapters take turns in one engine. The
thousand share one weights file on disk (hard links) and differ in their configs: each is a version of its own
in memory.
"""

import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from benchmarks.report import arguments, finish, median, percentiles
from penstock.bench.machine_limits import measure_limits
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, LoraConfig, LoraModule, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.lora.host import AdapterHost, LoadOrder
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES

SHAPE: Final = "qwen2.5-0.5b"
BATCH: Final = 64
RANK: Final = 16
TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj")
MIN_RATIO: Final = 0.7
MAX_LOAD_MS: Final = 100.0
PROMPT_TOKENS: Final = 8
TURN_TOKENS: Final = 2
"""Of an answer of the thousand: most of their time goes into changing adapters."""
NUM_FEW: Final = 84
NUM_BASE: Final = 250
"""Requests for the base whose pace the thousand are held against."""
MEMORY_BYTES: Final = 1 << 30


def write_weights(path: Path, config: dict[str, Any], *, seed: int) -> None:
    """An adapter's weights file for the shape, bfloat16."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    hidden, query = config["hidden_size"], config["num_attention_heads"] * head_dim
    kv = config["num_key_value_heads"] * head_dim
    sizes = {
        "q_proj": (hidden, query),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (query, hidden),
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (num_in, num_out) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{key}.lora_A.weight"] = (
                torch.randn(RANK, num_in, generator=generator) * 0.05
            ).bfloat16()
            tensors[f"{key}.lora_B.weight"] = (
                torch.randn(num_out, RANK, generator=generator) * 0.05
            ).bfloat16()
    save_file(tensors, path)


def write_adapters(folder: Path, model: Path, *, num: int, seed: int) -> list[Path]:
    """So many adapter folders; their configs differ in `lora_alpha`."""
    weights = folder / "weights.safetensors"
    write_weights(weights, json.loads((model / "config.json").read_text()), seed=seed)
    paths = []
    for idx in range(num):
        path = folder / f"adapter{idx:05d}"
        path.mkdir()
        os.link(weights, path / "adapter_model.safetensors")
        fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 16 + idx / 1000, "bias": "none"}
        config = {**fields, "target_modules": list(TARGETS)}
        (path / "adapter_config.json").write_text(json.dumps(config))
        paths.append(path)
    return paths


def host_of(core: EngineCore) -> AdapterHost:
    """The engine's adapters."""
    assert core.adapters is not None, "the engine was built with adapters"
    return core.adapters


def load(core: EngineCore, paths: Sequence[Path]) -> list[str]:
    """Load folders as an operator would, one after the other; their names."""
    host = host_of(core)
    for path in paths:
        host.begin_load(
            LoadOrder(question_id=0, module=LoraModule(name=path.name, path=str(path)), is_replacing=False)
        )
        outcomes = host.take_outcomes()
        while not outcomes:
            host.wait(1.0)
            host.poll()
            outcomes = host.take_outcomes()
        assert outcomes[0].error is None, outcomes[0].error
    return [path.name for path in paths]


def ask(core: EngineCore, name: str, *, request_id: str, num_tokens: int) -> None:
    """Queue one request."""
    seed = sum(map(ord, request_id))
    prompt = [300 + (seed * 7 + 3 * j) % 5000 for j in range(PROMPT_TOKENS)]
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens)
    core.add(
        EngineRequest(request_id=RequestId(request_id), prompt_token_ids=prompt, params=params, adapter=name)
    )


def decode_times(core: EngineCore, names: Sequence[str], *, num_steps: int, tag: str) -> list[float]:
    """Seconds of each decode step of one batch, a request for each name."""
    for idx, name in enumerate(names):
        ask(core, name, request_id=f"{tag}-{idx}", num_tokens=512)
    while any(report.num_generated_tokens < 2 for report in core.requests()):
        core.step()
    times = []
    for _ in range(num_steps):
        began_s = time.perf_counter()
        stats = core.step().stats
        times.append(time.perf_counter() - began_s)
        assert stats.num_generated_tokens == len(names), "every sequence gains a token"
    for idx in range(len(names)):
        core.abort(RequestId(f"{tag}-{idx}"))
    core.step()
    return times


def batch_of_64(core: EngineCore, names: list[str], *, rounds: int, num_steps: int) -> dict[str, Any]:
    """Base and 64 adapters in turns."""
    kinds: dict[str, list[str]] = {"base": [""] * BATCH, "adapters": names[:BATCH]}
    kinds["one adapter"] = [names[0]] * BATCH
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    ratios = []
    for turn in range(rounds):
        of_turn = {
            kind: decode_times(core, asked, num_steps=num_steps, tag=f"{kind}{turn}")
            for kind, asked in kinds.items()
        }
        for kind, values in of_turn.items():
            times[kind] += values
        ratios.append(median(of_turn["base"]) / median(of_turn["adapters"]))
    medians = {kind: median(values) for kind, values in times.items()}
    num_bytes = sum(report.num_bytes for report in host_of(core).reports() if report.name in names[:BATCH])
    bandwidth = measure_limits(num_threads=len(os.sched_getaffinity(0))).read_gb_per_s * 1e9
    return {
        "step_ms": {kind: round(value * 1e3, 2) for kind, value in medians.items()},
        "percentiles_ms": {kind: percentiles(values, scale=1e3) for kind, values in times.items()},
        "throughput_of_base": round(median(ratios), 3),
        "throughput_of_base_by_turn": [round(ratio, 3) for ratio in ratios],
        "adapter_bytes": num_bytes,
        "bandwidth_gb_s": round(bandwidth / 1e9, 1),
        "bound_extra_ms": round(num_bytes / bandwidth * 1e3, 2),
        "extra_ms": round((medians["adapters"] - medians["base"]) * 1e3, 2),
    }


def answer_all(core: EngineCore, names: Sequence[str], *, tag: str) -> tuple[float, int]:
    """Ask every name for a short answer, all queued at once; seconds, and the answers without an error."""
    began_s = time.perf_counter()
    for idx, name in enumerate(names):
        ask(core, name, request_id=f"{tag}-{idx}", num_tokens=TURN_TOKENS)
    num_good = 0
    while core.has_work:
        for delta in core.step().deltas:
            num_good += delta.is_last and delta.error is None
    return time.perf_counter() - began_s, num_good


def round_robin(core: EngineCore, names: list[str]) -> dict[str, Any]:
    """Every adapter once, and some requests for the base."""
    base_s, _ = answer_all(core, [""] * min(NUM_BASE, len(names)), tag="base")
    read_before = host_of(core).store.num_reads
    turns_s, num_good = answer_all(core, names, tag="turns")
    return {
        "adapters": len(names),
        "answered": num_good,
        "in_memory": len(host_of(core).store),
        "read_again": host_of(core).store.num_reads - read_before,
        "requests_per_s": round(len(names) / turns_s, 1),
        "base_requests_per_s": round(min(NUM_BASE, len(names)) / base_s, 1),
    }


def load_to_first_token(core: EngineCore, paths: Sequence[Path]) -> list[float]:
    """Seconds from the order to load a folder to the first token of its first request."""
    times = []
    for path in paths:
        began_s = time.perf_counter()
        (name,) = load(core, [path])
        ask(core, name, request_id=f"first-{name}", num_tokens=1)
        while core.has_work:
            core.step()
        times.append(time.perf_counter() - began_s)
    return times


def make_core(model: Path) -> EngineCore:
    """The engine over the model, with slots for a whole batch."""
    lora = LoraConfig(
        enable_lora=True,
        max_loras=BATCH,
        max_lora_rank=RANK,
        max_cpu_loras=256,
        lora_memory_bytes=MEMORY_BYTES,
    )
    limits = SchedulerConfig(max_num_seqs=BATCH, max_num_queued_reqs=4096)
    config = EngineConfig(
        model_path=str(model), max_model_len=1024, scheduler=limits, kv=KvConfig(num_blocks=4096), lora=lora
    )
    return build_core(config)


def note(what: str, value: object) -> None:
    """Progress, for whoever waits."""
    print(f"{what}: {value}", file=sys.stderr, flush=True)


def run(core: EngineCore, paths: list[Path], *, rounds: int, num_steps: int) -> dict[str, Any]:
    """All three."""
    num_fresh = min(20, len(paths) - BATCH)
    first_s = load_to_first_token(core, paths[-num_fresh:])
    note("load to first token", percentiles(first_s, scale=1e3))
    names = load(core, paths[:BATCH])
    batch = batch_of_64(core, names, rounds=rounds, num_steps=num_steps)
    note("batch", batch)
    if len(paths) <= NUM_FEW:
        return {"load_to_first_token_ms": percentiles(first_s, scale=1e3), "batch": batch}
    began_s = time.perf_counter()
    names += load(core, paths[BATCH:-num_fresh])
    note("seconds to load the rest", time.perf_counter() - began_s)
    return {
        "load_to_first_token_ms": percentiles(first_s, scale=1e3),
        "batch": batch,
        "round_robin": round_robin(core, names + [path.name for path in paths[-num_fresh:]]),
    }


def main() -> int:
    """All three; fails where a bar is missed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, help="a checkpoint of the shape; otherwise one is made")
    parser.add_argument(
        "--few", action="store_true", help="without the thousand in turns; writes lora_few.json"
    )
    options = parser.parse_args()
    num, num_steps = (66, 3) if options.tiny else (NUM_FEW if options.few else 1000, 6)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():  # as around the engine's loop
        model = options.model or make_checkpoint(Path(folder) / "model", SHAPES[SHAPE])
        adapters = Path(folder) / "adapters"
        adapters.mkdir()
        paths = write_adapters(adapters, model, num=num, seed=options.seed)
        core = make_core(model)
        results = run(core, paths, rounds=options.rounds, num_steps=num_steps)
    turns = results.get("round_robin", {"answered": num, "adapters": num})
    ok = (
        results["batch"]["throughput_of_base"] >= MIN_RATIO
        and results["load_to_first_token_ms"]["p50"] < MAX_LOAD_MS
        and turns["answered"] == turns["adapters"] == num
    )
    sizes = {"shape": SHAPE, "batch": BATCH, "rank": RANK, "targets": TARGETS, "prompt_tokens": PROMPT_TOKENS}
    return finish("lora_few" if options.few else "lora", options=options, sizes=sizes, results=results, ok=ok)


if __name__ == "__main__":
    sys.exit(main())
