"""The host's part of a step is what passes between a step's end and the next launch, while there is work."""

from penstock.engine.core import HostTime, LaunchedStep
from penstock.engine.runner.step_handle import StepHandle
from penstock.engine.scheduler.plan import ScheduledSequence, StepPlan, StepResult


def told(host_time, *, launched_s, ended_s, has_work=True):
    sequences = [ScheduledSequence(1, [0], 0, ([0],))] if has_work else []
    plan = StepPlan(step_id=1, sequences=sequences)
    step = LaunchedStep(plan=plan, handle=StepHandle(plan=plan), launched_s=launched_s)
    return host_time.before(step, StepResult(step_id=1, tokens=[], ended_s=ended_s))


def test_it_is_the_time_from_an_end_to_the_next_launch_and_none_if_that_came_before():
    host_time = HostTime()
    assert told(host_time, launched_s=10.0, ended_s=11.0) == 0.0
    assert told(host_time, launched_s=11.25, ended_s=12.0) == 0.25
    assert told(host_time, launched_s=11.5, ended_s=13.0) == 0.0


def test_idle_times_are_nobodys():
    host_time = HostTime()
    told(host_time, launched_s=10.0, ended_s=11.0)
    host_time.rest()
    assert told(host_time, launched_s=50.0, ended_s=51.0) == 0.0
    assert told(host_time, launched_s=51.0, ended_s=51.0, has_work=False) == 0.0
    assert told(host_time, launched_s=90.0, ended_s=91.0) == 0.0
