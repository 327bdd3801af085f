"""Scheduler: what each step holds, by hand on tiny sizes."""

import pytest
from policy_rig import Rig, shape

from penstock.core.errors import InvalidParameterError, QueueFullError
from penstock.core.text import FinishReason, Priority
from penstock.engine.scheduler.cost import UNNOTICED_GAP_S, StepLoad, TimedStep, step_target_s


def test_one_request_from_prompt_to_end():
    rig = Rig()
    rig.add("a", [1, 2, 3, 4, 5], max_tokens=3)
    plan, output = rig.step(token=7)
    assert shape(plan) == [(1, 0, 5)]
    assert plan.sequences[0].token_ids == [1, 2, 3, 4, 5]
    assert plan.sequences[0].block_tables == ([0, 1],)
    assert [new.seq_id for new in plan.new_sequences] == [1]
    assert output.deltas[0].token_ids == (7,)
    plan, _ = rig.step(token=8)
    assert shape(plan) == [(1, 5, 1)]
    assert plan.sequences[0].token_ids == [7]
    assert plan.sequences[0].samples[0].output_idx == 1
    plan, output = rig.step(token=9)
    assert output.deltas[0].finish_reason is FinishReason.LENGTH
    assert output.deltas[0].stats.num_generated_tokens == 3
    assert not rig.scheduler.has_work
    assert rig.kv.usage().num_owned == 0


def test_the_runner_is_told_who_finished_with_the_next_plan():
    rig = Rig()
    rig.add("a", [1], max_tokens=1)
    rig.step()
    rig.add("b", [2], max_tokens=1)
    assert rig.scheduler.schedule().finished_seq_ids == [1]


def test_a_long_prompt_is_cut_into_chunks_and_only_the_last_samples():
    rig = Rig(max_num_batched_tokens=4, max_num_seqs=2)
    rig.add("a", list(range(10)), max_tokens=1)
    plans = [rig.step()[0] for _ in range(3)]
    assert [shape(plan) for plan in plans] == [[(1, 0, 4)], [(1, 4, 4)], [(1, 8, 2)]]
    assert [len(plan.sequences[0].samples) for plan in plans] == [0, 0, 1]


def test_decodes_come_first_and_the_prompt_takes_what_is_left():
    rig = Rig(max_num_batched_tokens=8)
    rig.add("a", [1] * 5, max_tokens=4)
    rig.step()
    rig.add("b", [2] * 20, max_tokens=4)
    plan, _ = rig.step()
    assert shape(plan) == [(1, 5, 1), (2, 0, 7)]
    plan, _ = rig.step()
    assert shape(plan) == [(1, 6, 1), (2, 7, 7)]


def test_the_chunk_is_cut_to_the_time_target_while_others_decode():
    rig = Rig(max_num_batched_tokens=256, step_time_target_ms=20.0, block_size=4, num_blocks=256)
    rig.add("warm", [7] * 100, max_tokens=40)
    rig.step(step_time_s=0.1)
    for _ in range(10):
        rig.step(step_time_s=0.001)
    rig.add("long", [8] * 200, max_tokens=2)
    plan = rig.scheduler.schedule()
    # A token costs about 1 ms, so about 19 fit beside the decode.
    assert 10 <= shape(plan)[1][2] <= 22


@pytest.mark.parametrize(("stretch", "low", "high"), [(2.0, 80, 120), (4.0, 260, 340)])
def test_a_prompt_stretches_a_step_with_decodes_by_so_much(stretch: float, low: int, high: int):
    rig = Rig(
        max_model_len=1024,
        max_num_batched_tokens=512,
        step_time_target_ms=1000.0,
        decode_stretch=stretch,
        block_size=4,
        num_blocks=512,
    )
    rig.add("a", [1] * 200, max_tokens=40)
    rig.step(step_time_s=0.1 + 0.2)
    for _ in range(20):
        rig.step(step_time_s=0.1)
    rig.add("b", [2] * 480, max_tokens=2)
    plan, _ = rig.step(step_time_s=0.2)
    # A step costs 100 ms and a token 1 ms; the configured target of 1000 ms does not bind.
    assert low <= shape(plan)[1][2] <= high


