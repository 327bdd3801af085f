"""What a decode step costs beside the model's own arithmetic: schedule, inputs, Python, sample, hand over.

A step of the whole engine is timed part by part; the time inside the two native programs (layers and head) is
taken off. The model has the shape of Qwen2.5-0.5B: 24 layers and a vocabulary of 151,936. Contexts are short:
long ones cost the programs, not the host. `hand over` encodes the output as for the API process.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import torch

from benchmarks.report import arguments, finish, median, percentiles
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.engine.runner.rank_group import LocalRank
from penstock.engine.wire import Output, encode
from penstock.models.recorded import RecordedModel
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES

BARS_MS: Final = {1: 1.0, 64: 3.0}
"""By batch size: what a step may cost beside the programs."""
PROMPT_TOKENS: Final = 32
SHAPE: Final = "qwen2.5-0.5b"
KINDS: Final = {
    "greedy": SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=512),
    "top-k, top-p": SamplingParams(temperature=0.8, top_k=50, top_p=0.95, ignore_eos=True, max_tokens=512),
}

Result = TypeVar("Result")


class PartTimes:
    """Seconds of the parts of each step."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = {}

    def timed(self, name: str, work: Callable[[], Result]) -> Result:
        """Do a part and note its time."""
        began_s = time.perf_counter()
        result = work()
        self.note(name, time.perf_counter() - began_s)
        return result

    def note(self, name: str, seconds: float) -> None:
        """Add one step's time of a part."""
        self.steps.setdefault(name, []).append(seconds)


def timed_step(core: EngineCore, model: RecordedModel, times: PartTimes) -> None:
    """One step as `EngineLoop` makes it."""
    before_s, began_s = model.program_seconds, time.perf_counter()
    plan = times.timed("schedule", core.scheduler.schedule)
    handle = times.timed("launch", lambda: core.ranks.launch(plan))
    result = times.timed("sample", lambda: core.ranks.collect(handle))
    output = times.timed("apply", lambda: core.scheduler.apply(plan, result))
    times.timed("hand over", lambda: encode(Output(output.deltas, output.stats)))
    programs_s = model.program_seconds - before_s
    times.steps["launch"][-1] -= programs_s
    times.note("programs", programs_s)
    times.note("overhead", time.perf_counter() - began_s - programs_s)


def fill(core: EngineCore, *, batch_size: int, params: SamplingParams) -> None:
    """Queue requests and step until all decode."""
    for i in range(batch_size):
        prompt = [300 + (7 * i + 3 * j) % 5000 for j in range(PROMPT_TOKENS)]
        core.add(EngineRequest(request_id=RequestId(f"r{i}"), prompt_token_ids=prompt, params=params))
    while any(report.num_generated_tokens < 2 for report in core.requests()):
        core.step()


def measure(core: EngineCore, *, batch_size: int, params: SamplingParams, num_steps: int) -> dict[str, Any]:
    """Medians of the parts in ms."""
    assert isinstance(core.ranks, LocalRank)
    model = core.ranks.runner.model
    assert isinstance(model, RecordedModel), "the model was not recorded"
    fill(core, batch_size=batch_size, params=params)
    times = PartTimes()
    for _ in range(num_steps):
        timed_step(core, model, times)
    for i in range(batch_size):
        core.abort(RequestId(f"r{i}"))
    core.step()
    parts = {f"{name}_ms": round(median(values) * 1e3, 3) for name, values in times.steps.items()}
    return {**parts, "overhead_percentiles_ms": percentiles(times.steps["overhead"], scale=1e3, digits=3)}


def make_core(folder: Path) -> EngineCore:
    """The engine over a checkpoint of that shape."""
    limits = SchedulerConfig(max_num_seqs=max(BARS_MS))
    kv = KvConfig(num_blocks=4096)
    return build_core(EngineConfig(model_path=str(folder), max_model_len=1024, scheduler=limits, kv=kv))


def main() -> int:
    """Every batch size and kind of sampling; fails where a bar is missed."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, help="a checkpoint of the shape; otherwise one is made")
    options = parser.parse_args()
    num_steps = 5 if options.tiny else 100
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():  # as around the engine's loop
        core = make_core(options.model or make_checkpoint(Path(folder), SHAPES[SHAPE]))
        results = {
            f"batch {size}, {kind}": measure(core, batch_size=size, params=params, num_steps=num_steps)
            for size in BARS_MS
            for kind, params in KINDS.items()
        }
    ok = all(
        results[f"batch {size}, {kind}"]["overhead_ms"] < bar
        for size, bar in BARS_MS.items()
        for kind in KINDS
    )
    sizes = {"shape": SHAPE, "steps": num_steps, "prompt_tokens": PROMPT_TOKENS, "bars_ms": BARS_MS}
    return finish("step_overhead", options=options, sizes=sizes, results=results, ok=ok)


if __name__ == "__main__":
    sys.exit(main())
