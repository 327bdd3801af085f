"""One step ahead, by hand: what is planned while a token is being drawn, and what becomes of it."""

import pytest
from policy_rig import Rig, shape
from test_constrained_answers import Text

from penstock.core.text import FinishReason, Priority
from penstock.engine.scheduler.drafting import RunnerGuesses
from penstock.engine.scheduler.plan import PENDING_TOKEN


def ahead(**config):
    return Rig(async_scheduling=True, **config)


def pending(plan):
    """Sequences that go on with a token that is being drawn."""
    return [entry.seq_id for entry in plan.sequences if entry.token_ids == [PENDING_TOKEN]]


def test_a_decode_goes_on_with_the_token_that_is_being_drawn():
    rig = ahead()
    rig.add("a", [1, 2, 3, 4, 5], max_tokens=4)
    first, second = rig.scheduler.schedule(), rig.scheduler.schedule()
    assert (shape(first), shape(second)) == ([(1, 0, 5)], [(1, 5, 1)])
    assert pending(second) == [1]
    assert [spec.output_idx for spec in second.sequences[0].samples] == [1]
    rig.finish(first, token=7)
    assert rig.scheduler.void_draws(second) == frozenset()
    third = rig.scheduler.schedule()
    assert (shape(third), pending(third)) == ([(1, 6, 1)], [1])
    rig.finish(second, token=8)
    rig.finish(third, token=9)
    assert [delta.token_ids for delta in rig.of("a")] == [(7,), (8,), (9,)]


def test_nothing_goes_ahead_unless_it_is_asked_for():
    rig = Rig()
    rig.add("a", [1, 2, 3], max_tokens=4)
    first = rig.scheduler.schedule()
    assert not rig.scheduler.schedule().has_work
    rig.finish(first)


@pytest.mark.parametrize(("max_tokens", "max_model_len"), [(2, 256), (100, 7)])
def test_nothing_is_planned_behind_a_token_that_is_the_last_by_its_place(max_tokens, max_model_len):
    rig = ahead(max_model_len=max_model_len)
    rig.add("a", [1, 2, 3, 4, 5], max_tokens=min(max_tokens, max_model_len - 5))
    first, second = rig.scheduler.schedule(), rig.scheduler.schedule()
    rig.finish(first)
    assert not rig.scheduler.schedule().has_work
    rig.finish(second)
    assert rig.of("a")[-1].finish_reason is FinishReason.LENGTH
    assert rig.kv.usage().num_owned == 0


def test_behind_an_end_a_draw_is_void_and_its_slot_never_enters_the_tree():
    rig = ahead(block_size=2)
    rig.add("a", [1, 2, 3], max_tokens=9, eos_token_ids=(0,))
    first, second = rig.scheduler.schedule(), rig.scheduler.schedule()
    rig.finish(first, token=0)
    assert rig.of("a")[-1].finish_reason is FinishReason.STOP
    assert rig.scheduler.void_draws(second) == {1}
    assert rig.kv.usage().num_owned > 0, "the step under way writes to its blocks"
    assert rig.scheduler.has_work
    rig.finish(second, token=5)
    assert (rig.kv.usage().num_owned, rig.kv.usage().num_cached) == (0, 1)
    assert [delta.token_ids for delta in rig.of("a")] == [()]
    assert not rig.scheduler.has_work


def test_one_answer_of_several_that_ends_keeps_its_blocks_until_its_step_is_done():
    rig = ahead(block_size=8)
    rig.add("a", [1, 2, 3], max_tokens=9, n=2, eos_token_ids=(0,))
    first = rig.scheduler.schedule()
    assert not rig.scheduler.schedule().has_work, "both begin when the prompt is theirs"
    rig.finish(first, token=5)
    second, third = rig.scheduler.schedule(), rig.scheduler.schedule()
    assert pending(third) == [1, 2]
    num_owned = rig.kv.usage().num_owned
    rig.finish(second, token=lambda seq_id, _: 0 if seq_id == 1 else 5)
    assert rig.scheduler.void_draws(third) == {1}
    assert [seq.seq_id for seq in rig.scheduler.leaving] == [1]
    assert rig.kv.usage().num_owned == num_owned
    rig.finish(third, token=6)
    assert rig.scheduler.leaving == []
    assert rig.kv.usage().num_owned < num_owned
    assert 1 in rig.scheduler.schedule().finished_seq_ids