@pytest.mark.parametrize(("num_prompts", "low", "high"), [(1, 80, 120), (3, 400, 512), (40, 400, 512)])
def test_a_step_is_stretched_further_where_more_prompts_wait_than_answers_run(
    num_prompts: int, low: int, high: int
):
    """One answer runs: one prompt stretches its step to 2 times, three to 6 times, up to the target."""
    rig = Rig(
        max_model_len=1024,
        max_num_batched_tokens=512,
        max_num_seqs=64,
        step_time_target_ms=600.0,
        decode_stretch=2.0,
        block_size=4,
        num_blocks=4096,
    )
    rig.add("a", [1] * 200, max_tokens=40)
    rig.step(step_time_s=0.1 + 0.2)
    for _ in range(20):
        rig.step(step_time_s=0.1)
    for number in range(num_prompts):
        rig.add(f"b{number}", [2 + number] * 480, max_tokens=2)
    plan, _ = rig.step(step_time_s=0.2)
    assert low <= sum(num_tokens for _, _, num_tokens in shape(plan)[1:]) <= high


def test_steps_that_nobody_notices_are_not_cut():
    assert step_target_s(0.15, decodes_s=0.002, stretch=2.2) == UNNOTICED_GAP_S
    assert step_target_s(0.02, decodes_s=0.002, stretch=2.2) == 0.02
    assert step_target_s(0.15, decodes_s=0.04, stretch=2.2) == pytest.approx(0.088)
    assert step_target_s(0.15, decodes_s=0.1, stretch=2.2) == 0.2
    assert step_target_s(0.15, decodes_s=0.1, stretch=1.5) == pytest.approx(0.15)


def test_after_a_warm_up_the_first_prompt_is_cut_beside_the_answer_already_there():
    rig = Rig(max_num_seqs=8, max_num_batched_tokens=512, max_model_len=1024, block_size=4, num_blocks=1024)
    rig.scheduler.cost.prime(
        TimedStep(load, 0.025 + 0.001 * load.num_tokens)
        for load in (StepLoad(256, 1, 256, 256 * 256), StepLoad(8, 8, 128), StepLoad(1, 1, 16))
    )
    rig.add("first", [1] * 8, max_tokens=40)
    rig.step(step_time_s=0.033)
    rig.add("late", [2] * 400, max_tokens=2)
    plan, _ = rig.step(step_time_s=0.05)
    # A step costs 25 ms and a token 1 ms: twice the decode's 26 ms holds about 26 tokens, not 512.
    assert 12 <= plan.num_tokens <= 32


def test_a_chunk_of_one_block_is_always_made():
    rig = Rig(max_num_batched_tokens=64, step_time_target_ms=1.0, num_blocks=64)
    rig.add("a", [1] * 8, max_tokens=30)
    rig.step(step_time_s=8.0)
    for _ in range(10):
        rig.step(step_time_s=1.0)
    rig.add("b", [2] * 40, max_tokens=2)
    plan, _ = rig.step(step_time_s=5.0)
    # Tokens cost 1 s each: twice the decode's time is room for one token beside it.
    assert shape(plan) == [(1, 18, 1), (2, 0, 4)]


def test_where_decodes_alone_miss_the_target_prompts_get_as_much_time_as_they():
    rig = Rig(max_num_batched_tokens=256, step_time_target_ms=1.0, block_size=4, num_blocks=256)
    rig.add("a", [1] * 200, max_tokens=40)
    rig.step(step_time_s=0.1 + 0.2)
    for _ in range(20):
        rig.step(step_time_s=0.1)
    rig.add("b", [2] * 200, max_tokens=2)
    plan, _ = rig.step(step_time_s=0.2)
    # A step costs 100 ms and a token 1 ms: about 100 tokens take as long as the decode.
    assert 80 <= shape(plan)[1][2] <= 120


def test_seats_bound_the_number_of_sequences_and_n_counts_n():
    rig = Rig(max_num_seqs=3)
    rig.add("a", [1], n=2, max_tokens=8)
    rig.add("b", [2], n=2, max_tokens=8)
    rig.add("c", [3], max_tokens=8)
    plan, output = rig.step()
    # b has no two seats, and c does not pass it.
    assert shape(plan) == [(1, 0, 1)]
    assert (output.stats.num_running, output.stats.num_waiting) == (1, 2)


