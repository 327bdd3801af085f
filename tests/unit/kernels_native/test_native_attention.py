"""Native paged attention against float64, and the laws of masking and determinism."""

import random

import pytest
import torch

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.native_attention_case import (
    AttentionProblem,
    AttentionSpec,
    make_problem,
    run_problem,
    solve,
)

ISAS = _native.supported_isas()


def check(problem: AttentionProblem, *, isa: str, threads: int = 1) -> None:
    results = run_problem(problem, isa=isa, threads=threads)
    parts = zip(results, problem.queries, problem.keys, problem.values, strict=True)
    for result, query, keys, values in parts:
        answer = solve(problem.spec, query=query, keys=keys, values=values, isa=isa)
        worst = ((result.double() - answer.out).abs() / answer.bound).max() if len(query) else 0
        assert worst <= 1, (problem.spec, problem.lengths, float(worst))


def random_problem(seed: int, *, kv_format: str = "bf16") -> AttentionProblem:
    rng = random.Random(seed)
    num_kv_heads = rng.choice([1, 2, 3])
    spec = AttentionSpec(
        heads=(num_kv_heads * rng.choice([1, 2, 3, 4, 5, 6, 7, 8]), num_kv_heads),
        head_dim=rng.choice([32, 64, 80, 96, 128, 256]),
        block_size=rng.choice([16, 32, 48, 64]),
        kv_format=kv_format,
        window=rng.choice([0, 0, rng.randint(1, 300)]),
        softcap=rng.choice([0.0, 0.0, 5.0, 50.0]),
        scale=rng.choice([0.05, 0.125, 0.3]),
    )
    lengths = []
    for _ in range(rng.randint(1, 4)):
        new = rng.choice([1, 1, rng.randint(0, 3), rng.randint(1, 40)])
        lengths.append((new, new + rng.choice([0, rng.randint(0, 20), rng.randint(0, 600)])))
    return make_problem(spec, lengths=lengths, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("block", range(4))
def test_random_batches_equal_float64(isa: str, block: int) -> None:
    """Ragged lengths, chunks, windows, caps, ratios of heads; all that no query sees is NaN."""
    for seed in range(block * 10, block * 10 + 10):
        problem = random_problem(seed)
        if any(new for new, _ in problem.lengths):
            check(problem, isa=isa, threads=1 + seed % 2)
