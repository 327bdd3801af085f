"""Policies: who is next."""

import pytest
from policy_rig import request

from penstock.core.text import Priority
from penstock.engine.scheduler.policy import FairPolicy, FcfsPolicy, Policy, PriorityPolicy, make_policy
from penstock.engine.scheduler.request import SequenceGroup


def group(idx: int, *, tenant: str = "t", priority: Priority = Priority.INTERACTIVE) -> SequenceGroup:
    return SequenceGroup(
        request=request(f"r{idx}", [1], tenant=tenant, priority=priority),
        arrival_idx=idx,
        arrival_s=0.0,
        tier=int(priority),
        num_prompt_tokens=1,
        num_blocks_max=1,
    )


def order(policy: Policy) -> list[int]:
    taken = []
    while (next_group := policy.pop()) is not None:
        taken.append(next_group.arrival_idx)
    return taken


@pytest.mark.parametrize(
    ("name", "kind"), [("fcfs", FcfsPolicy), ("priority", PriorityPolicy), ("fair", FairPolicy)]
)
def test_a_name_makes_its_policy(name, kind):
    assert isinstance(make_policy(name), kind)


def test_fcfs_ignores_tiers():
    policy = FcfsPolicy()
    policy.add(group(0, priority=Priority.BATCH))
    policy.add(group(1, priority=Priority.REALTIME))
    assert order(policy) == [0, 1]
    assert policy.tier_of(Priority.BATCH) == policy.tier_of(Priority.REALTIME)


@pytest.mark.parametrize("policy", [PriorityPolicy(), FairPolicy()])
def test_a_higher_tier_goes_first_then_the_older(policy):
    policy.add(group(0, priority=Priority.BATCH))
    policy.add(group(1, priority=Priority.INTERACTIVE))
    policy.add(group(2, priority=Priority.REALTIME))
    policy.add(group(3, priority=Priority.INTERACTIVE))
    assert order(policy) == [2, 1, 3, 0]


@pytest.mark.parametrize("policy", [FcfsPolicy(), PriorityPolicy(), FairPolicy()])
def test_who_is_put_back_regains_the_old_place(policy):
    for idx in range(3):
        policy.add(group(idx))
    first = policy.pop()
    policy.push(first)
    assert order(policy) == [0, 1, 2]


@pytest.mark.parametrize("policy", [FcfsPolicy(), PriorityPolicy(), FairPolicy()])
def test_who_is_removed_never_comes(policy):
    groups = [group(idx) for idx in range(3)]
    for each in groups:
        policy.add(each)
    policy.remove(groups[1])
    policy.remove(groups[1])
    assert order(policy) == [0, 2]


def test_fair_serves_the_tenant_with_least_service():
    policy = FairPolicy()
    groups = [group(0, tenant="a"), group(1, tenant="a"), group(2, tenant="b"), group(3, tenant="b")]
    for each in groups:
        policy.add(each)
    assert policy.pop() is groups[0]
    policy.charge(groups[0], num_prompt_tokens=10)
    assert policy.pop() is groups[2]
    policy.charge(groups[2], num_prompt_tokens=3, num_output_tokens=4)
    assert policy.served("b") == 11.0
    assert policy.pop() is groups[1]


def test_fair_counts_an_output_token_twice():
    policy = FairPolicy()
    one = group(0)
    policy.add(one)
    policy.charge(one, num_output_tokens=5)
    assert policy.served("t") == 10.0


def test_a_newcomer_is_lifted_to_the_least_of_the_active():
    policy = FairPolicy()
    old = group(0, tenant="a")
    policy.add(old)
    policy.charge(old, num_prompt_tokens=100)
    policy.add(group(1, tenant="new"))
    assert policy.served("new") == 100.0


def test_a_newcomer_is_lifted_to_the_last_who_left_if_nobody_is_active():
    policy = FairPolicy()
    old = group(0, tenant="a")
    policy.add(old)
    policy.charge(policy.pop(), num_prompt_tokens=100)
    policy.end(old)
    policy.add(group(1, tenant="new"))
    assert policy.served("new") == 100.0


def test_a_returning_tenant_keeps_its_debt():
    policy = FairPolicy()
    debtor, other = group(0, tenant="a"), group(1, tenant="b")
    policy.add(debtor)
    policy.add(other)
    policy.charge(debtor, num_prompt_tokens=100)
    policy.remove(debtor)
    policy.end(debtor)
    policy.add(group(2, tenant="a"))
    assert policy.served("a") == 100.0
    assert policy.pop() is other


def test_counters_of_idle_tenants_are_bounded(monkeypatch):
    monkeypatch.setattr("penstock.engine.scheduler.policy.MAX_IDLE_TENANTS", 3)
    policy = FairPolicy()
    for idx in range(10):
        visitor = group(idx, tenant=f"t{idx}")
        policy.add(visitor)
        policy.charge(policy.pop(), num_prompt_tokens=1)
        policy.end(visitor)
    known = [idx for idx in range(10) if policy.served(f"t{idx}") > 0]
    assert known == [7, 8, 9]


def test_the_order_stays_small_while_a_low_tier_never_runs():
    policy = FairPolicy()
    policy.add(group(0, priority=Priority.REALTIME))
    for idx in range(1, 1000):
        visitor = group(idx, priority=Priority.BATCH)
        policy.add(visitor)
        policy.push(policy.pop())
        if idx > 1:
            policy.remove(visitor)
            policy.end(visitor)
    assert policy.num_entries < 100
    assert order(policy) == [0, 1]


def test_a_flood_of_one_tenant_leaves_the_other_its_half():
    """Two tenants, one with 20 times the requests: service differs by at most one request."""
    policy = FairPolicy()
    for idx in range(400):
        policy.add(group(idx, tenant="flood"))
    for idx in range(400, 420):
        policy.add(group(idx, tenant="victim"))
    for _ in range(40):
        served = policy.pop()
        policy.charge(served, num_prompt_tokens=10)
        assert abs(policy.served("flood") - policy.served("victim")) <= 10