def test_a_prefix_computed_one_step_ago_is_shared():
    rig = Rig()
    rig.add("a", [1] * 9, max_tokens=4)
    rig.step()
    rig.add("b", [1] * 8 + [2], max_tokens=4)
    plan, output = rig.step()
    assert shape(plan) == [(1, 9, 1), (2, 8, 1)]
    assert plan.sequences[1].block_tables == ([0, 1, 3],)
    assert (output.stats.num_prefix_query_tokens, output.stats.num_prefix_hit_tokens) == (9, 8)
    assert rig.of("b")[0].num_cached_tokens == 8


def test_blocks_of_the_answer_are_shared_too():
    rig = Rig()
    rig.add("a", [1] * 4, max_tokens=5)
    rig.run(token=6)
    rig.add("next turn", [1] * 4 + [6] * 5, max_tokens=1)
    plan, _ = rig.step()
    assert shape(plan) == [(2, 8, 1)]


def test_a_request_waits_for_a_prefix_that_another_computes_in_this_step():
    rig = Rig()
    for name in "abc":
        rig.add(name, [1] * 8 + [ord(name)], max_tokens=2)
    plan, _ = rig.step()
    assert shape(plan) == [(1, 0, 9)]
    plan, _ = rig.step()
    assert shape(plan) == [(1, 9, 1), (2, 8, 1), (3, 8, 1)]


def test_who_waits_for_a_prefix_is_passed_by_others():
    rig = Rig()
    rig.add("a", [1] * 8, max_tokens=2)
    rig.add("held back", [1] * 8 + [2], max_tokens=2)
    rig.add("other", [3] * 5, max_tokens=2)
    plan, _ = rig.step()
    assert shape(plan) == [(1, 0, 8), (3, 0, 5)]


def test_a_higher_tier_does_not_wait_for_the_prefix_of_a_lower_one():
    rig = Rig(max_num_batched_tokens=12, policy="priority")
    rig.add("batch", [1] * 16, priority=Priority.BATCH, max_tokens=2)
    rig.step()
    rig.add("urgent", [1] * 16, priority=Priority.REALTIME, max_tokens=2)
    plan, _ = rig.step()
    assert shape(plan) == [(1, 12, 4), (2, 12, 4)]


def test_waiting_for_a_prefix_ends_when_it_brings_nothing(monkeypatch):
    """The leader computes one block in many steps; the follower waits a bounded time only."""
    monkeypatch.setattr("penstock.engine.scheduler.prefix_wait.MAX_DEFERRALS", 2)
    rig = Rig(max_num_batched_tokens=2, max_num_seqs=2, block_size=16)
    rig.add("slow", [1] * 30, max_tokens=2)
    rig.step()
    rig.add("follower", [1] * 30, max_tokens=2)
    # A budget of 2 is used up by the leader; make room by letting the leader be the smaller one.
    assert shape(rig.step()[0]) == [(1, 2, 2)]
    assert rig.scheduler.num_waiting == 1
    rig.run()
    assert rig.of("follower")[-1].finish_reason is FinishReason.LENGTH


def test_64_requests_with_a_shared_prompt_cost_a_fifth_of_the_prefill_or_less():
    """The bar of the prefix tree: 512 shared tokens and 32 of its own, all at once."""

    def prefill_work(*, caching: bool) -> int:
        rig = Rig(
            num_blocks=4096,
            block_size=16,
            caching=caching,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            max_model_len=1024,
        )
        for idx in range(64):
            rig.add(f"r{idx}", [1] * 512 + [2 + idx] * 32, max_tokens=2)
        work = 0
        while rig.scheduler.has_work:
            work += rig.step()[1].stats.num_prompt_tokens
        assert sum(delta.is_last for delta in rig.deltas) == 64
        return work

    assert prefill_work(caching=False) == 64 * 544
    assert prefill_work(caching=True) == 544 + 63 * 32


