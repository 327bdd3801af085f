"""Where the time of a decode step goes: each kind of operation, the programs together, and the host.

The whole step as the engine makes it and the two native programs in it, with waiting threads reading ahead
and without, in turns; then the mean time of each kind of operation inside them (its barrier included).
Operations of one kind at different places have different sizes, so a kind is named by what comes before it.
All are beside the time that reading the weights takes at the read bandwidth of the same run.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks.report import arguments, finish, median
from penstock.bench.machine_limits import measure_limits
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.runner.rank_group import LocalRank
from penstock.models.recorded import RecordedModel

PRECISIONS: Final = ("none", "int8", "int4")
TURN: Final = 5
"""Steps in a row of one kind, before those of the other: short, since the machine's bandwidth moves."""


def make_core(folder: Path, *, quantization: str, batch_size: int, num_tokens: int) -> EngineCore:
    """The engine over a checkpoint."""
    return build_core(
        EngineConfig(
            model_path=str(folder),
            quantization=quantization,
            max_model_len=num_tokens,
            scheduler=SchedulerConfig(max_num_seqs=batch_size),
            kv=KvConfig(num_blocks=batch_size * (num_tokens // 16 + 2)),
        )
    )


def fill(core: EngineCore, *, batch_size: int, prompt_tokens: int, num_tokens: int) -> None:
    """Queue requests and step until all decode."""
    params = SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_tokens - prompt_tokens)
    for i in range(batch_size):
        prompt = [300 + (7 * i + 3 * j) % 5000 for j in range(prompt_tokens)]
        core.add(EngineRequest(request_id=RequestId(f"r{i}"), prompt_token_ids=prompt, params=params))
    while any(report.num_generated_tokens < 2 for report in core.requests()):
        core.step()


def kinds(names: list[str]) -> list[str]:
    """`linear after rms_norm`, one for each operation; a quantization is not what something comes after."""
    found, before = [], "-"
    for name in names:
        found.append(f"{name} after {before}")
        before = before if name == "quantize" else name
    return found


def timed_steps(core: EngineCore, model: RecordedModel, *, num_steps: int) -> dict[str, list[float]]:
    """Seconds of whole steps and of their programs, with waiting threads reading ahead or not, in turns."""
    seconds: dict[str, list[float]] = defaultdict(list)
    for i in range(2 * num_steps):
        reads_ahead = i // TURN % 2 == 0
        for program in model.programs:
            program.set_reads_ahead(reads_ahead)
        before_s, began_s = model.program_seconds, time.perf_counter()
        core.step()
        wall_s = time.perf_counter() - began_s
        if i % TURN:  # the first of a turn still has the other kind before it
            kind = "" if reads_ahead else "_without_reading_ahead"
            seconds[f"step{kind}"].append(wall_s)
            seconds[f"programs{kind}"].append(model.program_seconds - before_s)
    for program in model.programs:
        program.set_reads_ahead(True)
    return seconds


def profile(core: EngineCore, *, num_steps: int, weight_s: float) -> dict[str, Any]:
    """Medians of whole steps in ms, and means of each kind of operation in us."""
    assert isinstance(core.ranks, LocalRank)
    model = core.ranks.runner.model
    assert isinstance(model, RecordedModel), "the model was not recorded"
    medians_s = {name: median(each) for name, each in timed_steps(core, model, num_steps=num_steps).items()}
    with model.profiling() as seconds:
        for _ in range(num_steps):
            core.step()
    totals: dict[str, float] = defaultdict(float)
    for program, spent in zip(model.programs, seconds, strict=True):
        for kind, second in zip(kinds(program.op_names), spent, strict=True):
            totals[kind] += second / num_steps
    ranked = sorted(totals.items(), key=lambda item: -item[1])
    return {
        "weights_ms": round(weight_s * 1e3, 3),
        **{f"{name}_ms": round(each * 1e3, 3) for name, each in medians_s.items()},
        **{f"{name}_of_bandwidth": round(weight_s / each, 3) for name, each in medians_s.items()},
        "operations_us": {kind: round(second * 1e6, 1) for kind, second in ranked},
    }


def main() -> int:
    """Each precision."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    options = parser.parse_args()
    num_steps = 2 * TURN if options.tiny else 20 * TURN
    num_tokens = options.prompt_tokens + 4 * num_steps + 32
    results: dict[str, Any] = {}
    limits = measure_limits(num_threads=torch.get_num_threads())
    with torch.inference_mode():  # as around the engine's loop
        for precision in options.precisions:
            core = make_core(
                options.model, quantization=precision, batch_size=options.batch_size, num_tokens=num_tokens
            )
            fill(
                core,
                batch_size=options.batch_size,
                prompt_tokens=options.prompt_tokens,
                num_tokens=num_tokens,
            )
            weight_s = core.info.weights_bytes / limits.read_gb_per_s / 1e9
            results[precision] = profile(core, num_steps=num_steps, weight_s=weight_s)
            del core
    sizes = {
        "batch_size": options.batch_size,
        "prompt_tokens": options.prompt_tokens,
        "steps": num_steps,
        "limits": limits.record(),
    }
    return finish("step_profile", options=options, sizes=sizes, results=results, ok=True)


if __name__ == "__main__":
    sys.exit(main())
