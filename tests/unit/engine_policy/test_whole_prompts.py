"""`enable_chunked_prefill` off: a prompt is computed whole in one step, and everybody is still served."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import StartupError
from penstock.engine.config import EngineConfig, KvConfig, SchedulerConfig, validate_engine_config
from penstock.engine.scheduler.cost import StepLoad
from tests.unit.engine_policy.policy_rig import Rig, shape


def test_a_prompt_waits_for_a_step_that_has_room_for_all_of_it():
    rig = Rig(enable_chunked_prefill=False, max_num_batched_tokens=16, max_model_len=16, caching=False)
    rig.add("a", list(range(10)), max_tokens=3)
    rig.add("b", list(range(20, 30)), max_tokens=3)
    plan, _ = rig.step()
    assert shape(plan) == [(plan.sequences[0].seq_id, 0, 10)], "with chunks, six tokens of b would be in it"
    plan, _ = rig.step()
    assert sorted(length for _, _, length in shape(plan)) == [1, 10]


def test_nobody_overtakes_a_prompt_that_waits_for_room():
    """The last one would fit beside the first, but comes after the one that does not."""
    rig = Rig(enable_chunked_prefill=False, max_num_batched_tokens=16, max_model_len=16, policy="fcfs")
    rig.add("a", list(range(8)), max_tokens=3)
    rig.add("long", list(range(20, 33)), max_tokens=3)
    rig.add("short", list(range(40, 42)), max_tokens=3)
    plan, _ = rig.step()
    assert [length for _, _, length in shape(plan)] == [8]


def test_running_answers_do_not_cut_a_prompt():
    """With chunks, the time target lets only a block of it into a step with decodes."""
    whole = Rig(enable_chunked_prefill=False, step_time_target_ms=1, max_num_batched_tokens=256)
    cut = Rig(step_time_target_ms=1, max_num_batched_tokens=256)
    for rig in (whole, cut):
        for num_tokens in (1, 8, 32, 64) * 8:
            rig.scheduler.cost.observe(StepLoad(num_tokens, 1, num_tokens), step_time_s=0.1 * num_tokens)
        rig.add("a", list(range(4)), max_tokens=100)
        rig.step()
        rig.add("b", list(range(40, 100)))
    assert max(length for _, _, length in shape(whole.step()[0])) == 60
    assert max(length for _, _, length in shape(cut.step()[0])) < 60


def test_a_block_as_long_as_the_context_is_one_block_for_each_sequence():
    """Contiguous KV: all that a sequence may ever need is taken at its start, so four run and the rest wait."""
    rig = Rig(num_blocks=4, block_size=256, max_model_len=256, max_num_batched_tokens=256)
    for number in range(6):
        rig.add(str(number), [number, 1, 2], max_tokens=8)
    plan, output = rig.step()
    assert len(plan.sequences) == 4
    assert (output.stats.num_slots_owned, output.stats.num_slots_used) == (4 * 256, 4 * 3)
    rig.run()
    assert rig.kv.usage().num_owned == 0


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 24), st.integers(1, 8), st.integers(1, 2)), max_size=12),
    num_blocks=st.integers(13, 24),
    caching=st.booleans(),
    seats=st.integers(2, 6),
)
def test_every_prompt_is_whole_and_every_request_ends(sizes, num_blocks, caching, seats):
    """Whatever comes, with preemption and shared prefixes: an entry computes all that is known."""
    rig = Rig(
        num_blocks=num_blocks,
        caching=caching,
        enable_chunked_prefill=False,
        max_num_seqs=seats,
        max_num_batched_tokens=32,
        max_model_len=32,
    )
    for number, (prompt, answer, n) in enumerate(sizes):
        rig.add(str(number), [token % 3 for token in range(prompt)], max_tokens=answer, n=n)
    for _ in range(500):
        if not rig.scheduler.has_work:
            break
        plan = rig.scheduler.schedule()
        assert plan.num_tokens <= 32
        targets = {seq.seq_id: group.target(seq) for group in rig.scheduler.groups for seq in group.live}
        for entry in plan.sequences:
            assert entry.start + len(entry.token_ids) == targets[entry.seq_id]
        rig.finish(plan)
    assert not rig.scheduler.has_work
    ended = {(delta.request_id, delta.index) for delta in rig.deltas if delta.finish_reason is not None}
    assert len(ended) == sum(n for _, _, n in sizes)


def test_the_budget_must_hold_a_whole_context():
    config = EngineConfig(
        model_path="m",
        max_model_len=4096,
        scheduler=SchedulerConfig(enable_chunked_prefill=False, max_num_batched_tokens=2048),
    )
    with pytest.raises(StartupError, match="2048.*4096.*enable_chunked_prefill"):
        validate_engine_config(config)


def test_blocks_may_be_as_long_as_a_context():
    validate_engine_config(EngineConfig(model_path="m", kv=KvConfig(block_size=8192)))
    with pytest.raises(StartupError, match="power of two"):
        validate_engine_config(EngineConfig(model_path="m", kv=KvConfig(block_size=1000)))