def test_a_token_that_the_grammar_forces_makes_the_draw_behind_it_void():
    rig = ahead()
    rig.add("a", [1], max_tokens=9, constraint=Text([1, 2, 3, 4, 5, 6], free=(0, 4)))
    first, second = rig.scheduler.schedule(), rig.scheduler.schedule()
    assert pending(second) == [1]
    rig.finish(first, token=1)
    assert rig.scheduler.void_draws(second) == {1}
    third = rig.scheduler.schedule()
    assert third.sequences[0].token_ids == [2, 3, 4], "forced, and so known"
    assert [spec.output_idx for spec in third.sequences[0].samples] == [4]
    rig.finish(second, token=lambda *_: pytest.fail("nothing is drawn"), void={1})
    rig.finish(third, token=5)
    assert [delta.token_ids for delta in rig.of("a")] == [(1, 2, 3, 4), (5, 6)]


def test_who_is_cancelled_between_plan_and_outcome_gets_nothing_more():
    rig = ahead()
    rig.add("a", [1, 2], max_tokens=9)
    first, second = rig.scheduler.schedule(), rig.scheduler.schedule()
    rig.scheduler.abort("a")
    assert rig.scheduler.void_draws(first) == rig.scheduler.void_draws(second) == {1}
    rig.finish(first)
    rig.finish(second)
    assert [delta.finish_reason for delta in rig.of("a")] == [FinishReason.CANCELLED]
    assert rig.kv.usage().num_owned == 0


@pytest.mark.parametrize("asked", [{"use_beam_search": True, "n": 2}, {"temperature": 1.0}])
def test_beams_and_answers_with_drafts_need_the_result_first(asked):
    rig = ahead()
    if "n" not in asked:
        rig = ahead(proposer=RunnerGuesses(num_tokens_max=2))
    rig.add("a", [1, 2], max_tokens=9, **asked)
    plan = rig.scheduler.schedule()
    assert rig.scheduler.needs_result
    rig.scheduler.abort("a")
    rig.finish(plan)
    assert not rig.scheduler.needs_result


def test_nobody_is_preempted_ahead_of_time():
    """The newest goes for want of a block, though it is in the step under way: the engine waits for that."""
    rig = ahead(num_blocks=4, block_size=2)
    for name in ("old", "new"):
        rig.add(name, [1 + (name == "new"), 3, 4], max_tokens=5)
    first = rig.scheduler.schedule()
    assert len(first.sequences) == 2
    second = rig.scheduler.schedule()
    assert pending(second) == [1, 2]
    rig.finish(first)
    third = rig.scheduler.schedule()
    assert not third.has_work
    assert rig.scheduler.needs_result
    rig.finish(second)
    rig.finish(third)
    assert not rig.scheduler.needs_result
    plan, output = rig.step()
    assert shape(plan) == [(1, 4, 1)]
    assert output.stats.num_preemptions == 1


def test_a_higher_tier_gets_its_seat_though_all_seats_are_in_the_step_under_way():
    rig = ahead(max_num_seqs=1)
    rig.add("low", [1, 2], max_tokens=50, priority=Priority.BATCH)
    first = rig.scheduler.schedule()
    rig.add("high", [3, 4], max_tokens=2, priority=Priority.REALTIME)
    second = rig.scheduler.schedule()
    assert pending(second) == [1]
    assert rig.scheduler.needs_result
    rig.finish(first)
    rig.finish(second)
    assert shape(rig.scheduler.schedule()) == [(2, 0, 2)]
