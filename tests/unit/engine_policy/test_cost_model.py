"""Cost model: it learns a linear law, stays non-negative, forgets and shrugs off outliers."""

import random

import pytest

from penstock.engine.scheduler.cost import MAX_CAUTION, CostModel, StepLoad, TimedStep


def law(load: StepLoad) -> float:
    return 0.004 + 0.0001 * load.num_tokens + 0.0002 * load.num_seqs + 1e-6 * load.num_kv_tokens


def loads(count: int, seed: int = 0) -> list[StepLoad]:
    rng = random.Random(seed)
    return [
        StepLoad(rng.choice((8, 64, 512)) + rng.randrange(8), rng.randint(1, 64), rng.randrange(30_000))
        for _ in range(count)
    ]


def test_it_learns_the_law_of_the_steps():
    model = CostModel()
    for load in loads(200):
        model.observe(load, step_time_s=law(load))
    for load in loads(20, seed=1):
        assert model.predict(load) == pytest.approx(law(load), rel=0.05)


def test_it_learns_that_the_end_of_a_long_prompt_is_dearer():
    model = CostModel()
    rng = random.Random(5)
    for _ in range(300):
        num_tokens, start = rng.randint(1, 512), rng.randrange(4096)
        kv_tokens = start + num_tokens
        load = StepLoad(num_tokens, 1, kv_tokens, num_tokens * kv_tokens)
        model.observe(load, step_time_s=law(load) + 2e-7 * load.num_chunk_pairs)
    early, late = (
        model.token_budget(target_s=0.1, num_seqs=1, num_kv_tokens=start, chunk_start=start)
        for start in (0, 4000)
    )
    # n tokens after s others cost n * 0.1 ms and n * (s + n) * 0.2 us.
    assert early * 0.0001 + early * early * 2e-7 == pytest.approx(0.1 - 0.0042, rel=0.1)
    assert late * 0.0009 + late * late * 2e-7 == pytest.approx(0.1 - 0.0042 - 0.004, rel=0.1)


def test_no_coefficient_is_negative_whatever_it_sees():
    model = CostModel()
    rng = random.Random(3)
    for load in loads(100):
        model.observe(load, step_time_s=rng.random())
        assert min(model.coefficients) >= 0.0


def test_it_follows_a_machine_that_becomes_slower():
    model = CostModel()
    for load in loads(200):
        model.observe(load, step_time_s=law(load))
    for load in loads(400, seed=2):
        model.observe(load, step_time_s=3 * law(load))
    probe = StepLoad(256, 16, 8000)
    assert model.predict(probe) == pytest.approx(3 * law(probe), rel=0.1)


def test_one_hiccup_does_not_shrink_the_batch():
    model = CostModel()
    for load in loads(100):
        model.observe(load, step_time_s=law(load))
    before = model.token_budget(target_s=0.1, num_seqs=8, num_kv_tokens=1000)
    model.observe(StepLoad(64, 8, 1000), step_time_s=30.0)
    after = model.token_budget(target_s=0.1, num_seqs=8, num_kv_tokens=1000)
    assert after > 0.5 * before


def test_the_budget_is_what_still_fits_under_the_target():
    model = CostModel()
    for load in loads(300):
        model.observe(load, step_time_s=law(load))
    budget = model.token_budget(target_s=0.05, num_seqs=10, num_kv_tokens=5000)
    assert model.predict(StepLoad(int(budget), 10, 5000)) <= 0.05
    assert model.predict(StepLoad(int(budget) + 2, 10, 5000)) > 0.05


def test_nothing_seen_means_no_bound_and_no_time():
    model = CostModel()
    assert model.token_budget(target_s=0.1, num_seqs=1, num_kv_tokens=0) == float("inf")
    assert model.predict(StepLoad(100, 1, 0)) == 0.0


def test_a_target_that_decodes_alone_exceed_leaves_no_budget():
    model = CostModel()
    for load in loads(100):
        model.observe(load, step_time_s=law(load))
    assert model.token_budget(target_s=0.001, num_seqs=64, num_kv_tokens=0) == 0.0


def test_a_step_without_time_teaches_nothing():
    model = CostModel()
    model.observe(StepLoad(10, 1, 10), step_time_s=0.0)
    assert model.coefficients == (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


def primed(model: CostModel) -> CostModel:
    """What the warm-up of a model tells that costs 25 ms a step and 1 ms a token."""
    loads = (StepLoad(256, 1, 256, 256 * 256), StepLoad(64, 64, 1024), StepLoad(1, 1, 16))
    model.prime(TimedStep(load, 0.025 + 0.001 * load.num_tokens) for load in loads)
    return model


def test_the_warm_up_is_enough_to_cut_the_first_chunk():
    budget = primed(CostModel()).token_budget(target_s=0.06, num_seqs=9, num_kv_tokens=1000)
    assert budget == pytest.approx(35, rel=0.25)


def test_of_one_chunk_it_learns_what_tokens_cost_and_bounds_the_next():
    model = CostModel()
    model.observe(StepLoad(512, 8, 512, 64 * 512), step_time_s=0.5)
    assert model.token_budget(target_s=0.06, num_seqs=9, num_kv_tokens=1000) <= 62


def test_an_overrun_makes_cautious_for_a_while():
    model = primed(CostModel())
    chunk = StepLoad(40, 9, 1000, 32 * 500)
    for _ in range(20):
        model.observe(chunk, step_time_s=0.065)
    assert model.caution == pytest.approx(1.0, abs=0.02)
    model.observe(chunk, step_time_s=0.078)
    assert model.caution == pytest.approx(1.2, abs=0.02)
    for _ in range(15):
        model.observe(chunk, step_time_s=0.065)
    assert model.caution < 1.03
    model.observe(chunk, step_time_s=0.068)
    assert model.caution < 1.03, "the usual scatter"


def test_caution_has_a_limit_and_decodes_do_not_raise_it():
    model = primed(CostModel())
    for _ in range(20):
        model.observe(StepLoad(8, 8, 800), step_time_s=0.033)
    model.observe(StepLoad(8, 8, 800), step_time_s=0.3)
    assert model.caution == 1.0
    model.observe(StepLoad(40, 9, 1000, 32 * 500), step_time_s=3.0)
    assert model.caution == MAX_CAUTION
