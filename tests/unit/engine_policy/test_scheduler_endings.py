"""Scheduler: how answers and requests end; forks; failures; cancellations."""

import pytest
from policy_rig import Rig, shape

from penstock.core.text import FinishReason, TokenLogprob, TokenLogprobs
from penstock.engine.scheduler.plan import SampledToken, StepResult
from penstock.engine.scheduler.request import derive_seed


def tokens_of(rig: Rig, name: str, index: int = 0) -> list[int]:
    return [token for delta in rig.of(name) if delta.index == index for token in delta.token_ids]


def test_end_of_sequence_stops_and_is_not_part_of_the_answer():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, eos_token_ids=(0,))
    rig.run(token=lambda _, idx: 5 if idx < 2 else 0)
    last = rig.of("a")[-1]
    assert tokens_of(rig, "a") == [5, 5]
    assert (last.finish_reason, last.stop_token_id) == (FinishReason.STOP, None)
    assert last.stats.num_generated_tokens == 2


def test_a_stop_token_is_named():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, stop_token_ids=(6, 7))
    rig.run(token=lambda _, idx: 5 + idx)
    last = rig.of("a")[-1]
    assert tokens_of(rig, "a") == [5]
    assert (last.finish_reason, last.stop_token_id, last.token_ids) == (FinishReason.STOP, 6, ())


def test_ignore_eos_goes_on():
    rig = Rig()
    rig.add("a", [1], max_tokens=3, eos_token_ids=(0,), ignore_eos=True)
    rig.run(token=0)
    assert tokens_of(rig, "a") == [0, 0, 0]
    assert rig.of("a")[-1].finish_reason is FinishReason.LENGTH


def test_min_tokens_bans_the_ends_and_passes_over_them():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, min_tokens=2, eos_token_ids=(0,), stop_token_ids=(7, 0))
    plan = rig.scheduler.schedule()
    assert plan.new_sequences[0].banned_until_min_tokens == (0, 7)
    rig.finish(plan, token=7)
    rig.run(token=0)
    assert tokens_of(rig, "a") == [7, 0]


def test_nothing_is_banned_without_min_tokens():
    rig = Rig()
    rig.add("a", [1], eos_token_ids=(0,), stop_token_ids=(7,))
    assert rig.scheduler.schedule().new_sequences[0].banned_until_min_tokens == ()


def test_the_context_ends_an_answer():
    rig = Rig(max_model_len=6)
    rig.add("a", [1] * 3, max_tokens=3)
    rig.run()
    assert len(tokens_of(rig, "a")) == 3
    assert rig.of("a")[-1].finish_reason is FinishReason.LENGTH


def test_logprobs_go_with_the_token_and_not_with_a_stop():
    rig = Rig()
    rig.add("a", [1], max_tokens=4, logprobs=0, eos_token_ids=(0,))
    logprobs = TokenLogprobs(TokenLogprob(5, -0.5, 1))
    for token in (5, 0):
        plan = rig.scheduler.schedule()
        result = StepResult(step_id=plan.step_id, tokens=[SampledToken(1, token, logprobs)])
        rig.deltas += rig.scheduler.apply(plan, result).deltas
    assert [delta.logprobs for delta in rig.of("a")] == [(logprobs,), None]


def test_no_token_asked_for_ends_at_once():
    rig = Rig()
    rig.add("a", [1, 2], max_tokens=0, n=2)
    deltas = rig.scheduler.take_deltas()
    assert [(delta.index, delta.finish_reason) for delta in deltas] == [
        (0, FinishReason.LENGTH),
        (1, FinishReason.LENGTH),
    ]
    assert [delta.is_last for delta in deltas] == [False, True]
    assert not rig.scheduler.has_work


def test_n_answers_compute_the_prompt_once_and_copy_on_write():
    rig = Rig()
    rig.add("a", [1] * 6, n=3, max_tokens=2)
    plan, output = rig.step(token=lambda seq_id, _: seq_id)
    assert shape(plan) == [(1, 0, 6)]
    assert [spec.seq_id for spec in plan.sequences[0].samples] == [1, 2, 3]
    assert [new.seq_id for new in plan.new_sequences] == [1, 2, 3]
    assert [(delta.index, delta.token_ids) for delta in output.deltas] == [(0, (1,)), (1, (2,)), (2, (3,))]
    # The partial block is shared by three and counted once.
    assert (output.stats.num_slots_owned, output.stats.num_slots_used) == (8, 6)
    plan = rig.scheduler.schedule()
    assert [entry.block_tables for entry in plan.sequences] == [([0, 2],), ([0, 3],), ([0, 1],)]
    assert [(copy.src, copy.dst) for copy in plan.block_copies] == [(1, 2), (1, 3)]
    rig.finish(plan)
    assert [delta.finish_reason for delta in rig.deltas[3:]] == [FinishReason.LENGTH] * 3
    assert [delta.is_last for delta in rig.deltas[3:]] == [False, False, True]
    assert rig.kv.usage().num_owned == 0


