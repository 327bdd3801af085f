"""Whatever drafts cost, they lose at most what plain steps pay in; where they pay they go on."""

import random

import pytest

from penstock.engine.scheduler.draft_ledger import ATTEMPT, PAID_IN, DraftLedger

STEP_S = 0.001


def decode(ledger, *, num_tokens, seed=0, num_seqs=1, price=0.3, right=0.6, num_drafts=2):
    """Make tokens; how many plain steps' time that took for each, and in how many steps there were drafts."""
    rng = random.Random(seed)
    made = drafted = 0
    took_s = 0.0
    while made < num_tokens * num_seqs:
        noise = rng.uniform(0.8, 1.2)
        if ledger.allows(num_seqs):
            gained = 0
            for _ in range(num_seqs):
                gained += 1
                for _ in range(num_drafts):
                    if rng.random() > right:
                        break
                    gained += 1
            step_s = STEP_S * noise * (1 + num_drafts * price)
            ledger.note_drafted(num_seqs=num_seqs, num_tokens=gained, step_time_s=step_s)
            drafted += 1
        else:
            gained, step_s = num_seqs, STEP_S * noise
            ledger.note_plain(num_seqs=num_seqs, step_time_s=step_s)
        made += gained
        took_s += step_s
    return took_s / STEP_S / made * num_seqs, drafted


@pytest.mark.parametrize("price", [0.6, 0.9, 2.0, 10.0])
@pytest.mark.parametrize("num_seqs", [1, 16])
def test_drafts_that_lose_cost_two_percent_at_most(price, num_seqs):
    ledger = DraftLedger()
    decode(ledger, num_tokens=500, price=price, num_seqs=num_seqs)
    slower, drafted = decode(ledger, num_tokens=4000, price=price, num_seqs=num_seqs, seed=1)
    assert slower < 1.02
    assert drafted > 0, "now and then it is tried again"


@pytest.mark.parametrize("seed", range(5))
def test_drafts_that_pay_are_made_nearly_always(seed):
    """An expected 1.96 tokens for 1.2 steps; single steps may well lose."""
    faster, drafted = decode(DraftLedger(), num_tokens=2000, price=0.1, seed=seed)
    assert faster < 0.66
    assert drafted > 0.97 * 2000 / 1.96


def test_nothing_is_drafted_before_plain_steps_of_that_size_are_known():
    ledger = DraftLedger()
    for _ in range(3):
        assert not ledger.allows(2)
        ledger.note_plain(num_seqs=2, step_time_s=STEP_S)
    assert ledger.allows(2)
    assert not ledger.allows(3)


def test_a_pause_of_the_machine_is_one_bad_step_and_not_a_verdict():
    ledger = DraftLedger()
    decode(ledger, num_tokens=200, price=0.1)
    ledger.note_drafted(num_seqs=1, num_tokens=1, step_time_s=1000 * STEP_S)
    assert ledger.allows(1)


def test_when_the_load_falls_by_half_there_is_one_attempt_at_once():
    ledger = DraftLedger()
    for num_seqs in (64, 32):
        for _ in range(3):
            ledger.note_plain(num_seqs=num_seqs, step_time_s=STEP_S)
    while ledger.allows(64):
        ledger.note_drafted(num_seqs=64, num_tokens=64, step_time_s=2 * STEP_S)
    assert ledger.credit < ATTEMPT
    assert ledger.allows(32)
    while ledger.allows(32):
        ledger.note_drafted(num_seqs=32, num_tokens=32, step_time_s=2 * STEP_S)
    assert not ledger.allows(16), "and not another one soon"


def test_a_closed_ledger_opens_when_an_attempt_is_paid_in():
    ledger = DraftLedger()
    for _ in range(3):
        ledger.note_plain(num_seqs=1, step_time_s=STEP_S)
    while ledger.allows(1):
        ledger.note_drafted(num_seqs=1, num_tokens=1, step_time_s=2 * STEP_S)
    missing = (ATTEMPT - ledger.credit) / PAID_IN
    for _ in range(int(missing) - 1):
        ledger.note_plain(num_seqs=1, step_time_s=STEP_S)
        assert not ledger.allows(1)
    for _ in range(2):
        ledger.note_plain(num_seqs=1, step_time_s=STEP_S)
    assert ledger.allows(1)
