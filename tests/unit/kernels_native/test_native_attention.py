"""Native paged attention against float64: batches, masks, the int8 cache, and what it refuses."""

import random
from collections.abc import Callable

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
    read_cache,
    run_problem,
    solve,
    write_cache,
)

ISAS = _native.supported_isas()
HEAD_DIMS = [32, 64, 80, 96, 128, 256]

KvOf = Callable[[AttentionProblem, NativeCache, int], tuple[Tensor, Tensor]]


def given_kv(problem: AttentionProblem, cache: NativeCache, idx: int) -> tuple[Tensor, Tensor]:
    """The keys and values of sequence `idx` as they were written."""
    del cache
    return problem.keys[idx], problem.values[idx]


def stored_kv(problem: AttentionProblem, cache: NativeCache, idx: int) -> tuple[Tensor, Tensor]:
    """The keys and values of sequence `idx` as the cache has them: quantized."""
    table, num = problem.tables[idx], len(problem.keys[idx])
    keys, values = (
        read_cache(stored, spec=problem.spec, is_key=is_key)[table].flatten(0, 1)[:num].nan_to_num(0.0)
        for stored, is_key in ((cache.keys, True), (cache.values, False))
    )
    return keys, values


def check(problem: AttentionProblem, *, isa: str, threads: int = 1, kv_of: KvOf = given_kv) -> None:
    """All sequences are within the bound of float64."""
    cache = write_cache(problem, isa=isa)
    for idx, result in enumerate(run_problem(problem, isa=isa, threads=threads, cache=cache)):
        keys, values = kv_of(problem, cache, idx)
        answer = solve(problem.spec, query=problem.queries[idx], keys=keys, values=values, isa=isa)
        assert ((result.double() - answer.out).abs() <= answer.bound).all(), (
            problem.spec,
            problem.lengths,
            idx,
        )


def random_spec(rng: random.Random, *, kv_format: str) -> AttentionSpec:
    num_kv_heads = rng.choice([1, 2, 3])
    return AttentionSpec(
        heads=(num_kv_heads * rng.randint(1, 8), num_kv_heads),
        head_dim=rng.choice(HEAD_DIMS),
        block_size=rng.choice([16, 32, 48, 64]),
        kv_format=kv_format,
        window=rng.choice([0, 0, rng.randint(1, 300)]),
        softcap=rng.choice([0.0, 0.0, 5.0, 50.0]),
        scale=rng.choice([0.05, 0.125, 0.3]),
    )


def random_problem(seed: int, *, kv_format: str) -> AttentionProblem:
    """Up to four sequences: decodes, chunks from the start or in the middle, some with nothing to do."""
    rng = random.Random(seed)
    spec = random_spec(rng, kv_format=kv_format)
    lengths = []
    for _ in range(rng.randint(1, 4)):
        new = rng.choice([1, 1, rng.randint(0, 3), rng.randint(1, 40)])
        lengths.append((new, new + rng.choice([0, rng.randint(0, 20), rng.randint(0, 600)])))
    return make_problem(spec, lengths=lengths, seed=seed)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("kv_format", "kv_of"), [("bf16", given_kv), ("int8", stored_kv)])
@pytest.mark.parametrize("start", range(0, 60, 20))
def test_random_batches_equal_float64(isa: str, kv_format: str, kv_of: KvOf, start: int) -> None:
    """Ragged lengths, chunks, windows, caps, ratios of heads; all that no query sees is NaN.

    int8 is compared with the numbers that its cache stands for.
    """
    for seed in range(start, start + 20):
        check(random_problem(seed, kv_format=kv_format), isa=isa, threads=1 + seed % 2, kv_of=kv_of)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
@pytest.mark.parametrize("heads", [(7, 1), (71, 1), (130, 2)])
def test_any_number_of_query_heads_reads_one_kv_head(
    isa: str, kv_format: str, heads: tuple[int, int]
) -> None:
    """More query heads than a tile has rows are done in slices."""
    spec = AttentionSpec(heads=heads, head_dim=32, kv_format=kv_format)
    problem = make_problem(spec, lengths=[(3, 40), (1, 300)], seed=3)
    check(problem, isa=isa, threads=2, kv_of=given_kv if kv_format == "bf16" else stored_kv)


