"""What the loop does when nobody asks anything of it."""

from types import SimpleNamespace
from typing import Any

import pytest

from penstock.engine.loop import EngineLoop
from penstock.engine.wire import Ping, Shutdown

IDLE = "idle"
BUSY = "busy"


class Scripted:
    """A core and its channel: turn by turn there is work or not, then the engine is shut down."""

    def __init__(self, *turns: str) -> None:
        self.turns = list(turns)
        self.warm_ups = 0
        self.warm_ups_after: list[int] = []
        self.grammars = SimpleNamespace(wake=None, warm_up=self._warm_up, take_done=list, close=lambda: None)
        self.ranks = SimpleNamespace(close=lambda: None)
        self.adapters = None
        self.scheduler = SimpleNamespace(take_deltas=list)

    @property
    def has_work(self) -> bool:
        return bool(self.turns) and self.turns[0] == BUSY

    def _warm_up(self) -> None:
        self.warm_ups += 1

    def prepare(self) -> bool:
        return False

    def step(self) -> Any:
        return SimpleNamespace(deltas=[], stats=None)

    def wake(self) -> None: ...

    def send(self, message: object) -> None: ...

    def receive(self, *, block: bool) -> list[object]:
        self.warm_ups_after.append(self.warm_ups)
        self.turns.pop(0)
        return [Ping()] if self.turns else [Shutdown()]


@pytest.mark.parametrize(
    ("turns", "warm_ups"),
    [
        ([IDLE, IDLE, IDLE], [0, 1, 2]),
        ([IDLE, BUSY, IDLE, BUSY], [0, 0, 0, 0]),
        ([BUSY, IDLE, IDLE], [0, 0, 1]),
    ],
    ids=["idle", "now and then busy", "idle at last"],
)
def test_the_vocabulary_is_read_when_a_whole_wait_has_passed_without_work(turns, warm_ups):
    scripted = Scripted(*turns)
    EngineLoop(scripted, scripted).run()  # type: ignore[arg-type]  # a stand-in for both
    assert scripted.warm_ups_after == warm_ups