def test_a_higher_tier_takes_the_seat_of_a_lower_one():
    rig = Rig(max_num_seqs=1, policy="priority")
    rig.add("batch", [1] * 3, priority=Priority.BATCH, max_tokens=8)
    rig.step()
    rig.add("urgent", [2] * 3, priority=Priority.REALTIME, max_tokens=2)
    plan, output = rig.step()
    assert shape(plan)[-1] == (2, 0, 3)
    assert output.stats.num_preemptions == 1
    rig.run()
    assert [delta.request_id for delta in rig.deltas if delta.is_last] == ["urgent", "batch"]
    assert rig.of("batch")[-1].stats.num_preemptions == 1


def test_nobody_is_preempted_for_seats_that_would_not_suffice():
    rig = Rig(max_num_seqs=3, policy="priority")
    rig.add("peer", [1] * 3, n=2, max_tokens=8)
    rig.add("batch", [2] * 3, priority=Priority.BATCH, max_tokens=8)
    rig.step()
    rig.add("two seats", [3] * 3, n=2, max_tokens=8)
    assert rig.step()[1].stats.num_preemptions == 0
    rig.add("one seat", [4] * 3, max_tokens=2, priority=Priority.REALTIME)
    assert rig.step()[1].stats.num_preemptions == 1


def test_equal_tiers_do_not_take_each_others_seats():
    rig = Rig(max_num_seqs=1, policy="priority")
    rig.add("a", [1] * 3, max_tokens=8)
    rig.step()
    rig.add("b", [2] * 3, max_tokens=8)
    plan, output = rig.step()
    assert shape(plan) == [(1, 3, 1)]
    assert output.stats.num_preemptions == 0


def test_when_the_pool_is_dry_the_newest_goes_and_loses_no_token():
    rig = Rig(num_blocks=4, caching=False)
    rig.add("old", [1] * 4, max_tokens=10)
    rig.add("new", [2] * 4, max_tokens=10)
    outputs = [rig.step(token=lambda seq_id, idx: 10 * seq_id + idx)[1] for _ in range(7)]
    preempted = [output.stats.num_preemptions for output in outputs]
    assert sum(preempted) == 1
    rig.run(token=lambda seq_id, idx: 10 * seq_id + idx)
    for name, first in (("old", 10), ("new", 20)):
        tokens = [token for delta in rig.of(name) for token in delta.token_ids]
        assert tokens == [first + idx for idx in range(10)]
    assert rig.of("old")[-1].stats.num_preemptions == 0
    assert rig.of("new")[-1].stats.num_preemptions == 1


def test_a_preempted_request_is_not_announced_again():
    rig = Rig(num_blocks=4, caching=False)
    rig.add("old", [1] * 4, max_tokens=10)
    rig.add("new", [2] * 4, max_tokens=10)
    announced = []
    while rig.scheduler.has_work:
        announced += [new.seq_id for new in rig.step()[0].new_sequences]
    assert announced == [1, 2]


def test_after_max_preemptions_a_request_is_protected():
    rig = Rig(num_blocks=6, caching=False, max_preemptions=1, max_num_seqs=4)
    for name in "abcd":
        rig.add(name, [1] * 4, max_tokens=16)
    rig.run()
    assert all(rig.of(name)[-1].stats.num_preemptions <= 1 for name in "abcd")


def test_no_preemption_at_all_if_the_limit_is_zero():
    rig = Rig(num_blocks=6, caching=False, max_preemptions=0, max_num_seqs=4)
    for name in "abcd":
        rig.add(name, [1] * 4, max_tokens=16)
    rig.run()
    assert all(rig.of(name)[-1].stats.num_preemptions == 0 for name in "abcd")


def test_window_blocks_are_given_back_while_the_answer_grows():
    rig = Rig(num_blocks=8, windows=(5,), caching=False)
    rig.add("a", [1] * 4, max_tokens=40)
    owned = []
    while rig.scheduler.has_work:
        owned.append(rig.step()[1].stats.num_blocks_owned)
    assert max(owned) == 2


