"""Answers under a constraint: forced tokens need no step, are billed, and end an answer like any other token."""

import pytest
from policy_rig import Rig

from penstock.core.text import FinishReason, TokenLogprob, TokenLogprobs
from penstock.engine.scheduler.plan import SampledToken, StepResult


class Text:
    """Allows one text: tokens at `free` places are the reader's choice (any token), the others are forced."""

    def __init__(self, tokens, *, free=(0,), accepted=()):
        self.tokens = tokens
        self.free = free
        self.accepted = list(accepted)
        self.failure = None

    @property
    def is_complete(self):
        return len(self.accepted) == len(self.tokens)

    may_end = False

    def accept(self, token_id):
        place = len(self.accepted)
        if place not in self.free and token_id != self.tokens[place]:
            self.failure = "a token that was not allowed"
        self.accepted.append(token_id)

    def forced(self):
        start = end = len(self.accepted)
        while end < len(self.tokens) and end not in self.free:
            end += 1
        return tuple(self.tokens[start:end])

    def fork(self):
        return Text(self.tokens, free=self.free, accepted=self.accepted)


def tokens_of(rig, name, index=0):
    return [token for delta in rig.of(name) if delta.index == index for token in delta.token_ids]


def num_steps(rig, **outcome):
    steps = 0
    while rig.scheduler.has_work:
        rig.step(**outcome)
        steps += 1
    return steps


TEXT = [1, 2, 3, 4, 5, 6]


def test_forced_tokens_need_no_step_and_are_billed():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, constraint=Text(TEXT, free=(0, 4)))
    assert num_steps(rig, token=lambda _, idx: TEXT[idx]) == 2
    assert [delta.token_ids for delta in rig.of("a")] == [(1, 2, 3, 4), (5, 6)]
    assert rig.of("a")[-1].finish_reason is FinishReason.STOP
    assert rig.of("a")[-1].stats.num_generated_tokens == 6


def test_without_jump_forward_every_token_is_drawn_and_the_answer_is_the_same():
    rig = Rig(enable_jump_forward=False)
    rig.add("a", [1], max_tokens=9, constraint=Text(TEXT, free=(0, 4)))
    assert num_steps(rig, token=lambda _, idx: TEXT[idx]) == 6
    assert tokens_of(rig, "a") == TEXT
    assert rig.of("a")[-1].finish_reason is FinishReason.STOP


def test_the_step_after_a_jump_computes_all_forced_tokens_and_tells_the_sampler_of_them():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, constraint=Text(TEXT, free=(0, 4)))
    rig.step(token=1)
    plan = rig.scheduler.schedule()
    (entry,) = plan.sequences
    assert (entry.start, entry.token_ids, entry.samples[0].output_idx) == (1, [1, 2, 3, 4], 4)
    assert [(each.seq_id, each.token_ids) for each in plan.forced_tokens] == [(entry.seq_id, (2, 3, 4))]
    rig.finish(plan, token=5)


def test_max_tokens_cuts_a_jump():
    rig = Rig()
    rig.add("a", [1], max_tokens=3, constraint=Text(TEXT))
    assert num_steps(rig, token=1) == 1
    assert tokens_of(rig, "a") == [1, 2, 3]
    assert rig.of("a")[-1].finish_reason is FinishReason.LENGTH


def test_a_complete_text_stops_even_with_the_last_token_that_was_allowed():
    rig = Rig()
    rig.add("a", [1], max_tokens=6, ignore_eos=True, min_tokens=6, constraint=Text(TEXT))
    rig.run(token=1)
    assert tokens_of(rig, "a") == TEXT
    assert rig.of("a")[-1].finish_reason is FinishReason.STOP


def test_a_stop_token_ends_a_jump_and_is_not_part_of_the_answer():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, stop_token_ids=(3,), constraint=Text(TEXT))
    rig.run(token=1)
    assert tokens_of(rig, "a") == [1, 2]
    assert (rig.of("a")[-1].finish_reason, rig.of("a")[-1].stop_token_id) == (FinishReason.STOP, 3)


@pytest.mark.parametrize(("num_top", "top"), [(0, ()), (2, (TokenLogprob(2, 0.0, 1),))])
def test_a_forced_token_is_certain(num_top, top):
    rig = Rig()
    rig.add("a", [1], max_tokens=2, logprobs=num_top, constraint=Text(TEXT))
    plan = rig.scheduler.schedule()
    drawn = TokenLogprobs(TokenLogprob(1, -0.5, 1))
    seq_id = plan.sequences[0].seq_id
    result = StepResult(step_id=plan.step_id, tokens=[SampledToken(seq_id, 1, drawn)])
    (delta,) = rig.scheduler.apply(plan, result).deltas
    assert delta.logprobs == (drawn, TokenLogprobs(TokenLogprob(2, 0.0, 1), top))


def test_each_answer_follows_its_own_constraint():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, n=2, constraint=Text(TEXT, free=(0, 4)))
    rig.run(token=lambda seq_id, idx: 10 * seq_id + idx)
    assert tokens_of(rig, "a", 0) == [10, 2, 3, 4, 14, 6]
    assert tokens_of(rig, "a", 1) == [20, 2, 3, 4, 24, 6]


def test_a_preempted_answer_goes_on_where_it_was():
    rig = Rig(num_blocks=8, block_size=2)
    long = list(range(1, 13))
    rig.add("a", [1, 1], max_tokens=12, constraint=Text(long, free=(0, 3, 6, 9)))
    rig.add("b", [2, 2], max_tokens=12, constraint=Text(long, free=(0, 3, 6, 9)))
    rig.run(token=lambda _, idx: long[idx])
    assert max(rig.of(name)[-1].stats.num_preemptions for name in "ab") > 0
    assert tokens_of(rig, "a") == tokens_of(rig, "b") == long


def test_a_constraint_that_fails_ends_its_request_and_no_other():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, constraint=Text(TEXT, free=()))
    rig.add("b", [2], max_tokens=2)
    rig.run(token=7)
    (last,) = rig.of("a")
    assert (last.finish_reason, last.error.code) == (FinishReason.ERROR, "grammar_error")
    assert last.error.kind == "InvalidParameterError", "what a client asked for is no fault of the server"
    assert tokens_of(rig, "b") == [7, 7]


@pytest.mark.parametrize("bans", [{"bad_words": ("x",)}, {"allowed_token_ids": (1, 2)}])
def test_what_the_grammar_forces_and_the_client_may_have_banned_is_drawn_not_appended(bans):
    rig = Rig()
    rig.add("a", [1], max_tokens=9, constraint=Text(TEXT), **bans)
    assert num_steps(rig, token=lambda _, idx: TEXT[idx]) == len(TEXT)


def test_a_row_without_any_token_left_is_a_fault_of_the_request():
    rig = Rig()
    rig.add("a", [1], max_tokens=9, allowed_token_ids=(5,), constraint=Text(TEXT))
    rig.step(failures={1: "no_token_allowed"})
    (last,) = rig.of("a")
    assert (last.error.kind, last.error.code) == ("InvalidParameterError", "no_token_allowed")


def test_a_row_without_any_token_left_ends_an_answer_that_may_end():
    rig = Rig()
    constraint = Text(TEXT)
    constraint.may_end = True
    rig.add("a", [1], max_tokens=9, min_tokens=5, constraint=constraint)
    rig.step(failures={1: "no_token_allowed"})
    (last,) = rig.of("a")
    assert (last.finish_reason, last.error) == (FinishReason.STOP, None)
    assert not rig.scheduler.has_work
