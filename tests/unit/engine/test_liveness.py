"""Silence is judged by what the engine has shown of its steps; the supervisor's own pauses are forgiven."""

import pytest

from penstock.engine.liveness import (
    LOADING_SILENCE_S,
    PING_INTERVAL_S,
    STUCK_S,
    WATCHDOG_MIN_S,
    Liveness,
)


def look_until(life: Liveness, *, start_s: float, end_s: float) -> float | None:
    """Ask once an interval; the time of the first yes."""
    now_s = start_s
    while now_s < end_s:
        now_s += PING_INTERVAL_S
        if life.is_hung(now_s=now_s):
            return now_s
    return None


def serving(*, warmup_s: float = 0.0) -> Liveness:
    life = Liveness(now_s=0.0)
    life.on_started(warmup_s=warmup_s)
    return life


def test_a_quick_engine_is_hung_after_the_least_silence() -> None:
    found_s = look_until(serving(), start_s=0.0, end_s=60.0)
    assert found_s is not None
    assert WATCHDOG_MIN_S < found_s <= WATCHDOG_MIN_S + PING_INTERVAL_S


def test_messages_keep_it_alive() -> None:
    life = serving()
    for now_s in range(1, 100):
        life.on_message(now_s=float(now_s))
        assert not life.is_hung(now_s=float(now_s))


def test_slow_steps_make_the_watchdog_patient_and_quick_ones_impatient_again() -> None:
    life = serving()
    life.on_step(2.0)
    assert life.silence_max_s == pytest.approx(40.0)
    for _ in range(200):
        life.on_step(0.01)
    assert life.silence_max_s == WATCHDOG_MIN_S


def test_a_long_first_prefill_is_no_hang_where_warm_up_took_as_long() -> None:
    assert serving(warmup_s=30.0).silence_max_s == pytest.approx(90.0)


def test_loading_may_be_silent_for_long_but_not_for_ever() -> None:
    life = Liveness(now_s=0.0)
    assert look_until(life, start_s=0.0, end_s=LOADING_SILENCE_S - 1) is None
    assert look_until(life, start_s=LOADING_SILENCE_S - 1, end_s=LOADING_SILENCE_S + 5) is not None


def test_a_pause_of_the_supervisor_is_not_the_engines_silence() -> None:
    life = serving()
    life.is_hung(now_s=1.0)
    assert not life.is_hung(now_s=500.0)
    assert look_until(life, start_s=500.0, end_s=500.0 + WATCHDOG_MIN_S) is None
    assert look_until(life, start_s=500.0 + WATCHDOG_MIN_S, end_s=520.0) is not None


def test_readiness_turns_off_before_the_kill() -> None:
    life = serving()
    assert not life.is_stuck(now_s=STUCK_S)
    assert life.is_stuck(now_s=STUCK_S + 0.1)
