"""Slots: one adapter each, kept while requests use it, handed on by least recent use."""

import pytest

from penstock.engine.lora.slots import AdapterSlots, Readiness


class FakeWeights:
    """Everything is in memory unless a test says otherwise."""

    def __init__(self) -> None:
        self.readiness: dict[str, Readiness] = {}
        self.pins: dict[str, int] = {}
        self.registered: set[str] = {"a", "b", "c"}
        self.discarded: list[str] = []

    def want(self, revision: str) -> Readiness:
        return self.readiness.get(revision, Readiness.READY)

    def pin(self, revision: str) -> None:
        self.pins[revision] = self.pins.get(revision, 0) + 1

    def unpin(self, revision: str) -> None:
        self.pins[revision] -= 1

    def is_registered(self, revision: str) -> bool:
        return revision in self.registered

    def discard(self, revision: str) -> None:
        self.discarded.append(revision)


@pytest.fixture
def weights() -> FakeWeights:
    return FakeWeights()


def start(slots: AdapterSlots, revision: str) -> int:
    slots.enter(revision)
    assert slots.ask(revision) is Readiness.READY
    assert slots.can_take(revision)
    return slots.take(revision)


def end(slots: AdapterSlots, revision: str) -> None:
    slots.leave(revision)
    slots.exit(revision)


def test_requests_of_one_adapter_share_a_slot_and_others_get_their_own(weights: FakeWeights) -> None:
    slots = AdapterSlots(2, weights=weights)
    assert start(slots, "a") == start(slots, "a") == 0
    assert start(slots, "b") == 1
    assert not slots.can_take("c")
    assert slots.can_take("b")
    assert slots.take_bindings() == [(0, "a"), (1, "b")]
    assert weights.pins == {"a": 1, "b": 1}


def test_an_idle_slot_is_found_again_and_the_one_left_longest_ago_is_bound_anew(
    weights: FakeWeights,
) -> None:
    slots = AdapterSlots(2, weights=weights)
    start(slots, "a")
    start(slots, "b")
    end(slots, "b")
    end(slots, "a")
    slots.take_bindings()
    assert start(slots, "b") == 1
    assert slots.take_bindings() == []
    assert start(slots, "c") == 0
    assert slots.take_bindings() == [(0, ""), (0, "c")]
    assert weights.pins == {"a": 0, "b": 1, "c": 1}


def test_without_room_in_memory_an_idle_slot_is_given_up(weights: FakeWeights) -> None:
    slots = AdapterSlots(2, weights=weights)
    start(slots, "a")
    end(slots, "a")
    weights.readiness["b"] = Readiness.NO_ROOM
    slots.enter("b")
    assert slots.ask("b") is Readiness.NO_ROOM
    assert weights.pins == {"a": 0}


def test_a_version_without_a_name_lives_as_long_as_its_requests(weights: FakeWeights) -> None:
    slots = AdapterSlots(2, weights=weights)
    start(slots, "a")
    slots.enter("a")  # one more, which waits
    weights.registered.discard("a")
    slots.forget("a")
    assert not weights.discarded
    end(slots, "a")
    assert not weights.discarded
    assert slots.take("a") == 0  # the one that waited
    end(slots, "a")
    assert weights.discarded == ["a"]
    assert weights.pins == {"a": 0}
    assert slots.take_bindings()[-1] == (0, "")


def test_counts_say_what_runs_and_what_waits(weights: FakeWeights) -> None:
    slots = AdapterSlots(1, weights=weights)
    start(slots, "a")
    slots.enter("b")
    assert (slots.num_used, slots.num_waiting) == (1, 1)
    assert (slots.num_requests("a"), slots.num_requests("b"), slots.num_requests("c")) == (1, 1, 0)
