"""A rank on a thread of its own does what it would do in the caller's, in the order of the calls."""

import gc
import threading

import pytest
import torch
from fake_model import make_runner
from test_runner_steps import new, seq, tokens

from penstock.core.errors import EngineDeadError
from penstock.engine.runner.overlapped_rank import OverlappedRank
from penstock.engine.runner.rank_group import LocalRank
from penstock.engine.scheduler.plan import PENDING_TOKEN, SampleSpec, StepPlan

THREAD = "penstock-rank"


class Probe:
    """A rank whose calls are noted, and whose launches wait until they may go on."""

    buffer_bytes = 5

    def __init__(self, *, error=None):
        self.rank = LocalRank(make_runner()[0])
        self.error = error
        self.may_launch = threading.Event()
        self.calls = []

    def _note(self, what):
        self.calls.append(what)
        assert threading.current_thread().name == THREAD
        assert torch.is_inference_mode_enabled()

    def launch(self, plan):
        assert self.may_launch.wait(20)
        self._note(f"launch {plan.step_id}")
        if self.error is not None:
            raise self.error
        return self.rank.launch(plan)

    def draw(self, handle, *, masks, void):
        self._note(f"draw {handle.plan.step_id}")
        self.rank.draw(handle, masks=masks, void=void)

    def collect(self, handle):
        return self.rank.collect(handle)

    def close(self):
        self._note("close")


def plan(step_id, *sequences, **parts):
    return StepPlan(step_id=step_id, sequences=list(sequences), **parts)


def test_a_step_is_launched_while_the_one_before_is_under_way_and_goes_on_with_its_token():
    probe = Probe()
    rank = OverlappedRank(probe)
    first = rank.launch(plan(1, seq(1, [3], 0, [2]), new_sequences=[new(1)]))
    rank.draw(first)
    ahead = seq(1, [PENDING_TOKEN], 1, [2], specs=(SampleSpec(1, 1),))
    second = rank.launch(plan(2, ahead))
    assert probe.calls == [], "the caller did not wait"
    probe.may_launch.set()
    assert tokens(rank.collect(first)) == {1: 4}
    rank.draw(second)
    assert tokens(rank.collect(second)) == {1: 4 + 5}
    assert rank.buffer_bytes == 5
    rank.close()
    assert probe.calls == ["launch 1", "draw 1", "launch 2", "draw 2", "close"]


def test_nothing_is_drawn_for_void_sequences():
    probe = Probe()
    probe.may_launch.set()
    rank = OverlappedRank(probe)
    handle = rank.launch(plan(1, seq(1, [3], 0, [2]), seq(2, [4], 0, [3]), new_sequences=[new(1), new(2)]))
    rank.draw(handle, void={1})
    assert tokens(rank.collect(handle)) == {2: 5}
    rank.close()


def test_block_tables_may_change_once_a_step_is_launched():
    probe = Probe()
    rank = OverlappedRank(probe)
    table = [2]
    handle = rank.launch(plan(1, seq(1, [3], 0, table), new_sequences=[new(1)]))
    table.clear()
    probe.may_launch.set()
    rank.draw(handle)
    assert tokens(rank.collect(handle)) == {1: 4}
    rank.close()


def test_what_the_launch_raises_reaches_who_collects():
    probe = Probe(error=EngineDeadError("all failed"))
    probe.may_launch.set()
    rank = OverlappedRank(probe)
    handle = rank.launch(plan(1, seq(1, [3], 0, [2]), new_sequences=[new(1)]))
    rank.draw(handle)
    with pytest.raises(EngineDeadError, match="all failed"):
        rank.collect(handle)
    rank.close()


def test_the_thread_ends_with_the_rank():
    rank = OverlappedRank(Probe())
    (thread,) = [each for each in threading.enumerate() if each.name == THREAD]
    del rank
    gc.collect()
    thread.join(20)
    assert not thread.is_alive()
