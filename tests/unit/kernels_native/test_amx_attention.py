"""Attention by tiles: the laws where its shapes are ragged: rows to a tile, dims to 32, granules to pairs, parts of 256."""

import pytest
import torch

from tests.unit.kernels_native.amx_linear_case import TILE_ISAS
from tests.unit.kernels_native.native_attention_case import (
    AttentionRunner,
    AttentionSpec,
    make_problem,
    run_problem,
    solve,
    write_cache,
)

pytestmark = pytest.mark.skipif(not TILE_ISAS, reason="tiles are emulated with AVX-512")

SPECS = [
    AttentionSpec(heads=(7, 1), head_dim=64),
    AttentionSpec(heads=(2, 2), head_dim=48, block_size=32),
    AttentionSpec(heads=(4, 2), head_dim=80, window=100),
    AttentionSpec(heads=(3, 1), head_dim=128, softcap=20.0, block_size=48),
    AttentionSpec(heads=(2, 1), head_dim=256, window=17),
    AttentionSpec(heads=(70, 1), head_dim=32),
]

LENGTHS = [(1, 1), (9, 9), (1, 300), (33, 33), (17, 260), (3, 513), (40, 290), (64, 64)]
"""(new tokens, tokens in all): decodes, whole prompts, chunks; below, at and above tiles, granules and parts."""


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_tiles_equal_float64(isa: str, spec: AttentionSpec) -> None:
    """Whatever no query sees is NaN in the cache."""
    problem = make_problem(spec, lengths=LENGTHS, seed=1)
    results = run_problem(problem, isa=isa)
    for result, query, keys, values in zip(
        results, problem.queries, problem.keys, problem.values, strict=True
    ):
        answer = solve(spec, query=query, keys=keys, values=values, isa=isa)
        assert ((result.double() - answer.out).abs() <= answer.bound).all(), tuple(query.shape)


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_int8_tiles_are_as_close_as_vectors_are(isa: str, spec: AttentionSpec) -> None:
    """On the same int8 cache both round weights and results to bf16: twice that error, at most, lies between them."""
    spec = AttentionSpec(
        heads=spec.heads,
        head_dim=spec.head_dim,
        block_size=spec.block_size,
        window=spec.window,
        softcap=spec.softcap,
        kv_format="int8",
    )
    problem = make_problem(spec, lengths=LENGTHS, seed=2)
    cache = write_cache(problem)
    tiles = run_problem(problem, isa=isa, cache=cache)
    vectors = run_problem(problem, isa="avx512", cache=cache)
    for ours, theirs, query, keys, values in zip(
        tiles, vectors, problem.queries, problem.keys, problem.values, strict=True
    ):
        bound = solve(spec, query=query, keys=keys, values=values, isa=isa).bound
        # 2.2: the bound is made of the values before they were int8, which moves their sums by a few hundredths.
        assert ((ours.double() - theirs.double()).abs() <= 2.2 * bound).all(), tuple(query.shape)


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_a_tokens_bits_do_not_depend_on_company_chunks_or_threads(isa: str, kv_format: str) -> None:
    """One prompt whole, in chunks beside other sequences, by two threads, and token by token at its end."""
    spec = AttentionSpec(heads=(6, 2), head_dim=64, kv_format=kv_format)
    problem = make_problem(spec, lengths=[(310, 310), (5, 40)], seed=3)
    cache = write_cache(problem)
    whole = run_problem(problem, isa=isa, cache=cache)[0]
    assert torch.equal(run_problem(problem, isa=isa, cache=cache, threads=2)[0], whole)
    runner = AttentionRunner(spec, isa=isa)
    for begin, end in [(0, 1), (0, 100), (100, 263), (263, 310), (255, 256), (256, 257), (309, 310)]:
        chunk = runner.run(
            [(5, 40), (end - begin, end)],
            queries=[problem.queries[1], problem.queries[0][begin:end]],
            tables=[problem.tables[1], problem.tables[0]],
            cache=cache,
        )
        assert torch.equal(chunk[1], whole[begin:end]), (begin, end)


@pytest.mark.parametrize("isa", TILE_ISAS)
@pytest.mark.parametrize("heads", [(7, 1), (2, 2)])
def test_nan_values_reach_the_tokens_that_see_them_and_no_other(isa: str, heads: tuple[int, int]) -> None:
    """A NaN in the middle of a granule and of a tile's rows: rows before it keep their bits."""
    spec = AttentionSpec(heads=heads, head_dim=64)
    problem = make_problem(spec, lengths=[(60, 60)], seed=4)
    clean = run_problem(problem, isa=isa)[0]
    problem.values[0][37, 0, 5] = float("nan")
    spoiled = run_problem(problem, isa=isa)[0]
    assert torch.equal(spoiled[:37], clean[:37])
    assert spoiled[37:, : heads[0] // heads[1], 5].isnan().all()
    spoiled[37:, : heads[0] // heads[1], 5] = clean[37:, : heads[0] // heads[1], 5]
    assert torch.equal(spoiled, clean)


@pytest.mark.parametrize("isa", TILE_ISAS)
def test_a_nan_key_reaches_the_tokens_that_see_it_and_no_other(isa: str) -> None:
    spec = AttentionSpec(heads=(3, 1), head_dim=64)
    problem = make_problem(spec, lengths=[(60, 60)], seed=5)
    clean = run_problem(problem, isa=isa)[0]
    problem.keys[0][37, 0, 5] = float("nan")
    spoiled = run_problem(problem, isa=isa)[0]
    assert torch.equal(spoiled[:37], clean[:37])
    assert spoiled[37:].isnan().all()