def test_answers_end_one_by_one_and_give_back_their_seats():
    rig = Rig(max_num_seqs=2)
    rig.add("a", [1] * 4, n=2, max_tokens=4, eos_token_ids=(0,))
    rig.add("b", [2] * 4, max_tokens=1)
    rig.step(token=lambda seq_id, _: 0 if seq_id == 1 else 5)
    assert [delta.is_last for delta in rig.of("a")] == [False, False]
    plan, _ = rig.step(token=5)
    assert shape(plan) == [(2, 4, 1), (3, 0, 4)]
    rig.run(token=5)
    assert (tokens_of(rig, "a", 0), tokens_of(rig, "a", 1)) == ([], [5] * 4)
    assert rig.of("a")[-1].stats.num_generated_tokens == 4


def test_a_preempted_group_computes_its_prompt_once_more_and_forks_again():
    rig = Rig(num_blocks=6, caching=False, policy="priority", max_num_seqs=8)
    rig.add("old", [1] * 4, max_tokens=14)
    rig.add("pair", [2] * 4, n=2, max_tokens=6)
    rig.run(token=lambda seq_id, idx: 10 * seq_id + idx)
    assert rig.of("pair")[-1].stats.num_preemptions >= 1
    for index, first in ((0, 20), (1, 30)):
        assert tokens_of(rig, "pair", index) == [first + idx for idx in range(6)]


def test_seeds_are_derived_for_each_answer():
    rig = Rig()
    rig.add("a", [1], n=2, seed=-5)
    seeds = [new.seed for new in rig.scheduler.schedule().new_sequences]
    assert seeds == [derive_seed(-5, answer_idx=0), derive_seed(-5, answer_idx=1)]
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_the_seeds_of_a_request_are_the_stream_of_its_mixed_seed():
    """The request's seed is one that splitmix64 mixes to 1234567, whose stream is published."""
    stream = (6457827717110365317, 3203168211198807973, 9817491932198370423)
    for idx, expected in enumerate(stream):
        assert derive_seed(0xA53C84059609E98E, answer_idx=idx) == expected


def test_neighbouring_seeds_share_no_answer():
    """Requests with seeds 5 and 6 and n > 1 have no answer in common, nor has one request twice the same."""
    pairs = [(seed, idx) for seed in range(-200, 200) for idx in range(16)]
    assert len({derive_seed(seed, answer_idx=idx) for seed, idx in pairs}) == len(pairs)


def test_two_requests_without_a_seed_differ():
    rig = Rig()
    rig.add("a", [1])
    rig.add("b", [2])
    one, two = rig.scheduler.schedule().new_sequences
    assert one.seed != two.seed


@pytest.mark.parametrize("code", ["numerical_error", "step_error"])
def test_a_failure_ends_its_own_request_with_an_error(code):
    rig = Rig()
    rig.add("bad", [1] * 6, n=2, max_tokens=9)
    rig.add("good", [2] * 6, max_tokens=9)
    rig.step()
    rig.step(failures={2: code})
    last = rig.of("bad")[-1]
    assert last.is_last
    assert (last.error.kind, last.error.code) == ("GenerateError", code)
    assert last.finish_reason is FinishReason.ERROR
    rig.run()
    assert sum(delta.is_last for delta in rig.of("bad")) == 1
    assert tokens_of(rig, "good") == [9] * 9
    assert rig.kv.usage().num_owned == 0


def test_blocks_with_nan_are_zeroed_by_the_next_plan_and_leave_the_tree():
    rig = Rig()
    rig.add("bad", [1] * 10, max_tokens=9)
    rig.step()
    assert rig.kv.usage().num_tree_nodes == 2
    rig.step(failures={1: "numerical_error"})
    assert rig.kv.usage().num_tree_nodes == 0
    rig.add("next", [1] * 10, max_tokens=1)
    plan, _ = rig.step()
    assert sorted(plan.blocks_to_zero) == [0, 1, 2]
    assert shape(plan) == [(2, 0, 10)]


