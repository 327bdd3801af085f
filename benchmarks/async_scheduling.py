"""What one step of asynchrony gains, or costs.

Two engines over one checkpoint, one of which plans and launches each step before the outcome of the last is
known, answer the same greedy requests in turns; both must say the same tokens.

The bound: what the host does between two steps is all that there is to hide. Where the device computes by
itself that is the gain, in parts of a step; on a CPU the host's work takes a core from the kernels for as
long, and they wait for each other at every operation, so that nothing can be gained unless cores are idle.
"""

import sys
import time
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from benchmarks.report import arguments, finish, median
from penstock.core.ids import RequestId
from penstock.core.params import SamplingParams
from penstock.core.tokens import EngineRequest
from penstock.engine.build import build_core
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig
from penstock.engine.core import EngineCore
from penstock.models.embedded_model import embedded_path

PROMPT_TOKENS: Final = 64


class Timed(NamedTuple):
    """One batch from its first decode to its last."""

    tokens_per_s: float
    host_time_ms: float
    """Median over the steps of what no computation hides."""
    answers: dict[str, list[int]]


def make_core(model: Path, *, quantization: str, batch: int, num_tokens: int, is_async: bool) -> EngineCore:
    """The engine over a checkpoint."""
    return build_core(
        EngineConfig(
            model_path=str(model),
            quantization=quantization,
            max_model_len=num_tokens,
            scheduler=SchedulerConfig(
                max_num_seqs=batch, async_scheduling=is_async, enable_prefix_caching=False
            ),
            kv=KvConfig(num_blocks=batch * (num_tokens // 16 + 2)),
        )
    )


def timed_batch(core: EngineCore, *, batch: int, num_outputs: int, seed: int) -> Timed:
    """Greedy answers of one length, timed while all of them run."""
    params = SamplingParams(temperature=0.0, max_tokens=num_outputs, ignore_eos=True)
    for idx in range(batch):
        prompt = [300 + (7 * idx + 3 * place + seed) % 3000 for place in range(PROMPT_TOKENS)]
        core.add(EngineRequest(request_id=RequestId(str(idx)), prompt_token_ids=prompt, params=params))
    answers: dict[str, list[int]] = {str(idx): [] for idx in range(batch)}
    host_times_s: list[float] = []
    began_s, num_at_start = 0.0, 0
    while core.has_work:
        output = core.step()
        for delta in output.deltas:
            answers[delta.request_id] += delta.token_ids
        if began_s:
            host_times_s.append(output.stats.host_time_s)
        elif all(answers.values()):
            began_s, num_at_start = time.perf_counter(), sum(map(len, answers.values()))
    num_tokens = sum(map(len, answers.values())) - num_at_start
    rate = num_tokens / (time.perf_counter() - began_s)
    return Timed(rate, median(host_times_s) * 1e3, answers)


def compare(cores: dict[bool, EngineCore], *, batch: int, num_outputs: int, rounds: int) -> dict[str, Any]:
    """Both engines in turns; who begins changes from round to round."""
    seen: dict[bool, list[Timed]] = {False: [], True: []}
    for round_idx in range(rounds):
        for is_async in (False, True) if round_idx % 2 else (True, False):
            timed = timed_batch(cores[is_async], batch=batch, num_outputs=num_outputs, seed=round_idx)
            seen[is_async].append(timed)
    pairs = list(zip(seen[False], seen[True], strict=True))
    return {
        "decode_tokens_per_s": {
            name: round(median([timed.tokens_per_s for timed in seen[is_async]]), 1)
            for name, is_async in (("without", False), ("with", True))
        },
        "host_time_ms": {
            name: round(median([timed.host_time_ms for timed in seen[is_async]]), 3)
            for name, is_async in (("without", False), ("with", True))
        },
        "median_of_ratios": round(median([b.tokens_per_s / a.tokens_per_s for a, b in pairs]), 4),
        "same_tokens": all(a.answers == b.answers for a, b in pairs),
    }


def main() -> int:
    """Each batch size; the exit code says whether the tokens were the same."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", type=Path, default=embedded_path(), help="checkpoint")
    parser.add_argument("--quantization", default="none")
    options = parser.parse_args()
    batches, num_outputs = ((2,), 8) if options.tiny else ((1, 8, 32), 64)
    rounds = 1 if options.tiny else options.rounds
    with torch.inference_mode():  # as around the engine's loop
        cores = {
            is_async: make_core(
                options.model,
                quantization=options.quantization,
                batch=max(batches),
                num_tokens=PROMPT_TOKENS + num_outputs,
                is_async=is_async,
            )
            for is_async in (False, True)
        }
        compare(cores, batch=batches[0], num_outputs=8, rounds=1)  # warms both
        results = {
            str(batch): compare(cores, batch=batch, num_outputs=num_outputs, rounds=rounds)
            for batch in batches
        }
    info = cores[True].info
    sizes = {
        "prompt_tokens": PROMPT_TOKENS,
        "output_tokens": num_outputs,
        "rounds": rounds,
        "parameters": info.num_parameters,
        "device": info.device,
        "kernels": info.kernels,
        "quantization": info.quantization,
        "num_threads": info.num_threads,
    }
    ok = all(each["same_tokens"] for each in results.values())
    return finish("async_scheduling", options=options, sizes=sizes, results=results, ok=ok)


if __name__ == "__main__":
    sys.exit(main())
