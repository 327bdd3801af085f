"""32 mixed requests: one continuous batch here against 8 static batches of 4 through `transformers.generate`.

A static batch is padded to its longest prompt and runs until its longest answer is done; a request counts
only the tokens it asked for. Same checkpoint, dtype and threads, in turns inside one process; random weights
of the Qwen2.5-0.5B shape, made by `tools/make_checkpoint`, so that nothing is downloaded.
"""

import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import arguments, finish, median
from penstock import LLM, SamplingParams
from tools.make_checkpoint.checkpoint import make_checkpoint
from tools.make_checkpoint.shapes import SHAPES

BAR = 2.0
SHAPE = "qwen2.5-0.5b"


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One request."""

    prompt: list[int]
    max_tokens: int


def make_jobs(*, count: int, longest_prompt: int, longest_answer: int, seed: int) -> list[Job]:
    """Prompts of 32 and more tokens, answers of 16 and more, uniformly mixed."""
    rng = random.Random(seed)
    return [
        Job(
            prompt=[rng.randrange(1000, 100_000) for _ in range(rng.randint(32, longest_prompt))],
            max_tokens=rng.randint(16, longest_answer),
        )
        for _ in range(count)
    ]


def run_continuous(llm: LLM, jobs: list[Job]) -> float:
    """Seconds for all."""
    params = [SamplingParams(temperature=0.0, max_tokens=job.max_tokens, ignore_eos=True) for job in jobs]
    start_s = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": job.prompt} for job in jobs], params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start_s
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == [job.max_tokens for job in jobs], "every answer has its tokens"
    return elapsed_s


def _static_batch(model: Any, jobs: list[Job]) -> None:
    width = max(len(job.prompt) for job in jobs)
    tokens = torch.tensor([[0] * (width - len(job.prompt)) + job.prompt for job in jobs])
    mask = torch.tensor([[0] * (width - len(job.prompt)) + [1] * len(job.prompt) for job in jobs])
    longest = max(job.max_tokens for job in jobs)
    full = model.generate(
        tokens,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=longest,
        min_new_tokens=longest,
        pad_token_id=0,
    )
    assert full.shape == (len(jobs), width + longest), "every answer has its tokens"


def run_static(model: Any, jobs: list[Job], *, batch: int) -> float:
    """Seconds for all, batch after batch, in the order of arrival."""
    start_s = time.perf_counter()
    with torch.inference_mode():
        for first in range(0, len(jobs), batch):
            _static_batch(model, jobs[first : first + batch])
    return time.perf_counter() - start_s


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--model", type=Path, default=None, help="checkpoint of the shape; otherwise made here"
    )
    parser.add_argument("--num-requests", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--longest-prompt", type=int, default=512)
    parser.add_argument("--longest-answer", type=int, default=256)
    parser.set_defaults(rounds=1)
    options = parser.parse_args()
    if options.tiny:
        options.num_requests, options.longest_prompt, options.longest_answer = 4, 40, 20
    with tempfile.TemporaryDirectory() as folder:
        path = options.model
        if path is None:
            path = Path(folder) / SHAPE
            make_checkpoint(path, SHAPES[SHAPE], dtype="bfloat16", seed=options.seed)
        return _measure(path, options)


def _measure(path: Path, options: Any) -> int:
    jobs = make_jobs(
        count=options.num_requests,
        longest_prompt=options.longest_prompt,
        longest_answer=options.longest_answer,
        seed=options.seed,
    )
    llm = LLM(path, max_num_seqs=options.num_requests, max_model_len=1024)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    short = [Job(prompt=job.prompt[:32], max_tokens=4) for job in jobs[:4]]
    run_continuous(llm, short)
    run_static(model, short, batch=options.batch)
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(run_continuous(llm, jobs))
        theirs.append(run_static(model, jobs, batch=options.batch))
    num_tokens = sum(job.max_tokens for job in jobs)
    ratio = median(theirs) / median(ours)
    results = {
        "continuous_s": [round(v, 2) for v in ours],
        "static_s": [round(v, 2) for v in theirs],
        "continuous_tokens_per_s": round(num_tokens / median(ours), 1),
        "static_tokens_per_s": round(num_tokens / median(theirs), 1),
        "ratio_of_medians": round(ratio, 2),
        "bar": BAR,
    }
    sizes = {
        "parameters": llm.info.num_parameters,
        "dtype": llm.info.dtype,
        "num_requests": options.num_requests,
        "prompt_tokens": sum(len(job.prompt) for job in jobs),
        "answer_tokens": num_tokens,
        "static_batch": options.batch,
        "threads": torch.get_num_threads(),
    }
    llm.close()
    ok = ratio >= BAR or options.tiny
    return finish("static_batch_vs_continuous", options=options, sizes=sizes, results=results, ok=ok)


if __name__ == "__main__":
    sys.exit(main())