def test_blocks_of_a_step_error_need_no_zeroing():
    rig = Rig()
    rig.add("bad", [1] * 10, max_tokens=9)
    rig.step(failures={1: "step_error"})
    rig.add("next", [1] * 10, max_tokens=1)
    plan, output = rig.step()
    assert plan.blocks_to_zero == []
    assert output.stats.num_prefix_hit_tokens == 0


def test_who_shares_blocks_of_a_failed_sequence_is_computed_again():
    rig = Rig()
    rig.add("bad", [1] * 8 + [2], max_tokens=9)
    rig.step()
    rig.add("sharer", [1] * 8 + [3], max_tokens=4)
    plan, _ = rig.step()
    assert shape(plan) == [(1, 9, 1), (2, 8, 1)]
    rig.step(failures={1: "numerical_error"})
    plan, _ = rig.step()
    assert shape(plan) == [(2, 0, 11)]
    rig.run()
    assert tokens_of(rig, "sharer") == [9] * 4
    assert rig.of("sharer")[-1].stats.num_preemptions == 0


def test_who_shares_bad_blocks_and_is_in_flight_is_computed_again_after_that_step():
    rig = Rig(max_num_batched_tokens=6)
    rig.add("bad", [1] * 5, max_tokens=9)
    rig.step()
    rig.add("sharer", [1] * 4 + [3] * 20, max_tokens=2)
    one, two = rig.scheduler.schedule(), rig.scheduler.schedule()
    assert [shape(plan) for plan in (one, two)] == [[(1, 5, 1), (2, 4, 5)], [(2, 9, 6)]]
    rig.finish(one, failures={1: "numerical_error"})
    assert not rig.scheduler.schedule().has_work
    rig.finish(two)
    assert shape(rig.scheduler.schedule()) == [(2, 0, 6)]


def test_abort_while_waiting():
    rig = Rig(max_num_seqs=1)
    rig.add("a", [1], max_tokens=5)
    rig.add("b", [2], max_tokens=5)
    rig.step()
    rig.scheduler.abort("b")
    (delta,) = rig.scheduler.take_deltas()
    assert (delta.request_id, delta.finish_reason, delta.is_last) == ("b", FinishReason.CANCELLED, True)
    assert rig.scheduler.num_waiting == 0


def test_abort_while_running_frees_at_once_and_comes_with_the_next_output():
    rig = Rig(caching=False)
    rig.add("a", [1] * 6, n=2, max_tokens=5)
    rig.step()
    rig.scheduler.abort("a")
    assert rig.kv.usage().num_owned == 0
    _, output = rig.step()
    assert [(delta.index, delta.finish_reason) for delta in output.deltas] == [
        (0, FinishReason.CANCELLED),
        (1, FinishReason.CANCELLED),
    ]
    assert output.deltas[1].stats.num_generated_tokens == 2
    assert not rig.scheduler.has_work


def test_abort_in_flight_keeps_the_blocks_until_the_step_is_applied():
    rig = Rig(caching=False)
    rig.add("a", [1] * 6, max_tokens=5)
    plan = rig.scheduler.schedule()
    rig.scheduler.abort("a")
    assert rig.kv.usage().num_owned == 2
    assert plan.sequences[0].block_tables == ([0, 1],)
    output = rig.finish(plan)
    assert [delta.finish_reason for delta in output.deltas] == [FinishReason.CANCELLED]
    assert rig.kv.usage().num_owned == 0
    assert not rig.scheduler.has_work


def test_aborting_twice_or_what_is_unknown_or_over_does_nothing():
    rig = Rig()
    rig.add("a", [1], max_tokens=1)
    rig.run()
    rig.scheduler.abort("a")
    rig.scheduler.abort("nobody")
    assert rig.scheduler.take_deltas() == []


def test_what_was_computed_before_an_abort_stays_as_cache():
    rig = Rig()
    rig.add("a", [1] * 9, max_tokens=5)
    rig.step()
    rig.scheduler.abort("a")
    rig.add("b", [1] * 9, max_tokens=1)
    plan, _ = rig.step()
    assert shape(plan) == [(2, 8, 1)]
