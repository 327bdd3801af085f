"""Prefill work of 64 requests that share a 512-token prompt, with and without the prefix tree.

The figure is the engine's own count of prompt tokens computed. Answers with and without must be equal.
"""

import random
import sys
import time

from benchmarks.report import arguments, finish
from penstock import LLM, SamplingParams

BAR = 5.0


def run(
    *, enable_prefix_caching: bool, prompts: list[list[int]], max_tokens: int
) -> tuple[int, float, list[list[int]]]:
    """Prompt tokens computed, seconds, and the answers."""
    with LLM(
        enable_prefix_caching=enable_prefix_caching, max_model_len=1024, kernels="reference", dtype="float32"
    ) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        start_s = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        elapsed_s = time.perf_counter() - start_s
        return llm.totals.num_prompt_tokens, elapsed_s, [output.outputs[0].token_ids for output in outputs]


def main() -> int:
    """Run it."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--num-requests", type=int, default=64)
    parser.add_argument("--shared", type=int, default=512)
    parser.add_argument("--own", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=8)
    options = parser.parse_args()
    if options.tiny:
        options.num_requests, options.shared, options.own = 8, 128, 8
    rng = random.Random(options.seed)
    shared = [rng.randrange(300, 3000) for _ in range(options.shared)]
    prompts = [
        shared + [rng.randrange(300, 3000) for _ in range(options.own)] for _ in range(options.num_requests)
    ]
    with_tree = run(enable_prefix_caching=True, prompts=prompts, max_tokens=options.max_tokens)
    without = run(enable_prefix_caching=False, prompts=prompts, max_tokens=options.max_tokens)
    ratio = without[0] / with_tree[0]
    same = with_tree[2] == without[2]
    return finish(
        "prefix_sharing",
        options=options,
        sizes={"num_requests": options.num_requests, "shared": options.shared, "own": options.own},
        results={
            "prompt_tokens_computed_with_tree": with_tree[0],
            "prompt_tokens_computed_without": without[0],
            "ratio": round(ratio, 2),
            "bar": BAR,
            "seconds_with_tree": round(with_tree[1], 2),
            "seconds_without": round(without[1], 2),
            "answers_equal": same,
        },
        ok=same and (ratio >= BAR or options.tiny),
    )


if __name__ == "__main__":
    sys.exit(main())
