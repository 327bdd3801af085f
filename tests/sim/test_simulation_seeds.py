"""200 seeds of the real scheduler and KV manager under faults; a failing seed says how to replay it."""

import pytest

from penstock.sim.simulator import replay_line, simulate

NUM_SEEDS = 200


@pytest.mark.parametrize("is_async", [False, True], ids=["seeded", "async"])
@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_every_law_holds_after_every_step(seed, is_async):
    try:
        outcome = simulate(seed, is_async=is_async)
    except BaseException:
        print(replay_line(seed, is_async=is_async))
        raise
    assert outcome.num_steps > 0
