"""A row of attention is the same bits whatever else the step computes, however it is cut, by how many threads."""

import pytest
import torch
from torch import Tensor

from penstock.kernels.cpu import _native
from tests.unit.kernels_native.native_attention_case import (
    AttentionProblem,
    AttentionRunner,
    AttentionSpec,
    NativeCache,
    make_problem,
    write_cache,
)

ISAS = _native.supported_isas()
SPECS = [
    AttentionSpec(heads=(14, 2)),
    AttentionSpec(heads=(4, 4), head_dim=80, block_size=32),
    AttentionSpec(heads=(6, 2), head_dim=128, window=90, softcap=20.0),
    AttentionSpec(heads=(5, 1), kv_format="int8", window=300),
]
LENGTHS = [(70, 600), (1, 1300), (1, 33), (30, 30), (3, 520)]
"""One sequence is long enough to be cut into pieces, one is a chunk of more rows than a tile has."""


@pytest.fixture(params=SPECS, ids=str)
def problem(request: pytest.FixtureRequest) -> AttentionProblem:
    spec: AttentionSpec = request.param
    return make_problem(spec, lengths=LENGTHS, seed=11)


def together(problem: AttentionProblem, *, isa: str, threads: int, cache: NativeCache) -> list[Tensor]:
    runner = AttentionRunner(problem.spec, isa=isa, threads=threads)
    return runner.run(problem.lengths, queries=problem.queries, tables=problem.tables, cache=cache)


def in_chunks(
    problem: AttentionProblem, idx: int, *, cuts: list[int], runner: AttentionRunner, cache: NativeCache
) -> Tensor:
    """Sequence `idx` alone, its new tokens in steps that end after `cuts` tokens."""
    new, total = problem.lengths[idx]
    ends = sorted({min(cut, new) for cut in cuts} | {new})
    results = []
    for start, end in zip([0, *ends], ends, strict=False):
        lengths = [(end - start, total - new + end)]
        queries, tables = [problem.queries[idx][start:end]], [problem.tables[idx]]
        results += runner.run(lengths, queries=queries, tables=tables, cache=cache)
    return torch.cat(results)


@pytest.mark.parametrize("isa", ISAS)
def test_threads_change_no_bit(isa: str, problem: AttentionProblem) -> None:
    """One thread cuts nothing; two and three cut long contexts into pieces."""
    cache = write_cache(problem)
    one = together(problem, isa=isa, threads=1, cache=cache)
    for threads in (2, 3):
        more = together(problem, isa=isa, threads=threads, cache=cache)
        assert all(torch.equal(a, b) for a, b in zip(one, more, strict=True))


@pytest.mark.parametrize("isa", ISAS)
def test_neighbours_and_chunks_change_no_bit(isa: str, problem: AttentionProblem) -> None:
    """Each sequence alone, whole and in steps of a token, of some tokens, of many."""
    cache = write_cache(problem)
    expected = together(problem, isa=isa, threads=1, cache=cache)
    for threads in (1, 2):
        runner = AttentionRunner(problem.spec, isa=isa, threads=threads)
        for idx, whole in enumerate(expected):
            for cuts in ([], [1, 2, 3], [17, 33, 64]):
                cut = in_chunks(problem, idx, cuts=cuts, runner=runner, cache=cache)
                assert torch.equal(cut, whole), (idx, cuts)