def test_a_window_lets_a_long_answer_fit_a_small_pool():
    rig = Rig(num_blocks=2, windows=(5,), caching=False, max_num_seqs=1, max_num_batched_tokens=8)
    rig.add("a", [1] * 30, max_tokens=30)
    rig.run()
    assert rig.of("a")[-1].stats.num_generated_tokens == 30


def test_planning_ahead_neither_repeats_nor_overtakes():
    """schedule(n + 1) before apply(n): prefill chunks go on, a decode whose token is in flight waits."""
    rig = Rig(max_num_batched_tokens=4, max_num_seqs=2)
    rig.add("a", [1] * 10, max_tokens=2)
    first, second, third = (rig.scheduler.schedule() for _ in range(3))
    assert [shape(plan) for plan in (first, second, third)] == [[(1, 0, 4)], [(1, 4, 4)], [(1, 8, 2)]]
    assert not rig.scheduler.schedule().has_work
    for plan in (first, second, third):
        rig.finish(plan)
    assert rig.of("a")[0].token_ids == (9,)
    assert shape(rig.scheduler.schedule()) == [(1, 10, 1)]


def test_the_queue_is_bounded_and_says_when_to_retry():
    rig = Rig(max_num_seqs=1, max_num_queued_reqs=2)
    rig.add("running", [1], max_tokens=20)
    rig.step()
    rig.add("b", [2])
    rig.add("c", [3])
    with pytest.raises(QueueFullError) as caught:
        rig.add("d", [4])
    assert 1.0 <= caught.value.retry_after_s <= 60.0


def test_requests_that_find_a_seat_do_not_count_as_queued():
    rig = Rig(max_num_seqs=4, max_num_queued_reqs=1)
    for idx in range(5):
        rig.add(f"r{idx}", [idx])
    with pytest.raises(QueueFullError):
        rig.add("r5", [5])


def test_a_request_id_in_use_is_refused():
    rig = Rig()
    rig.add("a", [1])
    with pytest.raises(InvalidParameterError, match="'a' is in use"):
        rig.add("a", [1])


def test_the_predicted_wait_grows_with_the_queue():
    rig = Rig(max_num_seqs=1, max_model_len=4096, num_blocks=4096, max_num_batched_tokens=16)
    rig.add("a", [1] * 64, max_tokens=4)
    for _ in range(7):
        rig.step(step_time_s=2.0)
    empty = rig.scheduler.predicted_wait_s(16)
    for idx in range(8):
        rig.add(f"r{idx}", [idx] * 64, max_tokens=4)
    assert rig.scheduler.predicted_wait_s(16) > empty


def test_reports_tell_state_and_sizes_but_no_text():
    rig = Rig(max_num_seqs=1)
    rig.add("a", [1] * 6, max_tokens=4, tenant="x")
    rig.add("b", [2] * 3, max_tokens=4)
    rig.step()
    running, waiting = rig.scheduler.reports()
    assert (running.request_id, running.state, running.tenant_id) == ("a", "running", "x")
    assert (running.num_prompt_tokens, running.num_computed_tokens, running.num_generated_tokens) == (6, 6, 1)
    assert running.num_blocks == 2
    assert (waiting.state, waiting.num_blocks) == ("waiting", 0)
    assert waiting.age_s == pytest.approx(0.01)


def test_the_last_delta_tells_how_the_request_fared():
    rig = Rig(num_blocks=10)
    rig.add("a", [1] * 5, max_tokens=1)
    rig.add("b", [2] * 5, max_tokens=1)
    rig.clock.advance(2.0)
    rig.step()
    stats = rig.of("b")[-1].stats
    assert stats.queue_wait_s == pytest.approx(2.0)
    assert stats.inference_s == pytest.approx(0.01)
    assert stats.batch_size == 2
    assert stats.kv_usage == pytest.approx(0.4)


def test_slots_used_and_owned_by_hand():
    rig = Rig()
    rig.add("a", [1] * 5, max_tokens=4)
    rig.add("b", [2] * 3, max_tokens=4)
    _, output = rig.step()
    assert (output.stats.num_slots_owned, output.stats.num_slots_used) == (12, 8)


def test_an_empty_plan_may_be_applied():
    rig = Rig()
    plan, output = rig.step()
    assert not plan.has_work
    assert output.deltas == []