@pytest.mark.parametrize("isa", ISAS)
def test_int8_is_as_near_as_its_steps_allow(isa: str) -> None:
    """Half a step of each key moves a score by at most E, so weights by e^(2E); half a step of a value adds."""
    for seed in range(6):
        spec = AttentionSpec(heads=(4, 2), head_dim=64, kv_format="int8", scale=0.125)
        problem = make_problem(spec, lengths=[(5, 120)], seed=seed)
        query, keys, values = problem.queries[0], problem.keys[0], problem.values[0]
        key_step, value_step = (x.double().abs().amax(-1).max() / 127 for x in (keys, values))
        score_error = spec.scale * query.double().abs().sum(-1).max() * key_step / 2
        answer = solve(spec, query=query, keys=keys, values=values, isa=isa)
        moved = (torch.expm1(2 * score_error) * values.double().abs().max() + value_step / 2) * 1.01
        error = (run_problem(problem, isa=isa)[0].double() - answer.out).abs()
        assert (error <= answer.bound + moved).all()
        assert error.mean() < 0.01  # the bound is a worst case; a typical error is far below it


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_row_does_not_notice_what_it_may_not_see(isa: str, bad: float) -> None:
    """A later token of the same chunk that is not finite changes no bit of an earlier row, and spoils its own."""
    problem = make_problem(AttentionSpec(heads=(4, 2)), lengths=[(20, 50)], seed=5)
    before = run_problem(problem, isa=isa)[0]
    problem.values[0][37] = bad
    problem.keys[0][37] = bad
    after = run_problem(problem, isa=isa)[0]
    assert torch.equal(after[:7], before[:7])
    assert after[7:].isnan().all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv_format", ["bf16", "int8"])
def test_a_window_forgets(isa: str, kv_format: str) -> None:
    """A token that has left the window may be NaN, in a block that the window still touches."""
    spec = AttentionSpec(heads=(4, 2), window=40, kv_format=kv_format)
    problem = make_problem(spec, lengths=[(3, 100)], seed=6)
    before = run_problem(problem, isa=isa)[0]
    problem.values[0][58] = torch.nan  # row 0 stands at 97 and sees 58..97; rows 1 and 2 see from 59 and 60
    after = run_problem(problem, isa=isa)[0]
    assert after[0].isnan().all()
    assert torch.equal(after[1:], before[1:])


@pytest.mark.parametrize("isa", ISAS)
def test_large_scores_do_not_overflow(isa: str) -> None:
    """Softmax is taken relative to the largest score, however large."""
    problem = make_problem(AttentionSpec(scale=1.0), lengths=[(4, 300)], seed=7)
    for query in problem.queries:
        query *= 30
    check(problem, isa=isa)


@pytest.mark.parametrize("isa", ISAS)
def test_a_step_without_rows_does_nothing(isa: str) -> None:
    """No sequences, and sequences without new tokens."""
    spec = AttentionSpec()
    cache = NativeCache(spec, num_blocks=1)
    runner = AttentionRunner(spec, isa=isa)
    nothing = torch.zeros(0, 4, 64, dtype=torch.bfloat16)
    out = runner.run([(0, 5)], queries=[nothing], tables=[[0]], cache=cache)
    assert [len(x) for x in out] == [0]


def test_a_bf16_block_is_as_large_as_its_numbers_and_int8_adds_scales() -> None:
    """The engine allocates by this."""
    shape = {"block_size": 32, "num_kv_heads": 3, "head_dim": 80}
    assert _native.kv_block_bytes(kv_format="bf16", **shape) == 32 * 3 * 80 * 2
    assert _native.kv_block_bytes(kv_format="int8", **shape) == 32 * 3 * (80 + 4)


@pytest.mark.parametrize(
    ("spec", "named"),
    [
        (AttentionSpec(head_dim=72), "72"),
        (AttentionSpec(head_dim=16), "16"),
        (AttentionSpec(head_dim=272), "272"),
        (AttentionSpec(block_size=24), "24"),
        (AttentionSpec(kv_format="fp8"), "fp8"),
        (AttentionSpec(heads=(5, 2)), "5"),
        (AttentionSpec(scale=0.0), "scale"),
        (AttentionSpec(window=-1), "-1"),
        (AttentionSpec(softcap=-1.0), "softcap"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(spec: AttentionSpec, named: str) -> None:
    """When the program is made, not when it runs."""
    with pytest.raises(ValueError, match=named):
        AttentionRunner(spec, isa="scalar")
