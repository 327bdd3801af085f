"""The offload tier's bookkeeping: what it offers, what it orders, what it gives up when it is full."""

import random

import pytest
from policy_rig import Rig, shape

from penstock.core.ports import KvTransfer, KvTransferEnd
from penstock.engine.kv.host_tier import HostTier
from penstock.engine.kv.prefix_tree import NO_BLOCK
from penstock.engine.scheduler.plan import HostTraffic, StepPlan

A = ("model", "dtype", "", "tenant", "")
B = ("model", "dtype", "", "tenant", "salt")
SIZE = 2


def tier(num_slots: int = 8, *, num_groups: int = 1) -> HostTier:
    return HostTier(num_slots=num_slots, num_groups=num_groups, block_size=SIZE, bytes_per_slot=100)


def save(host: HostTier, token_ids: list[int], *, namespace=A, tables=None, transfer_id: int = 1):
    blocks = tables or (list(range(len(token_ids) // SIZE)),)
    host.begin_save(
        KvTransfer(
            transfer_id=transfer_id, namespace=namespace, token_ids=token_ids, first_block=0, block_ids=blocks
        )
    )
    return host.take_moves()


def num_found(host: HostTier, token_ids: list[int], *, namespace=A, start: int = 0) -> int:
    return host.num_loadable_tokens(namespace, token_ids, num_computed_tokens=start)


def test_what_was_saved_is_offered_under_its_namespace_alone():
    host = tier()
    (move,) = save(host, [1, 2, 3, 4])
    assert (move.is_load, move.block_ids, move.slots) == (False, [0, 1], [0, 1])
    assert num_found(host, [1, 2, 3, 4, 5]) == 4
    assert num_found(host, [1, 2, 3, 9]) == 2
    assert num_found(host, [1, 2, 3, 4], start=2) == 2
    assert num_found(host, [1, 2, 3, 4], namespace=B) == 0
    assert host.used_bytes == 200


def test_a_load_reads_the_slots_of_its_blocks():
    host = tier()
    save(host, [1, 2, 3, 4, 5, 6])
    host.begin_load(
        KvTransfer(transfer_id=2, namespace=A, token_ids=[1, 2, 3, 4], first_block=1, block_ids=([7],))
    )
    (move,) = host.take_moves()
    assert (move.is_load, move.block_ids, move.slots) == (True, [7], [1])
    assert not host.poll()
    host.end_moves([2])
    assert host.poll() == [KvTransferEnd(2)]


def test_blocks_that_are_there_are_not_copied_again():
    host = tier()
    save(host, [1, 2, 3, 4])
    assert save(host, [1, 2, 3, 4], transfer_id=2) == []
    assert host.poll() == [KvTransferEnd(2)]
    (move,) = save(host, [1, 2, 3, 4, 5, 6], transfer_id=3)
    assert move.block_ids == [2]


def test_every_cache_group_has_a_slot_and_what_left_a_window_ends_the_chain():
    host = tier(num_groups=2)
    (move,) = save(host, [1, 2, 3, 4], tables=([5, 6], [8, NO_BLOCK]))
    assert move.block_ids == [5, 8]
    assert num_found(host, [1, 2, 3, 4]) == 2


def test_the_least_recently_used_leaf_goes_first_and_its_parent_after_it():
    host = tier(4)
    save(host, [1, 1, 2, 2])
    save(host, [3, 3, 4, 4])
    save(host, [1, 1, 2, 2])  # used again
    save(host, [5, 5])
    assert [num_found(host, text) for text in ([1, 1, 2, 2], [3, 3, 4, 4], [5, 5])] == [4, 2, 2]
    save(host, [6, 6])
    assert [num_found(host, text) for text in ([1, 1, 2, 2], [3, 3, 4, 4], [6, 6])] == [4, 0, 2]


def test_a_text_longer_than_the_tier_keeps_its_beginning():
    host = tier(2)
    save(host, [1, 1, 2, 2, 3, 3])
    assert num_found(host, [1, 1, 2, 2, 3, 3]) == 4
    save(host, [1, 1, 2, 2, 3, 3], transfer_id=2)
    assert num_found(host, [1, 1, 2, 2, 3, 3]) == 4


def test_forgetting_a_text_frees_all_that_was_computed_on_it():
    host = tier(3)
    save(host, [1, 1, 2, 2])
    save(host, [1, 1, 3, 3])
    host.forget(A, [1, 1, 9, 9])
    assert host.num_used_slots == 0
    assert num_found(host, [1, 1, 2, 2]) == 0
    save(host, [1, 1, 2, 2, 3, 3])
    assert num_found(host, [1, 1, 2, 2, 3, 3]) == 6


@pytest.mark.parametrize("seed", range(6))
def test_slots_are_never_shared_nor_lost(seed: int):
    """A model of the tier: a dictionary of all texts ever saved says which content a slot must have."""
    rng = random.Random(seed)
    host = tier(rng.choice((1, 2, 5, 9)))
    memory: dict[int, tuple[object, ...]] = {}
    for transfer_id in range(300):
        namespace = rng.choice((A, B))
        text = [rng.randrange(2) for _ in range(SIZE * rng.randint(1, 5))]
        if rng.random() < 0.1:
            host.forget(namespace, text)
            continue
        num_tokens = num_found(host, text, namespace=namespace)
        is_load = num_tokens > 0 and rng.random() < 0.5
        transfer = KvTransfer(
            transfer_id=transfer_id,
            namespace=namespace,
            token_ids=text[:num_tokens] if is_load else text,
            first_block=0,
            block_ids=(list(range((num_tokens if is_load else len(text)) // SIZE)),),
        )
        (host.begin_load if is_load else host.begin_save)(transfer)
        for move in host.take_moves():
            for block, slot in zip(move.block_ids, move.slots, strict=True):
                content = (namespace, *text[: (block + 1) * SIZE])
                if move.is_load:
                    assert memory[slot] == content
                memory[slot] = content
        assert host.num_used_slots <= host.num_slots
        assert num_found(host, text, namespace=namespace) <= len(text)


def apply_moves(rig: Rig, plan: StepPlan) -> HostTraffic:
    return HostTraffic(ended=tuple(move.transfer_id for move in plan.host_moves))


def test_a_preempted_request_comes_back_from_host_memory_and_computes_only_its_partial_block():
    host = HostTier(num_slots=16, num_groups=1, block_size=4, bytes_per_slot=1)
    rig = Rig(num_blocks=4, connector=host)
    rig.add("a", [1] * 6, max_tokens=9)
    rig.add("b", [2] * 6, max_tokens=9)
    restarted = []
    while rig.scheduler.has_work:
        plan = rig.scheduler.schedule()
        restarted += [entry for entry in shape(plan) if entry[0] == 2 and entry[1] > 0 and entry[2] > 1]
        rig.finish(plan, host_traffic=apply_moves(rig, plan))
    assert sum(rig.of("b")[-1].stats.num_preemptions for _ in range(1)) >= 1
    assert all(start % 4 == 0 for _, start, _ in restarted)
    assert host.num_loaded_tokens >= 4
    assert rig.kv.usage().num_owned == 0
