"""How small steps become for want of memory, and for how long."""

from policy_rig import Rig, shape

from penstock.engine.scheduler.memory_pressure import RECOVERY_STEPS, MemoryPressure


def test_the_limit_halves_with_each_failure_and_doubles_with_good_steps():
    pressure = MemoryPressure(max_num_batched_tokens=100, least=8)
    assert (pressure.budget, pressure.is_high) == (100, False)
    pressure.note_failure(num_tokens=60)
    assert (pressure.budget, pressure.is_high) == (30, True)
    for _ in range(RECOVERY_STEPS):
        assert pressure.budget == 30
        pressure.note_success()
    assert pressure.budget == 60
    for _ in range(4):
        pressure.note_failure(num_tokens=60)
    assert pressure.budget == 8
    for _ in range(4 * RECOVERY_STEPS):
        pressure.note_success()
    assert (pressure.budget, pressure.is_high) == (100, False)


def test_a_prompt_that_lacked_memory_is_planned_again_in_smaller_chunks_and_nobody_hears_of_it():
    rig = Rig(block_size=4)
    rig.add("a", [1] * 40, max_tokens=2)
    plan = rig.scheduler.schedule()
    assert shape(plan) == [(1, 0, 40)]
    output = rig.finish(plan, failures={1: "out_of_memory"}, num_out_of_memory=1)
    assert (output.deltas, output.stats.num_out_of_memory) == ([], 1)
    assert rig.kv.usage().num_owned == 0
    assert shape(rig.step()[0]) == [(1, 0, 20)]
    assert shape(rig.step()[0]) == [(1, 20, 20)]
    rig.run()
    assert [token for delta in rig.of("a") for token in delta.token_ids] == [9, 9]


def test_more_answers_than_a_step_may_hold_go_back_into_the_queue():
    rig = Rig(block_size=1, max_num_seqs=8)
    for name in "abcdefgh":
        rig.add(name, [ord(name)], max_tokens=4)
    rig.step()
    rig.step(num_out_of_memory=1)
    plan = rig.scheduler.schedule()
    assert len(plan.sequences) == 4
    rig.finish(plan)
    rig.run()
    assert all(rig.of(name)[-1].error is None for name in "abcdefgh")
