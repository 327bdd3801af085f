"""Generated tokens per second: `LLM.generate` at concurrency 64 against `transformers.generate`, one by one.

Both run the same checkpoint in the same dtype with the same threads, greedy, a fixed number of tokens, in
turns inside one process. Results are checked: lengths, and how far the two agree on the same prompts.
"""

import random
import sys
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.report import arguments, finish, median
from penstock import LLM, SamplingParams
from penstock.cli.model_source import find_model

BAR = 15.0
OPENINGS = (
    "Once upon a time there was a", "The king said to his", "In the middle of the wood", "A little girl went",
    "The fox looked at the", "Long ago, in a far land,", "The old woman took the", "When the morning came,",
)  # fmt: skip
SUBJECTS = ("princess", "wolf", "soldier", "miller", "bird", "giant", "tailor", "prince")


def make_prompts(llm: LLM, *, count: int, seed: int) -> list[list[int]]:
    """Different token-id prompts of about ten tokens."""
    rng = random.Random(seed)
    texts = [f"{rng.choice(OPENINGS)} {rng.choice(SUBJECTS)} {i}" for i in range(count)]
    outputs = llm.generate(texts, SamplingParams(max_tokens=1), use_tqdm=False)
    return [output.prompt_token_ids for output in outputs]


def run_penstock(llm: LLM, prompts: list[list[int]], *, max_tokens: int) -> tuple[float, list[list[int]]]:
    """Tokens per second and the answers."""
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    start_s = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
    elapsed_s = time.perf_counter() - start_s
    answers = [output.outputs[0].token_ids for output in outputs]
    assert all(len(answer) == max_tokens for answer in answers), "every answer has its tokens"
    return len(prompts) * max_tokens / elapsed_s, answers


def run_transformers(
    model: Any, prompts: list[list[int]], *, max_tokens: int
) -> tuple[float, list[list[int]]]:
    """Tokens per second and the answers; one request after the other."""
    answers = []
    start_s = time.perf_counter()
    with torch.inference_mode():
        for ids in prompts:
            tokens = torch.tensor([ids])
            full = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                max_new_tokens=max_tokens,
                min_new_tokens=max_tokens,
                pad_token_id=0,
            )
            answers.append(full[0, len(ids) :].tolist())
    elapsed_s = time.perf_counter() - start_s
    assert all(len(answer) == max_tokens for answer in answers), "every answer has its tokens"
    return len(prompts) * max_tokens / elapsed_s, answers


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Mean length of the common prefix over the length; ties in bfloat16 end it early."""
    shares = []
    for one, other in zip(ours, theirs, strict=True):
        same = next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))
        shares.append(same / len(one))
    return sum(shares) / len(shares)


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--model", default=None)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--sequential", type=int, default=4, help="requests a round for transformers")
    options = parser.parse_args()
    if options.tiny:
        options.concurrency, options.max_tokens, options.sequential, options.rounds = 4, 8, 1, 1
    source = find_model(options.model)
    llm = LLM(options.model, max_num_seqs=options.concurrency, max_model_len=1024)
    model = AutoModelForCausalLM.from_pretrained(source.path, dtype=getattr(torch, llm.info.dtype)).eval()
    prompts = make_prompts(llm, count=options.concurrency, seed=options.seed)
    run_penstock(llm, prompts, max_tokens=8)
    run_transformers(model, prompts[:1], max_tokens=8)
    ours, theirs, agreed = [], [], []
    for _ in range(options.rounds):
        speed, answers = run_penstock(llm, prompts, max_tokens=options.max_tokens)
        ours.append(speed)
        speed, expected = run_transformers(
            model, prompts[: options.sequential], max_tokens=options.max_tokens
        )
        theirs.append(speed)
        agreed.append(agreement(answers[: options.sequential], expected))
    ratio = median(ours) / median(theirs)
    llm.close()
    return finish(
        "offline_vs_transformers",
        options=options,
        sizes={
            "model": source.root,
            "dtype": llm_dtype(model),
            "concurrency": options.concurrency,
            "max_tokens": options.max_tokens,
            "threads": torch.get_num_threads(),
        },
        results={
            "penstock_tokens_per_s": [round(v, 1) for v in ours],
            "transformers_tokens_per_s": [round(v, 1) for v in theirs],
            "ratio_of_medians": round(ratio, 2),
            "bar": BAR,
            "agreement_with_transformers": [round(v, 3) for v in agreed],
        },
        ok=(ratio >= BAR or options.tiny) and min(agreed) > 0.1,
    )


def llm_dtype(model: Any) -> str:
    """Dtype of the model that transformers runs."""
    return str(model.dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
