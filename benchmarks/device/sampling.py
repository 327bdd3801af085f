"""Draws on a CUDA device, each kind beside the bytes it has to read.

The bound of a case is its passes over the logits, as `penstock/kernels/triton/sampling` counts them, over the
copy bandwidth measured just before; copies of the logits go round, so that the first pass is not out of the
cache. A case replays one recorded graph of its launches. Before that its tokens are compared with those that
numpy draws of the same numbers: more than one row in a hundred that differs fails the run (a uniform number
at a border may round either way). Run by `python -m benchmarks.device sampling`, or alone:
`python -m benchmarks.device.sampling`.
"""

import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch

from benchmarks.device.dense import Bench, Case, ceilings, make_parser, measure, run_and_write
from penstock.core.ids import SequenceId
from penstock.core.params import SamplingParams
from penstock.engine.sampling.sampler import Sampler
from penstock.engine.sampling.triton_sampler import TritonSampler
from penstock.engine.scheduler.plan import NewSequence, SampledToken, SampleSpec
from penstock.kernels.triton.sampling import draw_tokens

VOCABS: Final = (128_256, 151_936)
BATCHES: Final = (1, 8, 64, 256)
HISTORY: Final = 512
"""Tokens of an answer that penalties count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Draws of one kind."""

    name: str
    params: Mapping[str, Any]
    passes: float
    """Over float32 logits, writes counted like reads."""
    spread: float = 3.0
    """Standard deviation of the logits; the smaller, the wider the nucleus."""


KINDS: Final = (
    Kind(name="greedy", params={"temperature": 0.0}, passes=1),
    Kind(name="plain", params={}, passes=1),
    Kind(name="top_k 50, top_p 0.9", params={"top_k": 50, "top_p": 0.9}, passes=1),
    Kind(name="top_p 0.9", params={"top_p": 0.9, "temperature": 0.5}, passes=1),
    Kind(name="min_p 0.05", params={"min_p": 0.05}, passes=2),
    Kind(name="logprobs 5", params={"logprobs": 5}, passes=2),
    Kind(
        name="penalties and a bias",
        params={"repetition_penalty": 1.1, "frequency_penalty": 0.1, "logit_bias": {3: -1.0}},
        passes=4,
    ),
    Kind(name="top_p 0.9 of a flat row", params={"top_p": 0.9}, passes=2, spread=0.5),
)


def _case(bench: Bench, kind: Kind, *, vocab: int, batch: int) -> Case:
    vocab, batch = (300, 2) if bench.is_dry else (vocab, batch)
    number = bench.copies(batch * vocab * 4)
    logits = [
        torch.randn(batch, vocab, device=bench.device, dtype=torch.float32).mul_(kind.spread)
        for _ in range(number)
    ]
    seq_ids = [SequenceId(i) for i in range(batch)]
    sampler = Sampler()
    sampler.add(
        NewSequence(seq_id=i, params=SamplingParams(**kind.params), seed=i, prompt_token_ids=[])
        for i in seq_ids
    )
    sampler.commit(SampledToken(i, (17 * j + i) % vocab, None) for i in seq_ids for j in range(HISTORY))
    states = [sampler.state(i) for i in seq_ids]
    device_sampler = TritonSampler()
    request = device_sampler.request(
        logits[0], rows=list(range(batch)), states=states, output_idxs=[HISTORY] * batch, masks=None
    )
    wanted = sampler.sample(logits[0].cpu().numpy(), specs=[SampleSpec(i, HISTORY) for i in seq_ids])
    found = draw_tokens(logits[0], request)[:, 0].tolist()
    differing = sum(
        getattr(want, "token_id", None) != token for want, token in zip(wanted, found, strict=True)
    )
    return Case(
        name=f"{kind.name}, {vocab} tokens, {batch} rows",
        calls=[lambda each=each: draw_tokens(each, request) for each in logits],  # type: ignore[misc]  # bound early
        num_bytes=kind.passes * logits[0].nbytes,
        num_flops=0.0,
        error=max(0.0, differing - 1.0) / batch if batch > 1 else float(differing),
    )


def cases(bench: Bench) -> Iterator[tuple[Kind, int, int]]:
    """All, the weightiest first."""
    for vocab in VOCABS[-1:] if bench.is_dry else VOCABS:
        for batch in BATCHES[:1] if bench.is_dry else BATCHES:
            for kind in KINDS:
                yield kind, vocab, batch


def run(bench: Bench, *, limit_s: float) -> dict[str, Any]:
    """Measure until the time is up."""
    began_s, rows, left_out = time.monotonic(), [], 0
    bandwidth, peak = ceilings(bench)
    print(f"copy {bandwidth / 1e12:.2f} TB/s")
    for kind, vocab, batch in cases(bench):
        if time.monotonic() - began_s > limit_s:
            left_out += 1
            continue
        case = _case(bench, kind, vocab=vocab, batch=batch)
        row = measure(bench, case, bandwidth=bandwidth, peak=peak)
        row.pop("tflop_per_s")
        rows.append(row)
        word = "" if row["is_right"] else f"  WRONG, error {row['error']}"
        print(f"{row['name']:48} {row['us']:10.1f} us  fraction {row['fraction']:6.3f}{word}", flush=True)
    return {"copy_bytes_per_s": bandwidth, "rows": rows, "left_out": left_out}


def main() -> int:
    """Measure, print, write OUT/sampling_kernels.json."""
    options = make_parser("sampling", doc=__doc__, limit_s=100.0).parse_args()
    found = run_and_write("sampling", options, measured=lambda bench: run(bench, limit_s=options.limit_s))
    return 0 if all(row["is_right"] for row in found["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
